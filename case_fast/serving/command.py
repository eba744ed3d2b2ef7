"""``case-fast explain``: one dialogue or examples of a store, as text, JSON, HTML, and as table 6 over several runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from case_fast.data import Store, open_store
from case_fast.errors import ConfigError
from case_fast.files import require_file_place, require_folder_place, write_json, write_text
from case_fast.generation import GenerationConfig
from case_fast.models import title_of
from case_fast.serving.cases import Case, write_cases
from case_fast.serving.page import explanation_page
from case_fast.serving.reasons import Explanation
from case_fast.serving.responder import Responder, load
from case_fast.serving.show import show


def explain(args: Any, config: GenerationConfig, console: Console) -> list[Path]:
    """Carry out the command with its arguments; returns the files that it wrote.

    Raises:
        ConfigError: the arguments do not go together, or an edit is no JSON.
    """
    indices = _numbers(args.index)
    _check(args, indices)
    edits = [edit for text in args.edit for edit in _read(text)]
    files = {kind: require_file_place(path) for kind, path in (("json", args.json), ("html", args.html)) if path}
    if args.table:
        require_folder_place(args.table)
    responder = load(args.run, args.device, args.knowledge)
    how = {"config": config, "effects": _listed(args.effects), "attention": args.attention}
    store = open_store(args.data) if args.data else None
    if store is None:
        found = [responder.explain(args.texts, edits, args.reply, **how)]
    else:
        found = responder.explain_stored(store, args.split, indices, edits, args.reply, args.reference, **how)
    for one in found if not args.table else ():
        show(one, console)
    if "json" in files:
        values = [one.as_dict() for one in found]
        write_json(files["json"], values[0] if store is None else values)
    if "html" in files:
        write_text(files["html"], explanation_page(found))
    return [*files.values(), *(_table(args, store, indices, responder, found, edits, how) if args.table else ())]


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in _listed(text)]
    except ValueError:
        raise ConfigError(f"index must be whole numbers parted by commas, not {text!r}") from None


def _check(args: Any, indices: Sequence[int]) -> None:
    if bool(args.texts) == bool(args.data):
        raise ConfigError("give either the texts of a dialogue or --data STORE with --index")
    if bool(args.data) != bool(indices):
        raise ConfigError("--data and --index belong together: a store, and which of its examples")
    if args.reference and (args.reply is not None or not args.data):
        raise ConfigError("--reference explains the replies of a store's examples: it needs --data, and no --reply")
    if args.table and (not args.data or args.reply is not None or args.reference):
        raise ConfigError("--table is of what runs reply to examples of a store: it needs --data, no --reply and no --reference")
    if args.runs and not args.table:
        raise ConfigError("--runs are the other runs of --table")


def _read(text: str) -> Iterable[Any]:
    """The edits in a text: one, or a list of them."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--edit {text!r} is no JSON ({error})") from None
    return found if isinstance(found, list) else [found]


def _table(args: Any, store: Store, indices: Sequence[int], responder: Responder, found: list[Explanation],
           edits: Sequence[Any], how: dict[str, Any]) -> list[Path]:
    runs = [args.run, *_listed(args.runs)]
    names, columns = [_name(responder)], [found]
    for run in runs[1:]:
        other = load(run, args.device, args.knowledge)
        names.append(_name(other))
        columns.append(other.explain_stored(store, args.split, indices, edits, **how))
    names = [name if names.count(name) == 1 else f"{name} ({Path(run).name})" for name, run in zip(names, runs, strict=True)]
    cases = []
    for index, *replies in zip(indices, *columns, strict=True):
        source = store.example(args.split, index).source
        cases.append(Case(f"{args.split} {index}", source["emotion"] or "unknown", source["response"],
                          list(zip(names, replies, strict=True))))
    return write_cases(cases, Path(args.table))


def _name(responder: Responder) -> str:
    config = responder.model.config
    return " ".join(filter(None, (title_of(config.kind), config.ablation)))
