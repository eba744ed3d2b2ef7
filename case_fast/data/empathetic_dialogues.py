"""Strict reader of EmpatheticDialogues as officially released (Rashkin et al., 2019)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from case_fast.data.text import normalize_space
from case_fast.errors import DataError
from case_fast.reading import ReadReport, read_lines

SPLITS = ("train", "valid", "test")
EMOTIONS = (
    "afraid", "angry", "annoyed", "anticipating", "anxious", "apprehensive", "ashamed", "caring", "confident", "content",
    "devastated", "disappointed", "disgusted", "embarrassed", "excited", "faithful", "furious", "grateful", "guilty",
    "hopeful", "impressed", "jealous", "joyful", "lonely", "nostalgic", "prepared", "proud", "sad", "sentimental",
    "surprised", "terrified", "trusting",
)  # fmt: skip
EMOTION_IDS = {emotion: index for index, emotion in enumerate(EMOTIONS)}
COLUMNS = ("conv_id", "utterance_idx", "context", "prompt", "speaker_idx", "utterance", "selfeval", "tags")
_ARCHIVES = (".tar.gz", ".tgz", ".tar")


@dataclass(frozen=True)
class Turn:
    text: str
    by_speaker: bool


@dataclass(frozen=True)
class Conversation:
    id: str
    emotion: str
    situation: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class DialogueExample:
    """One listener turn: all turns before it (oldest first, the first one the speaker's), and the turn itself."""

    id: str
    context: tuple[Turn, ...]
    response: str
    emotion: str
    situation: str


def _open_split(source: Path, split: str) -> tuple[str, io.BufferedIOBase | None]:
    """The name to report and, for a member of an archive, its stream."""
    if source.is_dir():
        candidates = [p for p in (source / f"{split}.csv", source / f"{split}.csv.gz") if p.is_file()]
        if not candidates:
            raise DataError(source / f"{split}.csv", "file of the split not found",
                            "Give the folder (or .tar.gz) that holds train.csv, valid.csv and test.csv")  # fmt: skip
        return str(candidates[0]), None
    if source.is_file() and source.name.endswith(_ARCHIVES):
        try:
            archive = tarfile.open(source)
            member = next((m for m in archive if m.isfile() and Path(m.name).name == f"{split}.csv"), None)
            stream = archive.extractfile(member) if member else None
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(source, f"damaged archive ({error})", "Download it again") from error
        if stream is None:
            raise DataError(source, f"the archive holds no {split}.csv", "Give the official release")
        return f"{source}/{member.name}", io.BufferedReader(stream)
    if source.is_file():
        raise DataError(source, "neither a folder nor a .tar.gz", "Give the folder that holds train.csv, valid.csv, test.csv")
    raise DataError(source, "dialogues not found", "Give the folder (or .tar.gz) of the EmpatheticDialogues release")


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
    name, stream = _open_split(Path(source), split)
    report = ReadReport(name)
    rows: dict[str, list[tuple[int, int, list[str]]]] = {}
    broken: dict[str, int] = {}  # conversation -> line of its first malformed row
    lines = read_lines(name, report, stream)
    header = next(lines, None)
    if header is None or tuple(header[1].split(",")[:8]) != COLUMNS:
        raise DataError(name, "the header is not that of EmpatheticDialogues", f"Expected {','.join(COLUMNS)}", 1)
    for number, line in lines:
        if not line.strip():
            report.skip("empty line", number)
            continue
        fields = line.split(",")
        known = fields[0].strip()
        if limit is not None and known not in rows and len(rows) >= limit:
            break  # a conversation's rows are contiguous in the release
        problem = _row_problem(fields)
        if problem:
            report.skip(problem, number)
            if known:
                broken.setdefault(known, number)
            continue
        rows.setdefault(known, []).append((int(fields[1]), number, fields))
    conversations = [c for c in (_conversation(key, found, broken, report) for key, found in rows.items()) if c]
    report.require_rows(f"rows with the columns {','.join(COLUMNS)}")
    return conversations, report


def _row_problem(fields: list[str]) -> str | None:
    if len(fields) not in (8, 9):
        return "not 8 or 9 fields"
    if not fields[0].strip():
        return "no conv_id"
    if not (fields[1].isascii() and fields[1].isdigit() and int(fields[1]) >= 1):
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


def _conversation(key: str, rows: list[tuple[int, int, list[str]]], broken: dict[str, int],
                  report: ReadReport) -> Conversation | None:  # fmt: skip
    rows.sort(key=lambda row: row[0])
    speaker = rows[0][2][4]
    emotion, situation = rows[0][2][2], _text(rows[0][2][3])
    turns: list[Turn] = []
    for position, (index, number, fields) in enumerate(rows, start=1):
        if index < position:
            report.skip("turn number occurs twice", number)
            rows_left = rows[position:]
        elif index > position:
            why = "after a malformed turn of its conversation" if key in broken else "after a missing turn of its conversation"
            report.skip(why, number)
            rows_left = rows[position:]
        elif fields[2] != emotion:
            report.skip("emotion differs within its conversation", number)
            rows_left = rows[position:]
        else:
            turns.append(Turn(_text(fields[5]), fields[4] == speaker))
            continue
        for _, later, _ in rows_left:
            report.skip("after a malformed turn of its conversation", later)
        break
    report.rows += len(turns)
    return Conversation(key, emotion, situation, tuple(turns)) if turns else None


def listener_turns(conversations: list[Conversation]) -> Iterator[DialogueExample]:
    """One example for every listener turn (case.md, section 1)."""
    for conversation in conversations:
        for position, turn in enumerate(conversation.turns):
            if not turn.by_speaker:  # never turn 1, whose author is the speaker
                yield DialogueExample(f"{conversation.id}#{position + 1}", conversation.turns[:position], turn.text,
                                      conversation.emotion, conversation.situation)  # fmt: skip
