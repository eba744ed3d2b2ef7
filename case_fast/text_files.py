"""Reading other people's text files: one strict line reader, one report of what was skipped.

Every reader of the package goes through `read_lines`, so that bad UTF-8, NUL bytes and endless lines mean the same
thing everywhere: a counted, line-numbered skip, never a silent loss and never a crash half way through a large file.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from case_fast.errors import DataError, reason_of, remedy_of

MAX_LINE_BYTES = 1 << 20  # no real row of any supported format comes near 1 MiB
_HOPELESS_LINE_BYTES = 1 << 28  # no text at all, such as a few kilobytes that unpack to terabytes of zeros
_SHOWN_PER_REASON = 5
_GZIP = b"\x1f\x8b"


@dataclass
class ReadReport:
    """What a reader took and what it left out.

    ``read``: lines of the file (or what else is its ``unit``), each of which is a row kept, skipped or ignored. ``rows`` kept;
    ``skipped``: malformed rows by reason, with their first line numbers in ``lines``; ``ignored``: sound rows that were not asked
    for (another language, another relation, ...); ``notes``: anything done to the values.
    """

    path: str
    unit: str = field(default="line", kw_only=True)
    read: int = 0
    rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    lines: dict[str, list[int]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def skip(self, reason: str, line: int) -> None:
        self.skipped[reason] += 1
        shown = self.lines.setdefault(reason, [])
        if len(shown) < _SHOWN_PER_REASON:
            shown.append(line)

    def require_rows(self, expected: str) -> None:
        """Raise `DataError` if nothing usable was read; ``expected`` describes a good row."""
        if self.rows == 0:
            left_out = [*self.skipped.items(), *self.ignored.items()]
            why = "; ".join(f"{reason}: {count}" for reason, count in left_out) or "the file is empty"
            raise DataError(self.path, f"no usable row ({why})", f"Expected {expected}")

    def summary(self) -> str:
        text = f"{self.path}: {self.read:,} {self.unit}s, {self.rows:,} {'rows' if self.unit == 'line' else 'kept'}"
        for reason, count in self.skipped.most_common():
            numbers = ", ".join(map(str, self.lines[reason])) + (", …" if count > _SHOWN_PER_REASON else "")
            text += f"; skipped {count:,} ({reason}; {self.unit}{'s' if count > 1 else ''} {numbers})"
        if self.ignored:
            text += "; not needed " + ", ".join(f"{count:,} ({reason})" for reason, count in self.ignored.most_common())
        return "; ".join([text, *self.notes])

    def as_dict(self) -> dict:
        return {
            "path": self.path,
            "unit": self.unit,
            "read": self.read,
            "rows": self.rows,
            "skipped": dict(self.skipped),
            "lines": dict(self.lines),
            "ignored": dict(self.ignored),
            "notes": list(self.notes),
        }


_most_lines: ContextVar[int | None] = ContextVar("most_lines", default=None)


@contextmanager
def first_lines(most: int) -> Iterator[None]:
    """Inside, every file ends after so many lines for `read_lines`: a look at a large one by the reader that reads all of it."""
    before = _most_lines.set(most)
    try:
        yield
    finally:
        _most_lines.reset(before)


def require_file(path: str | Path, what: str, remedy: str = "") -> Path:
    """The path of an existing regular file that can be read, or a `DataError` that names what was looked for."""
    path = Path(path)
    with reading(path, what):
        if not path.is_file():
            problem = f"{what} is a folder, not a file" if path.is_dir() else f"{what} not found"
            raise DataError(path, problem, remedy or "Check the path")
        with open(path, "rb", buffering=0) as stream:
            stream.read(1)
    return path


def require_folder(path: str | Path, what: str, remedy: str = "") -> Path:
    """The path of an existing folder that can be read, or a `DataError` that names what was looked for."""
    path = Path(path)
    with reading(path, what):
        if not path.is_dir():
            problem = f"{what} is a file, not a folder" if path.exists() else f"{what} not found"
            raise DataError(path, problem, remedy or "Check the path")
        os.scandir(path).close()
    return path


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Turns a failure to read inside into a `DataError` that names ``path`` and the reason."""
    try:
        yield
    except OSError as error:
        raise DataError(path, f"{what} cannot be read ({reason_of(error)})", remedy_of(error)) from error


def read_json(path: str | Path, what: str, remedy: str) -> Any:
    """The value in a JSON file of ours, or a `DataError` that says what it should have been."""
    path = require_file(path, what, remedy)
    with reading(path, what):
        content = path.read_bytes()
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(path, f"{what} is damaged ({error})", remedy) from error


def unpacked(stream: BinaryIO) -> BinaryIO:
    """The stream, or where its first bytes are gzip's what they unpack to; the name of a file says nothing about that.

    Raises:
        OSError: the first bytes cannot be read.
    """
    whole = stream if hasattr(stream, "peek") else io.BufferedReader(stream)
    return gzip.GzipFile(fileobj=whole) if whole.peek(2)[:2] == _GZIP else whole


def read_lines(path: str | Path, report: ReadReport, stream: BinaryIO | None = None) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without line end) in bounded memory; what is gzip, whatever its name, is unpacked.

    Every line is counted in ``report.read``. Lines that are not UTF-8, hold a NUL byte or are longer than `MAX_LINE_BYTES`
    are counted as skipped and passed over. ``stream`` reads from an open binary stream (an archive's member) in place of
    the file.

    Raises:
        DataError: the file is missing, its compression is damaged, or a line does not end within 256 MiB.
    """
    if stream is None:
        path = require_file(path, "input file")
        with reading(path, "input file"):
            stream = open(path, "rb")
    number, most = 0, _most_lines.get()
    with stream:
        while number != most:
            number += 1
            try:
                if number == 1:
                    stream = unpacked(stream)
                raw = stream.readline(MAX_LINE_BYTES)
                if not raw:
                    return
                report.read += 1
                if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    length = len(raw)
                    while raw and not raw.endswith(b"\n"):
                        raw = stream.readline(MAX_LINE_BYTES)
                        length += len(raw)
                        if length > _HOPELESS_LINE_BYTES:
                            raise DataError(path, f"a line of more than {_HOPELESS_LINE_BYTES >> 20} MiB: not a text file",
                                            "Check which file this is", number)
                    report.skip(f"line longer than {MAX_LINE_BYTES} bytes", number)
                    continue
            except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
                raise DataError(path, f"damaged file ({error})", "Download it again", number) from error
            raw = raw.rstrip(b"\r\n")
            if b"\0" in raw:
                report.skip("NUL byte", number)
                continue
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                report.skip("not UTF-8", number)
                continue
            yield number, text.removeprefix("\ufeff") if number == 1 else text
