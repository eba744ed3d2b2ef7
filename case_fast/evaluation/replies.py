"""Replies that systems gave to dialogues, from files: ours, other people's, all in one form.

    read_replies(given) -> ReplyFile              one file; ``given``: [NAME=]PATH[#FIELD], see there
    read_all(given) -> list[ReplyFile]            several, with distinct names
    matched(first, other) -> list[(Reply, Reply)] replies of two files to the same context, in the first one's order

    ReplyFile  name, path, sha256, form, replies, report (a `ReadReport`: lines read, skipped and why)
    Reply      context, text, reference (turns and texts as a person writes them), words, reference_words, key, line

Files that are read, each known by what is in it, gzip too:

    predictions.jsonl     of `case-fast evaluate`; its folder, or a run that has been evaluated on "test"
    JSON lines            each with "context" (list of turns, or one turn) and "reply"; "reference" where there is one
    text blocks           of MoEL, EmpDG, KEMP, CEM, CASE: ``Context:[...]`` and then ``Pred:``, ``Greedy:``, ``Beam:`` or a name
                          of its own, and ``Ref:``, in any order

Every text goes through `detokenize(tokenize(text))`: spelling, case and blanks would tell one system from another, and change
what is counted.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from case_fast.data.text import detokenize, tokenize
from case_fast.errors import DataError
from case_fast.files import sha256
from case_fast.runs import Run
from case_fast.text_files import ReadReport, read_lines, reading, require_file

PREDICTIONS = "predictions.jsonl"
_EXPECTED = ('predictions.jsonl of case-fast evaluate, JSON lines with "context" and "reply", or blocks of lines Context:[...], '
             "Pred:..., Ref:...")
_FIELD = re.compile(r"([A-Za-z][\w+ ./-]{0,39}?)\s*:(.*)")
_ONE_OF = ("pred", "greedy", "beam")  # what a block calls its reply, taken in this order where it has several
# What else stands in the blocks of the five repositories: labels, words looked up, COMET's relations.
_NO_REPLY = re.compile(r"emotion|emotion_context|pred emotions|concept|situation|[xo]_?(?:intent|need|want|effect|react|attr)")
_PARTED = re.compile(r"(?<=\w)\s+(?=n't\b|'(?:s|re|ve|ll|d|m)\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Reply:
    """A reply and what it answers.

    Attributes:
        context: the turns, oldest first; text: the reply; reference: a person's reply, "" where the file has none.
        words, reference_words: the same as tokens of `tokenize`.
        key: of each turn its letters and digits, contractions written out: equal for the same context, however it is spelt.
        line: of the file, from 1.
        emotion, predicted: label of the dialogue and what the system took it for; nll: -log P of the reference by the system, all
            ``tokens`` of it together. Of predictions.jsonl alone; "" and None elsewhere.
    """

    context: tuple[str, ...]
    text: str
    reference: str
    words: tuple[str, ...]
    reference_words: tuple[str, ...]
    key: tuple[str, ...]
    line: int
    emotion: str = ""
    predicted: str = ""
    nll: float | None = None
    tokens: int = 0


@dataclass
class ReplyFile:
    """The replies of one system; ``form``: "predictions", "json lines" or "text blocks, FIELD"."""

    name: str
    path: Path
    sha256: str
    form: str
    replies: list[Reply]
    report: ReadReport


def read_all(given: Sequence[str]) -> list[ReplyFile]:
    """As `read_replies`, for several; of equal names the second becomes "NAME (2)"."""
    files, seen = [read_replies(item) for item in given], Counter()
    for file in files:
        seen[file.name] += 1
        if seen[file.name] > 1:
            file.name = f"{file.name} ({seen[file.name]})"
    return files


def read_replies(given: str | Path) -> ReplyFile:
    """Read ``[NAME=]PATH[#FIELD]``.

    Args:
        given: PATH is a file, the folder of an evaluation or a run. NAME: what to call the system, by default the run's, the
            folder's or the file's name. FIELD: which reply of text blocks that hold several, as in "generation_result.txt#MOE";
            by default ``Pred``, else ``Greedy``, else ``Beam``, else the only one there is.

    Raises:
        DataError: it is missing or has no usable reply; its blocks hold several replies and no FIELD chooses one.
    """
    with reading(given, "file of replies"):
        name, path, wanted = _parts(str(given))
        place, known = _located(path)
    report = ReadReport(str(place))
    replies, form = _read(place, report, wanted)
    report.rows = len(replies)
    report.require_rows(_EXPECTED)
    with reading(place, "file of replies"):
        return ReplyFile(name or known, place, sha256(place), form, replies, report)


def matched(first: ReplyFile, other: ReplyFile) -> list[tuple[Reply, Reply]]:
    """Pairs of replies to the same context, never by line; in the first file's order.

    A context that a file has several times is matched in order of appearance.
    """
    waiting: dict[tuple[str, ...], list[Reply]] = defaultdict(list)
    for reply in reversed(other.replies):
        waiting[reply.key].append(reply)
    return [(reply, waiting[reply.key].pop()) for reply in first.replies if waiting.get(reply.key)]


def context_key(turn: str) -> str:
    """What of a turn is the same in every repository's spelling: lower-cased letters and digits, contractions written out."""
    return "".join(sign for word in _words(turn) for sign in word if sign.isalnum())


# The same texts come again and again: in the contexts of later turns, in each file, as replies that systems repeat.
@lru_cache(maxsize=1 << 16)
def _words(text: str) -> tuple[str, ...]:
    """Tokens, also of a text that was cut into tokens before ("should n't"); an unknown word, <unk> or UNK, is one of them."""
    text = text.encode("utf-8", "replace").decode()  # JSON can hold halves of characters
    return tuple(tokenize(_PARTED.sub("", text.replace("<unk>", " unk "))))


@lru_cache(maxsize=1 << 16)
def _written(words: tuple[str, ...]) -> str:
    return detokenize(list(words))


def _reply(line: int, context: list[str], text: str, reference: Any, **facts: Any) -> Reply:
    words, reference_words = _words(text), _words(reference if isinstance(reference, str) else "")
    return Reply(tuple(map(_written, map(_words, context))), _written(words), _written(reference_words), words, reference_words,
                 tuple(map(context_key, context)), line, **facts)


# ---- where a file lies


def _parts(given: str) -> tuple[str, str, str]:
    """NAME, PATH and FIELD; a path that is there as it is given is taken whole."""
    if Path(given).exists():
        return "", given, ""
    name, equals, path = given.partition("=")
    if not equals:
        name, path = "", given
    if Path(path).exists():
        return name, path, ""
    before, mark, wanted = path.rpartition("#")
    return (name, before, wanted) if mark else (name, path, "")


def _located(given: str) -> tuple[Path, str]:
    """The file, and what to call its system."""
    path, remedy = Path(given), "Give a file of replies, the folder of an evaluation, or a run"
    if path.is_dir():
        if (run := Run(path)).begun:
            path, remedy = run.evaluation("test"), f"Make it with: case-fast evaluate {given} --data STORE"
        path /= PREDICTIONS
    path = require_file(path, "file of replies", remedy)
    if path.name != PREDICTIONS:
        return path, path.name.removesuffix(".gz").rpartition(".")[0] or path.name
    folder = path.resolve().parent  # RUN/evaluation/test, or a copy of it
    run = Run(folder.parent.parent)
    return path, (run.path if run.begun else folder).name


# ---- what is in a file

def _read(path: Path, report: ReadReport, wanted: str) -> tuple[list[Reply], str]:
    """The replies, and the form of the file."""
    lines = read_lines(path, report)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return [], ""
    everything = _again(first, lines)
    if not first[1].lstrip().startswith("{"):
        return _of_blocks(path, list(_blocks(everything, report)), report, wanted)
    if wanted:
        raise DataError(path, f"these are JSON lines, and #{wanted} chooses a reply of text blocks", "Leave it out")
    return list(_of_json(everything, report)), "predictions" if path.name == PREDICTIONS else "json lines"


def _again(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _of_json(lines: Iterator[tuple[int, str]], report: ReadReport) -> Iterator[Reply]:
    for number, line in lines:
        if not line.strip():
            report.ignored["empty line"] += 1
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            report.skip("no JSON", number)
            continue
        if not isinstance(found, dict):
            report.skip("no JSON object", number)
            continue
        context = found.get("context")
        turns = _turns([context] if isinstance(context, str) else context)
        text = found.get("reply")
        if turns is None:
            report.skip('no "context" of turns', number)
        elif not isinstance(text, str):
            report.skip('no "reply"', number)
        else:
            yield _reply(number, turns, text, found.get("reference"), **_facts(found))


def _facts(found: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation of ours adds."""
    facts = {name: found[name] for name in ("emotion", "predicted") if isinstance(found.get(name), str)}
    nll, tokens = found.get("nll"), found.get("tokens")
    known = type(nll) in (int, float) and type(tokens) is int and tokens > 0
    return facts | ({"nll": float(nll), "tokens": tokens} if known else {})


def _turns(value: Any) -> list[str] | None:
    """The turns of a context, of which each is a text or a list of words; None of anything else."""
    if not isinstance(value, (list, tuple)) or not value:
        return None
    turns = [" ".join(turn) if isinstance(turn, (list, tuple)) and all(isinstance(word, str) for word in turn) else turn
             for turn in value]
    return turns if all(isinstance(turn, str) for turn in turns) else None


Block = tuple[int, dict[str, str]]  # line of its context, fields by name in lower case


def _blocks(lines: Iterator[tuple[int, str]], report: ReadReport) -> Iterator[Block]:
    """Blocks of ``Name:value`` lines. A new one begins where emotion or context come again: some end with the reference,
    some with a rule or an empty line."""
    start, fields = 0, {}
    for number, line in lines:
        found = _FIELD.match(line)
        if found is None:
            report.ignored["line that is no field"] += 1
            continue
        name, value = found[1].lower(), found[2].strip()
        if "context" in fields and name in ("emotion", "context"):
            yield start, fields
            fields = {}
        if name == "context":
            start = number
        fields[name] = value
    if fields:
        yield start, fields


def _of_blocks(path: Path, blocks: list[Block], report: ReadReport, wanted: str) -> tuple[list[Reply], str]:
    field = _chosen(path, blocks, wanted)
    replies: list[Reply] = []
    for number, fields in blocks:
        turns = _literal(fields.get("context", ""))
        reference = fields.get("ref", fields.get("reference", ""))
        if turns is None:
            report.skip("block without Context:[...]", number)
        elif field not in fields:
            report.skip(f"block without {field or 'a reply'}", number)
        else:
            replies.append(_reply(number, turns, fields[field], reference))
    return replies, f"text blocks, {field}"


def _chosen(path: Path, blocks: list[Block], wanted: str) -> str:
    """The field that holds the replies."""
    counts = Counter(name for _, fields in blocks if "context" in fields for name in fields)
    names = [name for name in counts if name not in ("context", "ref", "reference") and not _NO_REPLY.fullmatch(name)]
    if wanted:
        if counts[wanted.lower()]:
            return wanted.lower()
        raise DataError(path, f"no block has {wanted}", f"There are {', '.join(names) or 'no replies'}")
    usual = [name for name in _ONE_OF if name in names]
    names = usual[:1] or [name for name in names if 2 * counts[name] >= len(blocks)]
    if len(names) > 1:
        raise DataError(path, f"its blocks hold the replies of {', '.join(names)}", f"Choose one: {path}#{names[0]}")
    return names[0] if names else ""


def _literal(text: str) -> list[str] | None:
    """The turns in what Python printed of a list."""
    try:
        return _turns(ast.literal_eval(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
