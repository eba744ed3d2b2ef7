"""Carrying out the checks of `case-fast doctor`, one group at a time."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from jsonargparse import ArgumentParser

from case_fast import cli
from case_fast.doctor import check, machine, native, software
from case_fast.doctor.check import Check, carried_out
from case_fast.doctor.given import Given
from case_fast.doctor.next_step import NextStep
from case_fast.doctor.run import GivenRun
from case_fast.doctor.store import GivenStore


def of(checks: Iterable[Check]) -> dict[str, Check]:
    found = {item.name: item for item in checks}
    for item in found.values():
        assert item.state in check.STATES and item.reason and (item.remedy or item.state == "ok"), item
        assert "\n" not in item.reason + item.remedy
    return found


def of_store(folder: Path) -> dict[str, Check]:
    return of(carried_out("store", GivenStore(str(folder / "store")).looks(), "store"))


def of_run(folder: Path, *stores: Path) -> dict[str, Check]:
    given = [GivenStore(str(store)) for store in stores]
    return of(carried_out("run", GivenRun(str(folder / "run"), given).looks(), "run"))


def of_next(*paths: Path | str, asked: str = "", before: tuple[Check, ...] = ()) -> dict[str, Check]:
    paths = [str(path) for path in paths]
    return of(carried_out("next step", NextStep(asked, paths, Given(paths), before, 0.0).looks()))


def of_software() -> dict[str, Check]:
    return of(carried_out("software", software.looks(())))


def of_machine() -> dict[str, Check]:
    return of(carried_out("machine", machine.looks()))


def of_native() -> dict[str, Check]:
    return of(carried_out("native", native.looks()))


def states(found: dict[str, Check]) -> dict[str, str]:
    return {name: item.state for name, item in found.items()}


def parsed(line: str) -> list[str]:
    """The words of a line for the command line, which takes them."""
    program, name, *words = shlex.split(line)
    assert program == "case-fast"
    parser = ArgumentParser(prog=name)
    cli._COMMANDS[name].arguments(parser)
    parser.parse_args([cli._underscored(word) for word in words])
    return words
