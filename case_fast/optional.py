"""Packages of which a part of case_fast has need, and that a machine for training alone may lack."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from case_fast.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

_DISTRIBUTIONS = {"sklearn": "scikit-learn", "rouge_score": "rouge-score"}  # where pip's name is not the module's


class MissingPackage(ConfigError, ImportError):
    """A package that is not installed; the message names it and what needs it."""


def needed(module: str, what: str) -> ModuleType:
    """The module, imported now.

    Args:
        what: what needs it, the subject of the sentence: "tokenizing text".

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        package = _DISTRIBUTIONS.get(package, package)
        raise MissingPackage(f"{what} needs {package}, which is not installed: pip install {package}") from error


class PlainConsole:
    """The part of rich's `Console` that training uses, for a machine without rich: plain lines, no colours, no bars."""

    is_terminal = False

    def print(self, *words: Any, **style: Any) -> None:
        print(*words, file=sys.stdout, flush=True)


class SilentConsole(PlainConsole):
    """Shows nothing."""

    def print(self, *words: Any, **style: Any) -> None:
        pass


def open_console() -> Console | PlainConsole:
    """The terminal to print to, rich's where that is installed."""
    try:
        return needed("rich.console", "a terminal's display").Console()
    except MissingPackage:
        return PlainConsole()
