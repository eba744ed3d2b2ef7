"""`case-fast doctor`: is all in order here, and can what comes next be done? One answer, to be pasted into an issue.

Every check ends as ok, warn, fail or skip, each with its reason and, but for ok, a line that mends it. None is ok unless it says
so: one that raises has failed, one that was not carried out is skip. Nothing is written and nothing is downloaded.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from case_fast import __version__
from case_fast.doctor import machine, native, privacy, software
from case_fast.doctor.check import STATES, Check, carried_out
from case_fast.doctor.given import Given
from case_fast.doctor.next_step import NextStep

FORMAT = "case_fast doctor 1"
_SECONDS = 3.6  # of all of it, which with the start of the program is less than 5; the probe at its end takes what is left


def examine(paths: Sequence[str] = (), purpose: str | None = None, full: bool = False, chosen: Collection[str] = ()
            ) -> Iterator[Check]:
    """Carry out every check, in order; each comes as it is done.

    Args:
        paths: data sets, stores and runs, in any order.
        purpose: prepare, train, evaluate or chat, whose needs are looked at; None: what the paths lead to.
        full: whether the report is to tell home folder, user and host.
        chosen: names of variables that got their values from the command line.
    """
    done: list[Check] = []
    with _quiet():
        for checks in _groups(paths, purpose, full, chosen, done):
            for check in checks:
                done.append(check)
                yield check


def _groups(paths: Sequence[str], purpose: str | None, full: bool, chosen: Collection[str], done: list[Check]
            ) -> Iterator[Iterator[Check]]:
    until = time.monotonic() + _SECONDS
    yield carried_out("software", software.looks(chosen))
    yield carried_out("machine", machine.looks())
    yield carried_out("native", native.looks())
    yield carried_out("native on GPU", native.looks_on_gpu())
    given = Given(paths)
    yield carried_out("data", given.looks(purpose))
    for thing, group in [*((store, "store") for store in given.stores), *((run, "run") for run in given.runs)]:
        yield carried_out(group, thing.looks(), thing.path)
    yield carried_out("next step", NextStep(purpose or "", paths, given, done, until).looks())
    yield carried_out("privacy", privacy.looks(done, full))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log and the warnings of what is looked at: the checks say it."""
    log = logging.getLogger("case_fast")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def status(checks: Sequence[Check]) -> int:
    """The exit status: 1 where a check failed."""
    return int(any(check.state == "fail" for check in checks))


def report(checks: Sequence[Check], purpose: str | None, full: bool) -> dict[str, Any]:
    """Plain values for JSON; without ``full`` they tell no home folder, user or host."""
    return {
        "format": FORMAT,
        "case_fast": __version__,
        "for": purpose,
        "full": full,
        "status": status(checks),
        "states": {state: sum(check.state == state for check in checks) for state in STATES},
        "checks": [asdict(check if full else privacy.redacted(check)) for check in checks],
    }
