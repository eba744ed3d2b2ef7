"""Checks of the official data: what a file is, by which reader finds rows in its first lines; nothing is told by its name."""

from __future__ import annotations

import importlib.util
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from case_fast.doctor.check import Finding, command, counted, fail, ok, raised, size, skip, warn
from case_fast.errors import DataError

if TYPE_CHECKING:
    from case_fast.text_files import ReadReport

_LINES = 2_000  # of a file, which are read
_CONVERSATIONS = 100
_FILES = 100  # of a folder that is searched
_SOUND = 0.02  # at most such a share of the rows may be malformed; in the released files it is less


@dataclass(frozen=True)
class Source:
    """A data set: the option of `prepare` that takes it, its licence, where it is published, and a line that gets or shows it."""

    option: str
    licence: str
    published: str
    get: str
    needed: bool = True


def _fetch(url: str) -> str:
    return f"curl -LO {url}"


_COMET = "github.com/allenai/comet-atomic-2020"
SOURCES = {
    "EmpatheticDialogues": Source("dialogues", "CC BY-NC 4.0", "github.com/facebookresearch/EmpatheticDialogues", _fetch(
        "https://dl.fbaipublicfiles.com/parlai/empatheticdialogues/empatheticdialogues.tar.gz")),
    "ATOMIC": Source("knowledge", "CC BY 4.0", _COMET, f"python -m webbrowser https://{_COMET}"),
    "COMET": Source("knowledge", "licence on its page", _COMET, f"python -m webbrowser https://{_COMET}"),
    "ConceptNet": Source("conceptnet", "CC BY-SA 4.0", "github.com/commonsense/conceptnet5/wiki/Downloads", _fetch(
        "https://s3.amazonaws.com/conceptnet/downloads/2019/edges/conceptnet-assertions-5.7.0.csv.gz")),
    "NRC-VAD": Source("lexicon", "research use, not to be passed on", "saifmohammad.com/WebPages/nrc-vad.html",
                      "python -m webbrowser https://saifmohammad.com/WebPages/nrc-vad.html"),
    "NRC EmoLex": Source("emotion_words", "research use, not to be passed on", "saifmohammad.com/WebPages/lexicons.html",
                         "python -m webbrowser https://saifmohammad.com/WebPages/lexicons.html", needed=False),
    "GloVe": Source("embeddings", "licence on its page", "nlp.stanford.edu/projects/glove",
                    _fetch("https://nlp.stanford.edu/data/glove.6B.zip"), needed=False),
}
_MARKS = {  # the first bytes of what is no data set -> what it is, and a line for it
    b"SQLite format 3\0": ("a cache of inferences, which is checked as it is opened", "case-fast merge-cache new.sqlite {file}"),
    b"case_fast travel": ("a packed store, every byte of which is checked as it is unpacked",
                          "case-fast unpack {file} unpacked.store"),
    b"\x80": ("a pickle, perhaps of a release", "case-fast import {file} --check"),
    b"conv_id": ("a part of EmpatheticDialogues, which is read as a folder", "case-fast doctor {folder}"),
}


def look(path: Path) -> Iterator[tuple[Path, str, Finding]]:
    """What a file or folder of data is, a name of `SOURCES`, and how it is; else "missing", "damaged", "other" or "unknown".

    A folder that is no data set itself is searched for those that lie in it, and so are the folders in it.
    """
    kind = _folder(path) if path.is_dir() else ""
    if kind or not path.is_dir():
        yield path, *_looked_at(path, kind)
        return
    inside, known = list(islice(_inside(path), _FILES + 1)), 0
    for place, kind in inside[:_FILES]:
        kind, finding = _looked_at(place, kind)
        if kind not in ("other", "unknown"):
            known += 1
            yield place, kind, finding
    if len(inside) > _FILES:
        yield path, "other", skip(f"{path}: only the first {_FILES} files in this folder were looked at",
                                  command("case-fast", "doctor", f"{path}/FILE"))
    elif not known:
        yield path, "unknown", fail(f"{path}: nothing in this folder is read; read are {', '.join(SOURCES)}", command("ls", path))


def _inside(folder: Path, depth: int = 2) -> Iterator[tuple[Path, str]]:
    """Files and folders of data sets, with what is known of them, in a folder and in those in it."""
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith("."):
            kind = _folder(entry) if entry.is_dir() else ""
            if kind or not entry.is_dir():
                yield entry, kind
            elif depth > 1:
                yield from _inside(entry, depth - 1)


def _folder(folder: Path) -> str:
    """Which data set a folder is; "" where it is none."""
    names = {path.name.removesuffix(".gz") for path in folder.iterdir()}
    if names & {"train.csv", "valid.csv", "test.csv"}:
        return "EmpatheticDialogues"
    if "config.json" in names:
        return "COMET"
    return "ATOMIC" if any(name.endswith(".tsv") or name.startswith("v4_atomic") for name in names) else ""


def _looked_at(path: Path, kind: str) -> tuple[str, Finding]:
    """kind: of a folder, which is known already."""
    remedy = command("ls", "-l", path)
    try:
        if not kind:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                return "unknown", fail(f"{path}: neither a file nor a folder", remedy)
            with open(path, "rb") as stream:
                first = stream.read(16)
            if not first:
                return "damaged", fail(f"{path}: an empty file", remedy)
            for mark, (what, line) in _MARKS.items():
                if first.startswith(mark):
                    return "other", skip(f"{path}: {what}", line.format(file=command(path), folder=command(path.parent)))
            if not tarfile.is_tarfile(path):
                return _text(path)
            kind = "EmpatheticDialogues"
        remedy = SOURCES[kind].get
        return kind, _READERS[kind](path)
    except FileNotFoundError:
        return "missing", fail(f"{path}: not found", command("ls", path.parent))
    except Exception as error:
        return kind or "damaged", raised(error, remedy)


def _text(file: Path) -> tuple[str, Finding]:
    """A file of text, by the first reader that takes its rows; that of ATOMIC comes last, since it needs scikit-learn."""
    problems = set()
    for kind in ("ConceptNet", "NRC-VAD", "NRC EmoLex", "GloVe", "ATOMIC"):
        try:
            return kind, _READERS[kind](file)
        except DataError as error:
            problems.add(str(error))
    if len(problems) == 1:  # of the file, then, and not of its rows
        return "damaged", fail(problems.pop().rstrip("."), command("ls", "-l", file))
    return "unknown", fail(f"{file}: no reader takes its first {_LINES:,} lines; read are {', '.join(SOURCES)}",
                           command("head", "-n", "3", file))


def _dialogues(path: Path) -> Finding:
    from case_fast.data.empathetic_dialogues import SPLITS, read_conversations

    reports = [read_conversations(path, split, _CONVERSATIONS)[1] for split in SPLITS]
    rows = ", ".join(f"{split} {report.rows:,}" for split, report in zip(SPLITS, reports, strict=True))
    return _judged("EmpatheticDialogues", path, reports, f"{rows} rows, of the first {_CONVERSATIONS} conversations each")


def _atomic(path: Path) -> Finding:
    from case_fast.knowledge import open_source
    from case_fast.text_files import first_lines

    with first_lines(_LINES):
        return _judged("ATOMIC", path, open_source(f"atomic:{path}").reports)


def _comet(folder: Path) -> Finding:
    from safetensors import safe_open

    from case_fast.knowledge.comet import weight_files

    files = weight_files(folder)
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="numpy"):  # checks lengths and places of all arrays
                pass
        elif not zipfile.is_zipfile(file):
            raise DataError(file, "damaged or cut short: no file that torch.save wrote")
    if importlib.util.find_spec("transformers") is None:  # found, not imported: that takes seconds
        return fail(f"{folder}: COMET needs transformers, which is not installed", "pip install 'case_fast[comet]'")
    whole = sum(file.stat().st_size for file in files)
    return ok(f"{folder}: config, tokenizer and {size(whole)} of weights, not loaded; {_origin('COMET')}")


def _conceptnet(path: Path) -> Finding:
    from case_fast.knowledge.conceptnet import read_concepts
    from case_fast.text_files import first_lines

    with first_lines(_LINES):
        _, report = read_concepts(path, _Any(), lambda word: 1.0, frozenset())
    return _judged("ConceptNet", path, [report])


def _lexicon(path: Path) -> Finding:
    from case_fast.knowledge.lexicon import VADLexicon
    from case_fast.text_files import first_lines

    with first_lines(_LINES):
        report = VADLexicon.read(path).report
    return _judged("NRC-VAD", path, [report])


def _emotion_words(path: Path) -> Finding:
    from case_fast.knowledge.lexicon import read_emotion_words
    from case_fast.text_files import first_lines

    with first_lines(_LINES):
        _, report = read_emotion_words(path)
    return _judged("NRC EmoLex", path, [report])


def _glove(path: Path) -> Finding:
    from case_fast.data.embeddings import read_glove
    from case_fast.models import CASEConfig
    from case_fast.text_files import first_lines

    with first_lines(_LINES):
        _, vectors, report = read_glove(path, _Any())
    width, model = vectors.shape[1], CASEConfig().d_model
    found = _judged("GloVe", path, [report], more=f"{width} numbers a word")
    if found.state == "ok" and width != model:
        return warn(f"{found.reason}; the model's width is {model} where nothing else is said",
                    f"case-fast train --data ed.store --out ed.run --model.d_model {width}")
    return found


_READERS: dict[str, Callable[[Path], Finding]] = {
    "EmpatheticDialogues": _dialogues, "ATOMIC": _atomic, "COMET": _comet, "ConceptNet": _conceptnet, "NRC-VAD": _lexicon,
    "NRC EmoLex": _emotion_words, "GloVe": _glove,
}


class _Any:
    """A vocabulary of all words, each of which gets its number as it is asked for."""

    def __init__(self) -> None:
        self.ids = self
        self._numbers: dict[str, int] = {}

    def __contains__(self, word: object) -> bool:
        return True

    def get(self, word: str) -> int:
        return self._numbers.setdefault(word, len(self._numbers))


def _judged(kind: str, path: Path, reports: list[ReadReport], text: str = "", more: str = "") -> Finding:
    """How a sample was read: sound where hardly a row is malformed.

    Raises:
        DataError: most are, so it is something else.
    """
    read, rows = (sum(getattr(report, name) for report in reports) for name in ("read", "rows"))
    bad, unneeded = (sum(getattr(report, name).total() for report in reports) for name in ("skipped", "ignored"))
    parts = [text or f"{rows:,} rows in the first {counted(read, 'line')}" + f", {unneeded:,} not needed" * bool(unneeded), more]
    parts += dict.fromkeys(note for report in reports for note in report.notes)
    if bad:
        report = max(reports, key=lambda report: report.skipped.total())
        reason, count = report.skipped.most_common(1)[0]
        parts.append(f"{bad:,} malformed ({reason}: {count:,}, the first in line {report.lines[reason][0]} of {report.path})")
    if 2 * bad > read:
        raise DataError(path, parts[-1])
    text = "; ".join([f"{path}: {parts[0]}", *filter(None, parts[1:]), _origin(kind)])
    return ok(text) if bad <= _SOUND * read else warn(text, SOURCES[kind].get)


def _origin(kind: str) -> str:
    return f"{SOURCES[kind].licence}; {SOURCES[kind].published}"


def missing(found: Iterable[str]) -> dict[str, Source]:
    """The data sets of which none was found; COMET stands for ATOMIC."""
    options = {SOURCES[kind].option for kind in found}
    return {name: source for name, source in SOURCES.items()
            if source.option not in options and name not in ("COMET", "NRC EmoLex")}


def absent(name: str) -> Finding:
    """What is said of a data set that was not given."""
    use = {"ATOMIC": ", nor COMET", "GloVe": ", and not needed: word vectors begin at random without it"}.get(name, "")
    return skip(f"not given{use}; {_origin(name)}", SOURCES[name].get)
