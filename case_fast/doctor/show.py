"""The checks on a terminal, each as it is done: a heading a group, a row a check, its remedy below, in one line to paste."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from case_fast.doctor.check import STATES, Check

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
_NAME = 20  # columns: the longest name of a family of ops
_INDENT, _OF_REMEDY = 7, 4  # columns
_NARROW = 72  # columns of a terminal below which a reason stands under its name


class Display:
    """Prints check after check."""

    def __init__(self, console: Console):
        self.console = console
        self._heading = ""

    def show(self, check: Check) -> None:
        heading = f"{check.group}: {check.path}" if check.path else check.group
        if heading != self._heading:
            self._print(Text("\n" * bool(self._heading) + heading, style="bold"))
            self._heading = heading
        start = Text.assemble("  ", (f"{check.state:<5}", _STYLES[check.state]), f"{check.name:<{_NAME}} ")
        reason = Text(check.reason, style="dim" * (check.state == "skip"))
        if self.console.width < _NARROW:
            self._print(start)
            start = Text(" " * _INDENT)
        self._wrapped(start, reason)
        if check.remedy:  # never wrapped: a line that the terminal itself breaks is still copied as one
            self._print(Text(" " * _OF_REMEDY + check.remedy, style="cyan"))

    def end(self, checks: Sequence[Check]) -> None:
        """How many of each state, and what failed."""
        said = Text(", ").join(Text(f"{sum(check.state == state for check in checks)} {state}", style=_STYLES[state])
                               for state in STATES)
        failed = [f"{check.name}{f' of {check.path}' if check.path else ''}" for check in checks if check.state == "fail"]
        said.append(f" ({', '.join(dict.fromkeys(failed))})" * bool(failed))
        self._print(Text())
        said.append(". Below what is not ok stands a line that mends it or tells more. For an issue: case-fast doctor --json")
        self._wrapped(Text(), said)

    def _wrapped(self, start: Text, text: Text) -> None:
        """The text behind what its first line starts with."""
        indent = start.cell_len
        for line in text.wrap(self.console, max(1, self.console.width - indent), overflow="fold"):
            self._print(start + line)
            start = Text(" " * indent)

    def _print(self, line: Text) -> None:
        line.rstrip()
        self.console.print(line, soft_wrap=True)
