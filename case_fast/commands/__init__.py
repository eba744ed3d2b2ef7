"""What carries out each command of the command line, beside its arguments, by subject: `data`, `runs`, `serve`, `machine`.

A command imports what it needs when it runs, so that the others start at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace

from case_fast.terminal import Terminal


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
        what: it does, in one sentence.
        arguments: adds them to a parser.
        run: carries it out, and may give an exit status.
        left: where the arguments depend on the words that are given: adds them instead, and gives the words left to parse.
    """

    what: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, Terminal], int | None]
    left: Callable[[ArgumentParser, list[str]], list[str]] | None = None


def fields(args: Namespace, kind: type) -> dict[str, Any]:
    """The arguments that are settings of a dataclass."""
    return {item.name: args[item.name] for item in dataclasses.fields(kind)}


def print_paths(paths: Sequence[str | Path], console: Terminal) -> None:
    for path in paths:
        console.say(f"{path}")
