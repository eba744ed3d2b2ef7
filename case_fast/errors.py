"""Typed errors. Each message says where (file and line, or argument), what was wrong, and what to do about it."""

from __future__ import annotations

import errno
import os
import re
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


class PlaceError(CaseFastError, OSError):
    """A file or folder cannot be made, written or used; ``errno``, ``strerror`` and ``filename`` are as of any `OSError`.

    Shown as ``path: problem (the system's reason). remedy``.
    """

    def __init__(self, path: str | Path, error: Exception, problem: str = "cannot be written"):
        super().__init__(_number(error), reason_of(error), str(path))
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.filename}: {self.problem} ({self.strerror}). {remedy_of(self)}."


def reason_of(error: Exception) -> str:
    """What the system says of a failure to read or write, or where it says nothing a library."""
    number = _number(error)
    return getattr(error, "strerror", None) or (os.strerror(number) if number else str(error)) or type(error).__name__


def remedy_of(error: Exception) -> str:
    """What to do about it, without a full stop."""
    return _REMEDIES.get(_number(error), "Check the path and the disk")


def sentence_of(error: OSError) -> str:
    """An error of the system that nobody foresaw: where, what, and what to do."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{reason_of(error)}. {remedy_of(error)}."


def _number(error: Exception) -> int | None:
    """The system's number of a failure; safetensors, written in Rust, has it at the end of its message."""
    found = re.search(r"\(os error (\d+)\)$", str(error)) if not isinstance(error, OSError) else None
    return int(found[1]) if found else getattr(error, "errno", None)


_REMEDIES = {
    errno.ENOSPC: "Free some space there, or give another place",
    errno.EDQUOT: "Free some space there, or give another place",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or give another place",
    errno.EROFS: "Nothing can be written there: give another place",
    errno.EACCES: "Check the permissions there, or give another place",
    errno.EPERM: "Check the permissions there, or give another place",
    errno.ENOENT: "Check that it, or the folder that it belongs in, is there",
    errno.ENOTDIR: "A part of this path is a file: check the path",
    errno.EEXIST: "A file or a link is in the way: check the path",
    errno.EISDIR: "It is a folder: give a file",
    errno.ENAMETOOLONG: "Give a shorter name",
    errno.EILSEQ: "Give another name",
    errno.ELOOP: "Links lead in a circle there: check the path",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
}


class ConfigError(CaseFastError, ValueError):
    """A setting or an argument has a value that cannot work."""


class SettingTypeError(ConfigError, TypeError):
    """A setting is of the wrong type."""


class CheckpointError(CaseFastError, RuntimeError):
    """A run folder or a checkpoint is missing, incomplete or damaged."""


class Interrupted(CaseFastError):
    """Long work was stopped by the user (Ctrl-C, SIGTERM) after its state had been saved."""
