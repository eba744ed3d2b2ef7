"""Typed errors. Each message says where (file:line or argument), what was wrong, and what to do about it."""

from __future__ import annotations

from pathlib import Path


class CaseFastError(Exception):
    """Base of every error that case_fast raises on purpose; the command line prints it without a traceback.

    Attributes:
        said: whether another process of several says the same, so that this one need not.
    """

    said = False


class DataError(CaseFastError, ValueError):
    """An input file or folder is missing, unreadable or not of the expected format.

    Shown as ``path:line: problem. remedy`` (``line`` is left out where the whole file is meant).
    """

    def __init__(self, path: str | Path, problem: str, remedy: str = "", line: int | None = None):
        self.path, self.line, self.problem, self.remedy = str(path), line, problem, remedy
        where = f"{path}:{line}" if line is not None else str(path)
        super().__init__(f"{where}: {problem.rstrip('.')}." + (f" {remedy.rstrip('.')}." if remedy else ""))


class ConfigError(CaseFastError, ValueError):
    """A setting or an argument has a value that cannot work."""


class SettingTypeError(ConfigError, TypeError):
    """A setting is of the wrong type."""


class CheckpointError(CaseFastError, RuntimeError):
    """A run folder or a checkpoint is missing, incomplete or damaged."""


class Interrupted(CaseFastError):
    """Long work was stopped by the user (Ctrl-C, SIGTERM) after its state had been saved."""
