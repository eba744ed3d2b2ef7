"""What a run leaves behind for reading: one JSON object a line, TensorBoard's files, and a live display."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from case_fast.files import plain, write_text
from case_fast.optional import PlainConsole
from case_fast.runs import Run, writing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

PLAIN_SECONDS = 10.0  # between two lines of progress where there is no terminal
_log = logging.getLogger("case_fast")


class RunLog:
    """Appends records to RUN/log.jsonl, and numbers to RUN/tensorboard/ where that package is installed.

    The file is opened for each record, so that a folder that has vanished is noticed at the next one.
    """

    def __init__(self, run: Run, resumed_step: int | None = None):
        """``resumed_step``: forget records of later steps; they are going to be written again."""
        self.path = run.log
        if resumed_step is not None:
            self._forget_after(resumed_step)
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            _log.info("tensorboard is not installed: the run is logged to %s alone", self.path)
        else:
            purge = None if resumed_step is None else resumed_step + 1
            self._board = SummaryWriter(str(run.tensorboard), purge_step=purge)

    def _forget_after(self, step: int) -> None:
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else ():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed process
        write_text(self.path, "".join(kept))

    def write(self, event: str, phase: int, step: int, **values: Any) -> None:
        """One record; ``step`` counts across all phases. Numbers that JSON does not know are written as text."""
        record = {"event": event, "phase": phase, "step": step, **values}
        with writing("the log", self.path):
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n")
            if self._board is not None and event in ("step", "validation"):
                for name, value in _numbers(values):
                    self._board.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((prefix + name, float(value)))
    return found


class Display:
    """One progress bar a phase on a terminal; elsewhere a plain line now and then."""

    def __init__(self, console: Console | PlainConsole):
        self.console = console
        self._bars: Progress | None = None
        if console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            status = TextColumn("{task.fields[status]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
            self._bars = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(), TimeRemainingColumn(),
                status, console=console, expand=True,
            )
        self._task: TaskID | None = None
        self._title, self._printed = "", time.monotonic()

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def bar(self, title: str, done: int, total: int) -> None:
        """Begin a new bar; the one before stays as it is."""
        self._title = title
        if self._bars is not None:
            if self._task is not None:
                self._bars.stop_task(self._task)
            self._task = self._bars.add_task(title, total=total, completed=done, status="")
        else:
            self.line(f"{title}: {done:,} of {total:,} steps")

    def step(self, done: int, total: int, status: str) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, total=total, status=status)
        elif time.monotonic() - self._printed >= PLAIN_SECONDS:
            self.line(f"{self._title}: {done:,} of {total:,} steps; {status}")

    def line(self, text: str) -> None:
        """A line that stays."""
        self._printed = time.monotonic()
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def perplexity(nll: float) -> float:
    return math.inf if nll > 700 else math.exp(nll)


def in_words(metrics: dict[str, Any]) -> str:
    losses = ", ".join(f"{name} {value:.3f}" for name, value in metrics["losses"].items())
    measured = f"perplexity {metrics['ppl']:.2f}"
    if metrics["accuracy"] is not None:
        measured += f", emotion accuracy {100 * metrics['accuracy']:.1f} %"
    return f"{measured}, loss {metrics['loss']:.3f} ({losses})"
