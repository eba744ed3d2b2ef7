"""The command line's terminal: texts shown as they are, bars, and streams that neither a character which an encoding lacks nor a
reader that has gone away brings to an end."""

from __future__ import annotations

import codecs
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from case_fast.errors import reason_of


class Terminal(Console):
    """rich's console, to which a bracket or a colon in a path is no markup."""

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def say(self, text: str | Text, style: str = "") -> None:
        """A line, broken by the terminal alone."""
        self.print(text, style=style, soft_wrap=True)


@contextmanager
def bar(console: Console) -> Iterator[Progress]:
    spinner = SpinnerColumn("dots" if console.encoding.startswith("utf") else "line")
    columns = (spinner, TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


class Stages:
    """Shows the stages of `prepare`: a bar while one runs, a line with its time when it is done."""

    def __init__(self, console: Terminal):
        self.console = console

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        started = time.monotonic()
        with bar(self.console) as progress:
            task = progress.add_task(name, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        self.console.say(Text.assemble(f"  {name} ", (f"{time.monotonic() - started:.1f} s", "dim")))

    def report(self, line: str) -> None:
        self.console.say(f"    {line}", style="dim")


class Notes(logging.Handler):
    """Shows what is logged, a line each."""

    def __init__(self, console: Terminal):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "blue"
        self.console.say(Text.assemble((f"{record.levelname:<8}", style), f" {record.getMessage()}"))


def print_json(value: Any) -> None:
    """Where the output has another encoding than UTF-8, characters beyond ASCII are escaped, as JSON has it."""
    try:
        utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
    except (LookupError, TypeError):
        utf8 = False
    print(json.dumps(value, ensure_ascii=not utf8, indent=2))


def one_line(text: str) -> str:
    """Line breaks as blanks, and what is not to be seen or is no text, such as a strange byte of a path, as Python writes it."""
    line = " ".join(text.splitlines())
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line)


# ---- streams

_ERRORS = "case_fast.terminal"  # the name of `_readable` among Python's handlers of what an encoding lacks
_READABLE = dict(zip("±·–†‡…›→↑↓█░’“”", ("+-", "-", "-", "+", "++", "...", ">", "->", "^", "v", "#", ".", "'", '"', '"'),
                     strict=True))
_NOBODY_READS = (errno.EPIPE, errno.EIO)  # a pipe that was closed, a terminal that was hung up


def _readable(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding lacks: signs of ours by like ones, all others as Python writes them."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_READABLE.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in lacking), error.end


codecs.register_error(_ERRORS, _readable)


class Output:
    """A text stream that is written to as long as that works, and then says why not in ``lost``; the rest is let go."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def failed(self) -> bool:
        """Whether it is lost for another reason than that nobody reads it any more, such as a full disk."""
        return self.lost is not None and self.lost.errno not in _NOBODY_READS

    def write(self, text: str) -> int:
        if self.lost is None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if self.lost is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = error
        with suppress(OSError):  # what its buffer holds has to go somewhere when Python ends; a stream in memory has no number
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._stream.fileno())
            finally:
                os.close(nowhere)


@contextmanager
def lasting_streams() -> Iterator[Output]:
    """Streams in place of sys.stdout, which is given, and sys.stderr that take every text and never fail; what is no text in
    sys.stdin becomes question marks.

    Where the process was begun without one of the three, the null device takes its place: else the first file that is opened
    would have its number, and get what is written to it.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
    sys.stdin = before[0] or open(os.devnull, encoding="utf-8")
    sys.stdout, sys.stderr = (Output(stream or open(os.devnull, "w", encoding="utf-8")) for stream in before[1:])
    output, handling = sys.stdout, {stream: stream.errors for stream in before if hasattr(stream, "reconfigure")}
    for stream in handling:
        _handle(stream, "replace" if stream is before[0] else _ERRORS)
    try:
        yield output
    finally:
        output.flush()
        if output.failed:
            print(f"error: the standard output cannot be written ({reason_of(output.lost)})", file=sys.stderr)
        sys.stderr.flush()
        for stream, errors in handling.items():
            _handle(stream, errors)
        sys.stdin, sys.stdout, sys.stderr = before


def _handle(stream: TextIO, errors: str) -> None:
    with suppress(OSError, ValueError):  # closed, lost, or read from already
        stream.reconfigure(errors=errors)
