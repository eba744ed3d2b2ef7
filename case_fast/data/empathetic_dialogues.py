"""Strict reader of EmpatheticDialogues as officially released (Rashkin et al., 2019)."""

from __future__ import annotations

import csv
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import BinaryIO, NamedTuple

from case_fast.data.text import normalize_space
from case_fast.errors import DataError
from case_fast.text_files import ReadReport, read_lines, unpacked

SPLITS = ("train", "valid", "test")
EMOTIONS = (
    "afraid", "angry", "annoyed", "anticipating", "anxious", "apprehensive", "ashamed", "caring", "confident", "content",
    "devastated", "disappointed", "disgusted", "embarrassed", "excited", "faithful", "furious", "grateful", "guilty",
    "hopeful", "impressed", "jealous", "joyful", "lonely", "nostalgic", "prepared", "proud", "sad", "sentimental",
    "surprised", "terrified", "trusting",
)
EMOTION_IDS = {emotion: index for index, emotion in enumerate(EMOTIONS)}
COLUMNS = ("conv_id", "utterance_idx", "context", "prompt", "speaker_idx", "utterance", "selfeval", "tags")
_SPOILED = "in a conversation with a missing or malformed turn"
_ONE_SIDED = "in a conversation of one author"
# ratings from 1 to 5 of both people, such as 5|5|5_4|5|5
_SELF_EVALUATION = re.compile(r"((\d?|NA|nan)([|_](\d?|NA|nan))+)?", re.ASCII)
_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError, MemoryError, RecursionError)


@dataclass(frozen=True, slots=True)
class Turn:
    text: str
    by_speaker: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    id: str
    emotion: str
    situation: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class DialogueExample:
    """One listener turn: all turns before it (oldest first, the first one the speaker's), the turn itself, and what the speaker
    says right after it, "" where nothing follows, or another turn of the listener's. ``sub_utterances``: u_0 .. u_t of the last
    speaker turn where who made the data has cut it already."""

    id: str
    context: tuple[Turn, ...]
    response: str
    emotion: str
    situation: str
    feedback: str = ""
    sub_utterances: tuple[str, ...] = ()


@contextmanager
def _open_split(source: Path, split: str) -> Iterator[tuple[str, BinaryIO | None]]:
    """The name to report and, for a member of an archive, its stream."""
    if source.is_dir():
        candidates = [p for p in (source / f"{split}.csv", source / f"{split}.csv.gz") if p.is_file()]
        if not candidates:
            raise DataError(source / f"{split}.csv", "file of the split not found",
                            "Give the folder (or .tar.gz) that holds train.csv, valid.csv and test.csv")
        yield str(candidates[0]), None
    elif not source.is_file():
        raise DataError(source, "dialogues not found", "Give the folder (or .tar.gz) of the EmpatheticDialogues release")
    else:
        with ExitStack() as stack:
            try:
                # one layer of gzip or none: no other compression is guessed, which would open the door to more decoders
                packed = unpacked(stack.enter_context(open(source, "rb")))
                archive = stack.enter_context(tarfile.open(fileobj=packed, mode="r:"))
                member = _find_member(archive, f"{split}.csv")
                stream = stack.enter_context(archive.extractfile(member)) if member else None
            except _DAMAGE as error:
                raise DataError(source, f"neither a folder nor a sound .tar.gz ({str(error) or type(error).__name__})",
                                "Give the folder that holds train.csv, valid.csv and test.csv, or the release as it is downloaded"
                                ) from error
            if stream is None:
                raise DataError(source, f"the archive holds no {split}.csv", "Give the official release")
            yield f"{source}/{member.name}", stream


def _find_member(archive: tarfile.TarFile, name: str) -> tarfile.TarInfo | None:
    """The first regular file of that name, in whatever folder of the archive; nothing is unpacked to the disk."""
    for member in archive:
        if member.size < 0:  # would send the walk back to where it was
            raise tarfile.TarError("a member of negative size")
        # a sparse member may claim any size without a byte behind it
        if member.isreg() and not member.issparse() and Path(member.name).name == name:
            return member
    return None


def read_conversations(source: str | Path, split: str, limit: int | None = None) -> tuple[list[Conversation], ReadReport]:
    """Read one split from a folder of CSV files or from the released ``.tar.gz``.

    The release is no quoted CSV: a row is split on commas into eight fields, or nine (the ninth, retrieval candidates, is
    ignored), and ``_comma_`` stands for a comma in a text. A file that was written again as quoted CSV is read too. The
    speaker is the author of the first turn; rows of a conversation are ordered by their turn number, from 1, or from 0 where
    most conversations of the file start there.

    Every line of the file is counted in the report, as a row of a conversation or with the reason why it is none. A
    malformed row spoils its conversation: what answers what in the rest of it is not known. A conversation in which nobody
    answers is left out.

    Args:
        limit: read at most this many conversations.

    Raises:
        DataError: a missing or damaged file, a wrong header, or no conversation with an answer; with file and line.
    """
    rows: dict[str, list[_Row]] = {}
    spoiled: set[str] = set()
    with _open_split(Path(source), split) as (name, stream):
        report = ReadReport(name)
        lines = read_lines(name, report, stream)
        _, header = next(lines, (1, ""))
        quoted = header.startswith('"')
        columns = tuple(_fields(header, quoted))
        if columns[:8] != COLUMNS or len(columns) > 9:
            raise DataError(name, "the header is not that of EmpatheticDialogues", f"Expected {','.join(COLUMNS)}", 1)
        report.ignored["header"] += 1
        candidates = len(columns) == 9
        empty_ninth: list[tuple[str, int]] = []
        for number, line in lines:
            fields = _fields(line, quoted)
            key = fields[0].strip() if fields else ""
            if problem := _row_problem(fields):
                report.skip(problem, number)
                spoiled.add(key)
                continue
            if limit is not None and key not in rows and len(rows) >= limit:
                report.ignored["beyond the limit, where reading ends"] += 1
                break  # a conversation's rows are contiguous in the release
            _, turn, emotion, situation, speaker, text, _, _, *ninth = fields
            candidates = candidates or any(ninth)
            if ninth == [""]:
                empty_ninth.append((key, number))
            rows.setdefault(key, []).append(_Row(int(turn), number, intern(emotion), situation, speaker.strip(), text))
    if not candidates:  # then the empty ninth field comes of a comma at the end of a text
        numbers = {number for _, number in empty_ninth}
        for number in sorted(numbers):
            report.skip("empty ninth field (is there a comma in a text?)", number)
        for key in {key for key, _ in empty_ninth}:
            spoiled.add(key)
            rows[key] = [row for row in rows[key] if row.line not in numbers]
    starts = Counter(min(row.turn for row in found) for found in rows.values() if found)
    first_turn = 0 if starts[0] > starts[1] else 1
    if first_turn == 0:
        report.notes.append("turns numbered from 0")
    # popped one by one: rows and conversations together would double the memory
    conversations = [c for key in list(rows) if (c := _conversation(key, rows.pop(key), first_turn, key in spoiled, report))]
    report.require_rows(f"conversations of at least two people, in rows with the columns {','.join(COLUMNS)}")
    return conversations, report


class _Row(NamedTuple):
    """What is kept of a row until all rows of its conversation are known."""

    turn: int
    line: int
    emotion: str
    situation: str
    speaker: str
    text: str


def _fields(line: str, quoted: bool) -> list[str]:
    """The fields of a row; none where the quotes of a file that is ``quoted`` throughout do not close.

    In the release a quote is text. A writer of CSV puts quotes around a text that holds a comma, which would make too many
    fields, or a quote, which it doubles.
    """
    bare = line.split(",")
    if '"' not in line or not (quoted or '""' in line or _row_problem(bare)):
        return bare
    try:
        parsed = next(csv.reader([line], strict=True), [])
    except csv.Error:
        parsed = []
    return parsed if quoted or not _row_problem(parsed) else bare


def _row_problem(fields: list[str]) -> str | None:
    if len(fields) == 1 and not fields[0].strip():
        return "empty line"
    if len(fields) not in (8, 9):
        return "not 8 or 9 fields"
    if not fields[0].strip():
        return "no conv_id"
    if not (_is_number(fields[1]) and len(fields[1]) < 10):
        return "utterance_idx is not a whole number"
    if fields[2] not in EMOTION_IDS:
        return "unknown emotion"
    if not normalize_space(fields[5]):
        return "empty utterance"
    if not _is_number(fields[4].strip()):
        return "speaker_idx is not a whole number"
    if not _SELF_EVALUATION.fullmatch(fields[6].strip()):
        return "selfeval holds no ratings (is there a comma in a text?)"
    if " " in fields[7].strip():
        return "tags hold a text (is there a comma in a text?)"
    return None


def _is_number(field: str) -> bool:
    return field.isascii() and field.isdigit()


def _text(field: str) -> str:
    return normalize_space(field.replace("_comma_", ","))


def _conversation(key: str, rows: list[_Row], first_turn: int, spoiled: bool, report: ReadReport) -> Conversation | None:
    """The conversation of the rows; None where they are none, which is counted for each of them. ``spoiled``: more of its rows
    were malformed and are counted."""
    rows.sort(key=lambda row: row.turn)
    blamed = None if spoiled else _first_misfit(rows, first_turn)
    if blamed is not None:
        line, problem = blamed
        for row in rows:
            report.skip(problem if row.line == line else _SPOILED, row.line)
    elif spoiled or all(row.speaker == rows[0].speaker for row in rows):
        for row in rows:
            report.skip(_SPOILED if spoiled else _ONE_SIDED, row.line)
    else:
        report.rows += len(rows)
        turns = tuple(Turn(_text(row.text), row.speaker == rows[0].speaker) for row in rows)
        return Conversation(key, rows[0].emotion, _text(rows[0].situation), turns)
    return None


def _first_misfit(rows: list[_Row], first_turn: int) -> tuple[int, str] | None:
    """(line, problem) of the first row, by turn number, that does not fit those before it; None where all fit."""
    for turn, row in enumerate(rows, start=first_turn):
        if row.turn < first_turn:
            return row.line, f"turn number below {first_turn}, where those of the file start"
        if row.turn < turn:
            return row.line, "turn number occurs twice"
        if row.turn > turn:
            return row.line, _SPOILED  # no row is to blame for the turn that is missing
        if row.emotion != rows[0].emotion:
            return row.line, "emotion differs within its conversation"
        if row.situation != rows[0].situation:
            return row.line, "prompt differs within its conversation"
    return None


def listener_turns(conversations: list[Conversation]) -> Iterator[DialogueExample]:
    """One example for every listener turn (docs/paper.md)."""
    for conversation in conversations:
        for position, turn in enumerate(conversation.turns):
            if not turn.by_speaker:  # never turn 1, whose author is the speaker
                after = next(iter(conversation.turns[position + 1 :]), None)
                yield DialogueExample(f"{conversation.id}#{position + 1}", conversation.turns[:position], turn.text,
                                      conversation.emotion, conversation.situation,
                                      after.text if after is not None and after.by_speaker else "")
