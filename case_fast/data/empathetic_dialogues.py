"""Strict reader of EmpatheticDialogues as officially released (Rashkin et al., 2019)."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import BinaryIO, NamedTuple

from case_fast.data.text import normalize_space
from case_fast.errors import DataError
from case_fast.text_files import ReadReport, read_lines

SPLITS = ("train", "valid", "test")
EMOTIONS = (
    "afraid", "angry", "annoyed", "anticipating", "anxious", "apprehensive", "ashamed", "caring", "confident", "content",
    "devastated", "disappointed", "disgusted", "embarrassed", "excited", "faithful", "furious", "grateful", "guilty",
    "hopeful", "impressed", "jealous", "joyful", "lonely", "nostalgic", "prepared", "proud", "sad", "sentimental",
    "surprised", "terrified", "trusting",
)
EMOTION_IDS = {emotion: index for index, emotion in enumerate(EMOTIONS)}
COLUMNS = ("conv_id", "utterance_idx", "context", "prompt", "speaker_idx", "utterance", "selfeval", "tags")
_AFTER = "after a missing or malformed turn of its conversation"
_ARCHIVES = (".tar.gz", ".tgz", ".tar")
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
    says right after it, "" where nothing follows, or another turn of the listener's."""

    id: str
    context: tuple[Turn, ...]
    response: str
    emotion: str
    situation: str
    feedback: str = ""


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
    elif not source.name.endswith(_ARCHIVES):
        raise DataError(source, "neither a folder nor a .tar.gz", "Give the folder that holds train.csv, valid.csv, test.csv")
    else:
        with ExitStack() as stack:
            try:
                # the compression is not guessed, which would open the door to more decoders
                archive = stack.enter_context(tarfile.open(source, "r:" if source.suffix == ".tar" else "r:gz"))
                member = _find_member(archive, f"{split}.csv")
                stream = stack.enter_context(archive.extractfile(member)) if member else None
            except _DAMAGE as error:
                raise DataError(source, f"damaged archive ({str(error) or type(error).__name__})", "Download it again") from error
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

    The files are not quoted CSV: a row is split on commas into eight fields, or nine (the ninth, retrieval candidates, is
    ignored), and ``_comma_`` stands for a comma in a text. The speaker is the author of turn 1; rows of a conversation are
    ordered by their turn number. A malformed row is counted; the turns of its conversation after it are counted and left
    out as well, since they would answer a turn that is missing.

    Args:
        limit: read at most this many conversations.

    Raises:
        DataError: a missing or damaged file, a wrong header, or no usable row; with file and line.
    """
    rows: dict[str, list[_Row]] = {}
    with _open_split(Path(source), split) as (name, stream):
        report = ReadReport(name)
        lines = read_lines(name, report, stream)
        header = next(lines, None)
        if header is None or tuple(header[1].split(",")[:8]) != COLUMNS:
            raise DataError(name, "the header is not that of EmpatheticDialogues", f"Expected {','.join(COLUMNS)}", 1)
        for number, line in lines:
            fields = line.split(",")
            if problem := _row_problem(fields):
                report.skip(problem, number)
                continue
            key = fields[0].strip()
            if limit is not None and key not in rows and len(rows) >= limit:
                break  # a conversation's rows are contiguous in the release
            _, turn, emotion, situation, speaker, text, *_ = fields
            rows.setdefault(key, []).append(_Row(int(turn), number, intern(emotion), situation, speaker.strip(), text))
    # popped one by one: rows and conversations together would double the memory
    conversations = [c for key in list(rows) if (c := _conversation(key, rows.pop(key), report))]
    report.require_rows(f"rows with the columns {','.join(COLUMNS)}")
    return conversations, report


class _Row(NamedTuple):
    """What is kept of a row until all rows of its conversation are known."""

    turn: int
    line: int
    emotion: str
    situation: str
    speaker: str
    text: str


def _row_problem(fields: list[str]) -> str | None:
    if len(fields) == 1 and not fields[0].strip():
        return "empty line"
    if len(fields) not in (8, 9):
        return "not 8 or 9 fields"
    if not fields[0].strip():
        return "no conv_id"
    if not (fields[1].isascii() and fields[1].isdigit() and len(fields[1]) < 10 and int(fields[1]) >= 1):
        return "utterance_idx is not a positive integer"
    if fields[2] not in EMOTION_IDS:
        return "unknown emotion"
    if not fields[5].strip():
        return "empty utterance"
    if not fields[4].strip():
        return "no speaker_idx"
    return None


def _text(field: str) -> str:
    return normalize_space(field.replace("_comma_", ","))


def _conversation(key: str, rows: list[_Row], report: ReadReport) -> Conversation | None:
    rows.sort(key=lambda row: row.turn)
    first = rows[0]
    turns: list[Turn] = []
    for position, row in enumerate(rows, start=1):
        if row.turn == position and row.emotion == first.emotion:
            turns.append(Turn(_text(row.text), row.speaker == first.speaker))
            continue
        if row.turn < position:
            report.skip("turn number occurs twice", row.line)
        elif row.turn > position:
            report.skip(_AFTER, row.line)
        else:
            report.skip("emotion differs within its conversation", row.line)
        for later in rows[position:]:
            report.skip(_AFTER, later.line)
        break
    report.rows += len(turns)
    return Conversation(key, first.emotion, _text(first.situation), tuple(turns)) if turns else None


def listener_turns(conversations: list[Conversation]) -> Iterator[DialogueExample]:
    """One example for every listener turn (docs/paper.md)."""
    for conversation in conversations:
        for position, turn in enumerate(conversation.turns):
            if not turn.by_speaker:  # never turn 1, whose author is the speaker
                after = next(iter(conversation.turns[position + 1 :]), None)
                yield DialogueExample(f"{conversation.id}#{position + 1}", conversation.turns[:position], turn.text,
                                      conversation.emotion, conversation.situation,
                                      after.text if after is not None and after.by_speaker else "")
