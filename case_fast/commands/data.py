"""Commands about data: from official files to a store, and what is in one."""

from __future__ import annotations

import dataclasses
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from case_fast.commands import Command, fields, print_paths
from case_fast.errors import ConfigError
from case_fast.files import require_file_place, write_json
from case_fast.terminal import Stages, Terminal, print_json
from case_fast.text_files import require_file


def _prepare_arguments(parser: ArgumentParser) -> None:
    from case_fast.data.prepare import PrepareSettings

    parser.add_argument("--knowledge", type=str, required=True, help="source of inferences: atomic:PATH, comet:DIR or bundled")
    parser.add_class_arguments(PrepareSettings, skip={"knowledge"})


def _prepare(args: Namespace, console: Terminal) -> None:
    from case_fast.data.prepare import PrepareSettings, infer_knowledge, prepare
    from case_fast.training.processes import together

    settings = PrepareSettings(**fields(args, PrepareSettings))
    with together(settings.device) as processes:
        if processes.first:
            prepared(prepare(settings, Stages(console), infer=processes.infer), console)
        else:
            infer_knowledge(settings, infer=processes.infer)


def _import_arguments(parser: ArgumentParser) -> None:
    from case_fast.data.prepare import PrepareSettings

    parser.add_argument("source", type=str,
                        help="dataset_preproc.p, or the folder with it or with sys_dialog_texts.train.npy and so on")
    parser.add_argument("--check", type=bool, default=False, nargs="?", const=True,
                        help="read it, say what is there, write nothing")
    # not required of --check
    for name, what in (("out", "folder of the new store"), ("conceptnet", "ConceptNet assertions, or 'bundled'"),
                       ("lexicon", "NRC-VAD text file, or 'bundled'"),
                       ("knowledge", "atomic:PATH, comet:DIR or bundled, for texts without inferences in the file; else these "
                        "have none")):
        parser.add_argument(f"--{name}", type=str | None, default=None, help=what)
    parser.add_class_arguments(PrepareSettings, skip={"dialogues", "limit", "out", "conceptnet", "lexicon", "knowledge"})


def _import(args: Namespace, console: Terminal) -> None:
    from case_fast.data.prepare import PrepareSettings
    from case_fast.importing import check, import_release, show

    if args.check:
        show(check(args.source, args.features.inferences_per_relation, Stages(console)), console)
        return
    if missing := [f"--{name}" for name in ("out", "conceptnet", "lexicon") if args[name] is None]:
        raise ConfigError(f"a store needs {', '.join(missing)} too; with --check the file is only read and nothing is written")
    given = {item.name: args[item.name] for item in dataclasses.fields(PrepareSettings) if item.name in args}
    prepared(import_release(PrepareSettings(dialogues=args.source, **given), Stages(console)), console)


def prepared(store: Any, console: Terminal) -> None:
    counts = store.manifest["counts"]
    examples = ", ".join(f"{split} {count:,}" for split, count in counts["examples"].items())
    console.say(f"{store.path}: {examples} examples; {counts['vocabulary']:,} words, {counts['distinct_texts']:,} knowledge "
                f"texts; {store.manifest['seconds']} s")


def _inspect_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("store", type=str, help="folder that prepare made")
    parser.add_argument("--split", type=str, default="train", help="train, valid or test")
    parser.add_argument("--index", type=int, default=0, help="example, from 0")
    parser.add_argument("--json", type=bool, default=False, nargs="?", const=True, help="print JSON")


def _inspect(args: Namespace, console: Terminal) -> None:
    from case_fast.data import open_store
    from case_fast.data.inspect import describe, show

    store = open_store(args.store)
    if args.split not in store.splits:
        raise ConfigError(f"--split {args.split!r} is not in this store; it has {', '.join(store.splits)}")
    if not 0 <= args.index < store.size(args.split):
        raise ConfigError(f"--index {args.index} is outside 0 .. {store.size(args.split) - 1} of the split {args.split!r}")
    if args.json:
        print_json(describe(store, args.split, args.index))
    else:
        show(store, args.split, args.index, console)


def _pack_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("store", type=str, help="folder that prepare made")
    parser.add_argument("out", type=str, help="file to write, such as ed.travel")


def _pack(args: Namespace, console: Terminal) -> None:
    from case_fast.data.travel import pack_store

    console.say(f"{args.out}: {pack_store(args.store, args.out) / 2**20:.1f} MiB")


def _unpack_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", type=str, help="file that pack made")
    parser.add_argument("out", type=str, help="folder to make, such as ed.store")


def _unpack(args: Namespace, console: Terminal) -> None:
    from case_fast.data.travel import unpack_store

    store = unpack_store(args.file, args.out)
    examples = ", ".join(f"{split} {store.size(split):,}" for split in store.splits)
    console.say(f"{store.path}: {examples} examples")


def _floors_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("store", type=str, help="folder that prepare made")
    parser.add_argument("--split", type=str, default="test", help="train, valid or test")
    parser.add_argument("--json", type=str | None, default=None, help="file to write them to as well")


def _floors(args: Namespace, console: Terminal) -> None:
    from case_fast.data import open_store
    from case_fast.evaluation.floors import floors, table

    store, path = open_store(args.store), require_file_place(args.json) if args.json else None
    found = floors(store, args.split)
    console.print(table(found))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found.as_dict())
        print_paths([args.json], console)


def _merge_cache_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("into", type=str, help="SQLite cache that grows; made if missing")
    parser.add_argument("caches", type=str, nargs="+", help="caches to read")


def _merge_cache(args: Namespace, console: Terminal) -> None:
    from case_fast.knowledge import InferenceCache

    for path in args.caches:
        require_file(path, "cache of inferences")
    require_file_place(args.into)
    with InferenceCache(args.into) as cache:
        for path in args.caches:
            console.say(f"{path}: {cache.merge(path):,} new inferences")
        console.say(f"{args.into}: {len(cache):,} inferences")


COMMANDS = {
    "prepare": Command(
        "Official files to a store: dialogues, inferences, concepts, both graphs, packed.",
        _prepare_arguments, _prepare),
    "import": Command(
        "What was released with CASE, CEM and their sisters to a store, read without running it; --check looks at it.",
        _import_arguments, _import),
    "inspect": Command(
        "Show one example: dialogue, sub-utterances, inferences, concepts, both graphs.",
        _inspect_arguments, _inspect),
    "pack": Command(
        "A store as one small file, for a machine without network.",
        _pack_arguments, _pack),
    "unpack": Command(
        "The store in such a file, byte for byte as it was.",
        _unpack_arguments, _unpack),
    "floors": Command(
        "What a bigram model and a linear classifier reach on a split: what every model has to beat.",
        _floors_arguments, _floors),
    "merge-cache": Command(
        "Add the inferences of other caches to one.",
        _merge_cache_arguments, _merge_cache),
}
