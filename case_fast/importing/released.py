"""What was released with CASE, CEM, MoEL, EmpDG and MIME, as material of a store.

    dataset_preproc.p                                       [train, dev, test, vocabulary]; a split: name of a field -> a list
    sys_{dialog,target,emotion,situation}_texts.SPLIT.npy   an array each, of texts as they were said

An example is an entry of each list: ``context``, the turns before the reply; ``target``, the reply; ``emotion``; ``situation``;
in CASE's ``context_role``, who says each turn (else they take turns, the speaker first). Texts are lists of words there.
``utt_cs`` holds what COMET inferred for the last turn of the speaker's: CASE's a dict of the text itself and of each relation,
CEM's five lists in the order of the relations; CASE's ``utt_cs_split`` the same of its sentences, a list of such dicts.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from case_fast.data.empathetic_dialogues import EMOTION_IDS, SPLITS, DialogueExample, Turn
from case_fast.data.prepare import Material
from case_fast.data.text import normalize_space
from case_fast.errors import DataError
from case_fast.importing.arrays import NPY, ArrayProblem, npy_header, plain_values
from case_fast.importing.pickles import read_pickle
from case_fast.knowledge.source import RELATIONS, clean_inferences, is_blank
from case_fast.text_files import ReadReport

Progress = Callable[[int, int], None]
PICKLE = "dataset_preproc.p"
_FILES = {"context": "dialog", "target": "target", "emotion": "emotion", "situation": "situation"}  # a field's name in .npy files
_READ = (*_FILES, "context_role", "utt_cs", "utt_cs_split")  # the fields that are read
_FIELDS_NAMED = 40  # of those that are not read
_SPLIT_NAMES = dict(zip(SPLITS, ("train", "dev", "test"), strict=True))  # as the releases call them
_SPEAKER, _LISTENER = {"seeker", "speaker"}, {"support", "supporter", "listener"}
# What the tokenizer of the releases parts from a word: "do n't" is "don't" again, which ours reads as it reads chat, and so is
# "don ’ t".
_PARTED = re.compile(r"(?<=\w) (?:(n't|'(?:s|m|d|ll|re|ve))|’ (t|s|m|d|ll|re|ve))(?!\S)")
_NOT_THE_DATA = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip archive", b"version https://git-lfs": "a pointer of Git LFS"}
_TEXTS_PER_BYTE, _TEXTS_ALLOWED = 64, 1 << 20  # characters of texts that a byte of the files may stand for; that any may
_PUBLISHED = "Get the files from where they were published, all of one version"
_FOLDER_REMEDY = f"Give {PICKLE}, or the folder with it or with the files sys_dialog_texts.train.npy and so on"


@dataclass
class SplitReport:
    """What was found in one split; ``report`` accounts for its examples."""

    report: ReadReport
    conversations: int = 0
    turns: int = 0
    sentences: int = 0
    with_inferences: int = 0


@dataclass
class Imported:
    """What a release holds: ``material`` for a store, and what there is to say about it.

    Attributes:
        layout: whose release it is like. size: bytes read. identity: content hash.
        relations: relation -> (inferences in the file, those kept).
        vocabulary: words of its vocabulary, None where it has none.
        missing: what a store needs and the files lack, in words.
    """

    path: Path
    layout: str
    size: int
    identity: str
    splits: dict[str, SplitReport]
    relations: dict[str, tuple[int, int]]
    vocabulary: int | None
    missing: list[str]
    material: Material


class _Unusable(ValueError):
    """Why an example is left out."""


def _whole(found: re.Match[str]) -> str:
    return found[1] or f"’{found[2]}"


@dataclass
class _Texts:
    """Texts out of what the files hold, in bounds: values may be shared, so that few bytes stand for endless texts."""

    left: int
    known: dict[str, str] = field(default_factory=dict)  # turns and inferences come again and again

    def of(self, value: Any, what: str) -> str:
        """The text of a list of words or of a text."""
        try:
            words = [value] if isinstance(value, str) else value
            if not isinstance(words, list):
                raise TypeError
            self.spend(1 + len(words) + sum(map(len, words)))
            text = " ".join(words).replace("_comma_", ",")
        except TypeError:
            raise _Unusable(f"{what} that is no list of words") from None
        text = normalize_space(text if isinstance(value, str) else _PARTED.sub(_whole, text))
        return self.known.setdefault(text, text)

    def required(self, value: Any, what: str) -> str:
        if not (text := self.of(value, what)):
            raise _Unusable(f"{what} that is empty")
        return text

    def spend(self, characters: int) -> None:
        self.left -= characters
        if self.left < 0:
            raise OverflowError


@dataclass
class _Knowledge:
    """The inferences of the files by text, and an account of each."""

    limit: int
    report: ReadReport
    of_text: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    said: dict[str, int] = field(default_factory=dict)  # text -> hash of all its inferences
    found: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)

    def add(self, text: str, inferences: list[list[str]], example: int) -> None:
        """The inferences of a text, a list for each of `RELATIONS`."""
        total = sum(map(len, inferences))
        self.report.read += total
        self.found.update({relation: len(texts) for relation, texts in zip(RELATIONS, inferences, strict=True)})
        whole = hash(tuple(map(tuple, inferences)))
        if text in self.of_text:
            if self.said[text] == whole:
                self.report.ignored["of a text that has them already"] += total
            elif total:
                self.report.skip("of a text that had others before, which stay", example)
                self.report.skipped["of a text that had others before, which stay"] += total - 1
            return
        self.said[text] = whole
        self.of_text[text] = {}
        for relation, texts in zip(RELATIONS, inferences, strict=True):
            distinct = clean_inferences(texts, len(texts))
            kept = self.of_text[text][relation] = distinct[: self.limit]
            blank = sum(map(is_blank, texts))
            self.kept[relation] += len(kept)
            self.report.rows += len(kept)
            for reason, count in (("none, or empty", blank), ("the same again", len(texts) - blank - len(distinct)),
                                  (f"beyond {self.limit} of a relation", len(distinct) - len(kept))):
                self.report.ignored.update({reason: count} if count else {})


def read_released(path: str | Path, limit: int, progress: Progress | None = None) -> Imported:
    """Read a release, from its pickle or the folder with its files.

    Args:
        limit: inferences kept of a text and relation. progress: told (bytes read, bytes in all).

    Raises:
        DataError: a file is missing, damaged, would do anything but hold data, or is no release; with file and byte or field.
    """
    path = Path(path)
    hashed = hashlib.sha256()
    if path.is_dir() and not (path / PICKLE).exists():
        found, size = _of_arrays(path, hashed, progress)
        vocabulary, notes = None, []
    else:
        file = path / PICKLE if path.is_dir() else path
        content = _content(file, hashed)
        if content.startswith(NPY):
            raise DataError(file, "one array of a release", f"Give the folder with all of them, {path.parent}")
        found, vocabulary = _of_pickle(read_pickle(content, str(file), progress=progress), file)
        size = len(content)
        notes = ["a store numbers its words itself, as they occur in its training part"]
        if file != path and any(path.glob("sys_*_texts.*.npy")):
            notes.append(f"the .npy files beside {PICKLE} were not read")
    return _imported(path, found, vocabulary, notes, size, f"imported:{hashed.hexdigest()[:32]}", limit)


def _content(path: Path, hashed: Any) -> bytes:
    if not path.is_file():
        raise DataError(path, "no such file" if not path.exists() else "neither a file nor a folder", _FOLDER_REMEDY)
    try:
        content = path.read_bytes()
    except (OSError, MemoryError) as error:
        problem = f"cannot be read ({error or 'too large for memory'})"
        raise DataError(path, problem, "Check its permissions and the machine's memory") from error
    for magic, kind in _NOT_THE_DATA.items():
        if content.startswith(magic):
            raise DataError(path, f"{kind}, not the data themselves", "Unpack it, or fetch what it stands for, first")
    hashed.update(content)
    return content


def _of_arrays(folder: Path, hashed: Any, progress: Progress | None) -> tuple[dict[str, dict[str, Any]], int]:
    """The fields of each split of which there are files, and their bytes."""
    places = {(split, name): folder / f"sys_{of_file}_texts.{_SPLIT_NAMES[split]}.npy"
              for split in SPLITS for name, of_file in _FILES.items()}
    there = {key: place for key, place in places.items() if place.is_file()}
    if not there:
        raise DataError(folder, "a folder without the files of a release", _FOLDER_REMEDY)
    found: dict[str, dict[str, Any]] = {}
    size, total = 0, sum(place.stat().st_size for place in there.values())
    for (split, name), place in there.items():
        content = _content(place, hashed)
        found.setdefault(split, {})[name] = read_array(content, str(place))
        size += len(content)
        if progress:
            progress(size, total)
    return found, size


def read_array(content: bytes, path: str) -> list:
    """The values of a ``.npy`` file, those of an array of objects by `read_pickle`.

    Raises:
        DataError: as of `read_pickle`, or it is no array.
    """
    try:
        start, code, order, shape, layout = npy_header(content)
        if code.startswith("O"):
            values = read_pickle(content, path, start)
            if not isinstance(values, list) or (shape[0] if shape else 1) != len(values):
                raise ArrayProblem("values that do not fit the header's shape")
            return values
        return plain_values(content[start:], code, order, shape, layout)
    except ArrayProblem as problem:
        raise DataError(path, str(problem), "Download it again") from None


def _of_pickle(data: Any, path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The fields of each split, and the number of words in the vocabulary."""
    remedy = "Give the file that the release's own code wrote, [train, dev, test, vocabulary]"
    if not isinstance(data, list | tuple) or len(data) != 4 or not all(isinstance(part, dict) for part in data):
        kind = type(data).__name__.removeprefix("Data").lower()
        held = f"a {kind} of {len(data):,}" if isinstance(data, list | tuple | dict) else f"a value of type {kind}"
        raise DataError(path, f"no release: {held} in place of three splits and a vocabulary", remedy)
    words = data[3].get("word2index")
    if not isinstance(words, dict):
        raise DataError(path, "no release: the fourth part has no word2index, so it is no vocabulary", remedy)
    # what is not read is let go: CASE's concepts and VAD vectors are most of its file
    splits = [{name: values if name in _READ else None for name, values in split.items()} for split in data[:3]]
    return dict(zip(SPLITS, splits, strict=True)), len(words)


# ---- the examples


def _imported(path: Path, found: dict[str, dict[str, Any]], vocabulary: int | None, notes: list[str], size: int, identity: str,
              limit: int) -> Imported:
    texts = _Texts(_TEXTS_ALLOWED + _TEXTS_PER_BYTE * size)
    knowledge = _Knowledge(limit, ReadReport(f"{path}, inferences", unit="inference"))
    splits: dict[str, SplitReport] = {}
    examples: dict[str, list[DialogueExample]] = {}
    train_turns: list[str] = []
    for split, fields in found.items():
        splits[split] = SplitReport(ReadReport(f"{path}, {_SPLIT_NAMES[split]}", unit="example"))
        columns = _columns(path, _SPLIT_NAMES[split], fields)
        try:
            rows = list(_rows(columns, splits[split], texts, knowledge))
        except OverflowError:
            problem = f"more text than {_TEXTS_PER_BYTE} characters for each byte of the file, by the same values again and again"
            raise DataError(path, f"{_SPLIT_NAMES[split]}: {problem}", _PUBLISHED) from None
        examples[split], ends = _joined(rows, split)
        splits[split].conversations = len(ends)
        splits[split].turns = sum(len(example.context) + 1 for example in ends)
        if split == "train":
            train_turns = [text for example in ends for text in (*(turn.text for turn in example.context), example.response)]
    reports = [splits[split].report for split in splits]
    reports += [report for report in (_field_report(path, found), knowledge.report) if report.read]
    if vocabulary is not None:
        reports.append(ReadReport(f"{path}, vocabulary", unit="word", read=vocabulary, notes=notes))
        reports[-1].ignored["numbered anew"] = vocabulary
    known = knowledge.of_text
    material = Material(examples, {split: splits[split].conversations for split in splits}, train_turns, reports, known,
                        identity if known else "")
    relations = {name: (knowledge.found[name], knowledge.kept[name]) for name in RELATIONS}
    missing = _missing(found, known, splits)
    return Imported(path, _layout(found), size, identity, splits, relations, vocabulary, missing, material)


def _layout(found: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(iter(found.values()))
    if "utt_cs_split" in first:
        return "a pickle as of CASE, with inferences for utterances and their sentences"
    if "utt_cs" in first:
        return "a pickle as of CEM, with inferences for utterances"
    return "dialogues without inferences, as of MoEL, EmpDG and MIME"


def _columns(path: Path, split: str, fields: Mapping[str, Any]) -> dict[str, list]:
    """The fields that are read, each a list of one length."""
    columns = {name: fields[name] for name in _READ if name in fields}
    for name in ("context", "target", "emotion"):
        if name not in columns:
            raise DataError(path, f"{split} has no field {name!r}", _FOLDER_REMEDY)
    for name, values in columns.items():
        if not isinstance(values, list):
            raise DataError(path, f"{split}, field {name!r}: no list", _PUBLISHED)
        if len(values) != len(columns["context"]):
            problem = f"{len(values):,} entries, and {len(columns['context']):,} of 'context'"
            raise DataError(path, f"{split}, field {name!r}: {problem}", _PUBLISHED)
    return columns


def _rows(columns: Mapping[str, list], found: SplitReport, texts: _Texts, knowledge: _Knowledge
          ) -> Iterator[tuple[int, DialogueExample]]:
    """The examples that can be used, with their places in the file; the others are counted with their reasons."""
    for place, values in enumerate(zip(*columns.values(), strict=True)):
        row = dict(zip(columns, values, strict=True))
        found.report.read += 1
        try:
            context = _context(row, texts)
            emotion = row["emotion"].strip().lower() if isinstance(row["emotion"], str) else None
            if emotion not in EMOTION_IDS:
                raise _Unusable("an emotion that is none of the 32 of EmpatheticDialogues")
            cut, inferences = _inferences(row, context, texts)
            example = DialogueExample("", context, texts.required(row["target"], "a reply"), emotion,
                                      texts.of(row.get("situation", ""), "a situation"), "", cut)
        except _Unusable as problem:
            found.report.skip(str(problem), place)
            continue
        for text, of_relations in inferences:
            knowledge.add(text, of_relations, place)
        found.report.rows += 1
        found.sentences += max(0, len(cut) - 1)
        found.with_inferences += any(any(of_relations) for _, of_relations in inferences)
        yield place, example


def _context(row: Mapping[str, Any], texts: _Texts) -> tuple[Turn, ...]:
    turns, roles = row["context"], row.get("context_role")
    if not isinstance(turns, list) or not turns:
        raise _Unusable("a context that is no list of turns")
    texts.spend(len(turns))
    if roles is None:
        if len(turns) % 2 == 0:
            raise _Unusable("a context after which it is the speaker's turn")
        speaking = [place % 2 == 0 for place in range(len(turns))]
    else:
        if not isinstance(roles, list) or len(roles) != len(turns) or not all(
                isinstance(role, str) and role in _SPEAKER | _LISTENER for role in roles):
            raise _Unusable("roles that do not fit the turns")
        speaking = [role in _SPEAKER for role in roles]
        if True not in speaking:
            raise _Unusable("a context without a turn of the speaker's")
    return tuple(Turn(texts.required(turn, "a turn"), by_speaker) for turn, by_speaker in zip(turns, speaking, strict=True))


def _inferences(row: Mapping[str, Any], context: tuple[Turn, ...], texts: _Texts
                ) -> tuple[tuple[str, ...], list[tuple[str, list[list[str]]]]]:
    """How the last turn of the speaker's was cut, () where nothing tells; and texts with their inferences by relation."""
    if "utt_cs" not in row:
        return (), []
    said = next(turn.text for turn in reversed(context) if turn.by_speaker)
    whole = _of_relations(row["utt_cs"], texts)
    if isinstance(row["utt_cs"], dict) and texts.of(row["utt_cs"].get("uttr"), "an utterance") != said:
        raise _Unusable("inferences of another utterance than the speaker's last one")
    parts = row.get("utt_cs_split", [])
    texts.spend(len(parts) if isinstance(parts, list) else 0)
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise _Unusable("sentences that are no list of dicts")
    sentences = [(texts.required(part.get("uttr"), "a sentence"), _of_relations(part, texts)) for part in parts]
    cut = (said, *(text for text, _ in sentences)) if sentences else ()
    return cut, [(said, whole), *sentences]


def _of_relations(value: Any, texts: _Texts) -> list[list[str]]:
    """The inferences of each of `RELATIONS`."""
    lists = [value.get(relation, []) for relation in RELATIONS] if isinstance(value, dict) else value
    if not isinstance(lists, list) or len(lists) != len(RELATIONS) or not all(isinstance(found, list) for found in lists):
        raise _Unusable("inferences that are no list for each relation")
    return [[texts.of(text, "an inference") for text in found] for found in lists]


def _joined(rows: list[tuple[int, DialogueExample]], split: str) -> tuple[list[DialogueExample], list[DialogueExample]]:
    """The examples with their conversations, told by contexts that go on where an example ends; and the last example of each.

    An example's id is its conversation's, the place of the first example of it, and the number of its turn; its feedback is what
    the speaker says next.
    """
    def key(example: DialogueExample, turns: Iterable[str]) -> tuple[str, ...]:
        return (example.emotion, example.situation, *turns)

    goes_on: dict[int, int] = {}  # hash of all before an example's last turn -> its place
    hashes = []
    for place, (_, example) in enumerate(rows):
        before = tuple(turn.text for turn in example.context)
        hashes.append((hash(key(example, before[:-1])), hash(key(example, (*before, example.response)))))
        if len(before) > 1:
            goes_on.setdefault(hashes[-1][0], place)
    follower = [goes_on.get(after) for _, after in hashes]
    first = {place: place for place in range(len(rows))}
    for place in sorted(first, key=lambda place: len(rows[place][1].context)):
        if (after := follower[place]) is not None:
            first[after] = first[place]
    joined, ends = [], []
    for place, (_, example) in enumerate(rows):
        after = follower[place]
        said = rows[after][1].context[-1] if after is not None else None
        joined.append(replace(
            example, id=f"{_SPLIT_NAMES[split]}{rows[first[place]][0]}#{len(example.context) + 1}",
            feedback=said.text if said is not None and said.by_speaker else ""))
        if after is None:
            ends.append(joined[-1])
    return joined, ends


# ---- what there is to say


def _field_report(path: Path, found: Mapping[str, Mapping[str, Any]]) -> ReadReport:
    """The fields that are not read, such as CASE's concepts, which a store takes from ConceptNet and NRC-VAD."""
    report = ReadReport(f"{path}, fields", unit="field")
    names = {ascii(name).strip("'")[:40] for fields in found.values() for name in fields}  # no control codes on a terminal
    others = sorted(names - set(_READ))
    report.read, report.rows = len(names), len(names) - len(others)
    report.ignored.update({name: 1 for name in others[:_FIELDS_NAMED]})
    if len(others) > _FIELDS_NAMED:
        report.ignored["further ones"] = len(others) - _FIELDS_NAMED
    return report


def _missing(found: Mapping[str, Any], known: Mapping[str, Any], splits: Mapping[str, SplitReport]) -> list[str]:
    missing = [f"the split {_SPLIT_NAMES[split]}" for split in SPLITS if split not in found]
    missing += [f"a usable example in {_SPLIT_NAMES[split]}" for split, of_split in splits.items() if not of_split.report.rows]
    if found and "situation" not in next(iter(found.values())):
        missing.append("situations")
    if not known:
        missing.append("inferences: --knowledge says where they come from")
    elif not any(of_split.sentences for of_split in splits.values()):
        missing.append("inferences for sentences: with --knowledge they are inferred, else the utterance alone has some")
    return [*missing, "concepts and intensities: --conceptnet and --lexicon say where they come from"]
