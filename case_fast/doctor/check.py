"""What a check finds, and how checks are carried out: none is sound unless it says so, and one that raises has failed."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from case_fast.errors import CaseFastError
from case_fast.optional import MissingPackage

STATES = ("ok", "skip", "warn", "fail")  # skip: not looked at, which is not ok
_LONGEST = 400  # characters of what an error says


@dataclass(frozen=True)
class Finding:
    """What a check found: ``state``, one of `STATES`, the reason for it, and a line to paste, which only what is ok may lack."""

    state: str
    reason: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.state not in STATES or not self.reason or (self.state != "ok" and not self.remedy):
            raise ValueError(f"no finding: {self.state!r}, reason {self.reason!r}, remedy {self.remedy!r}")


def ok(reason: str) -> Finding:
    return Finding("ok", reason)


def warn(reason: str, remedy: str) -> Finding:
    return Finding("warn", reason, remedy)


def fail(reason: str, remedy: str) -> Finding:
    return Finding("fail", reason, remedy)


def skip(reason: str, remedy: str) -> Finding:
    return Finding("skip", reason, remedy)


class Look(NamedTuple):
    """A check that is still to be carried out; ``remedy``: what to do where it raises."""

    name: str
    find: Callable[[], Finding]
    remedy: str


@dataclass(frozen=True)
class Check:
    """A check that was carried out. ``path``: of the store or run that it is about, as the user gave it; else ""."""

    group: str
    path: str
    name: str
    state: str
    reason: str
    remedy: str


def carried_out(group: str, looks: Iterable[Look], path: str = "") -> Iterator[Check]:
    """Each check in turn. An error, in one of them or on the way to the next, is a failed check with its reason."""
    waiting = iter(looks)
    while True:
        name, remedy = "checks", "case-fast --version"  # of the way to the next one
        try:
            look = next(waiting, None)
            if look is None:
                return
            name, remedy = look.name, look.remedy
            found = look.find()
            if not isinstance(found, Finding):
                raise TypeError(f"the check ended without a finding: {found!r}")
        except Exception as error:
            found = raised(error, remedy)
        yield Check(group, path, name, found.state, found.reason, found.remedy)


def raised(error: Exception, remedy: str) -> Finding:
    """What an error finds: for a package that is missing the remedy is to install it, else the one that is given."""
    return fail(said(error), str(error).rpartition(": ")[2] if isinstance(error, MissingPackage) else remedy)


def said(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, CaseFastError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = f"{type(error).__name__}: {error}"
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= _LONGEST else line[:_LONGEST] + " ..."


def command(*words: object) -> str:
    """A line for a shell."""
    return shlex.join(map(str, words))


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
