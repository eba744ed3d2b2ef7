"""A run of a family of kernels over its cases: every peer checked, tuned, timed in turns, its memory measured.

`<family>.py` says in one `Family` what is measured; `<family>_peers.py` holds the other ways to compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from benchmarks import memory
from benchmarks.measure import (
    MODES,
    OURS,
    Case,
    Timing,
    Truth,
    Unfit,
    Work,
    WrongResult,
    Yardstick,
    seconds,
    take_turns,
    thread_counts,
    tune,
)

Peers = dict[str, Callable[[Any], Work | Yardstick]]  # OURS first


@dataclass(frozen=True)
class Family:
    """What is measured, and against what."""

    name: str
    case_of: Callable[..., Case]  # (size, device="cpu", dtype=torch.float32); ConfigError where the size is unknown
    truth: Callable[[Any], Truth]  # of a case
    peers: Peers
    quick: Sequence[str]  # the peers that need no compilation
    sizes: Sequence[str]
    quick_sizes: Sequence[str]
    axis: str  # what `Case.size` counts: the picture's
    op: str = ""  # of `case_fast.ops`, where its name is another


def family_of(name: str) -> Family:
    return import_module(f"benchmarks.{name}").FAMILY


def run(family: Family, sizes: Sequence[str] = (), quick: bool = False, rounds: int = 30, budget: float = 30.0,
        tell: Callable[[str, int, int], None] = lambda *_: None) -> Iterator[dict[str, Any]]:
    """Measure each size and yield {"name", "what", "shape", ..., "rows": a dict for each peer and mode}.

    Args:
        sizes: names that the family's ``case_of`` knows; default its sizes.
        quick: three rounds of what needs no compilation, on one thread: whether all works, not how fast it is.
        rounds, budget: samples of each, and seconds for all samples of a size and mode.
        tell: called with what is being done, steps done, steps in all.
    """
    peers = {name: family.peers[name] for name in (family.quick if quick else family.peers)}
    rounds, counts = (3, [1]) if quick else (rounds, thread_counts())
    sizes = sizes or (family.quick_sizes if quick else family.sizes)
    for size in sizes:
        family.case_of(size)  # an unknown size ends the run before it begins
    threads = torch.get_num_threads()
    try:
        for size in sizes:
            yield _measure(family, family.case_of(size), peers, counts, rounds, budget, tell)
    finally:
        torch.set_num_threads(threads)


def _measure(family: Family, case: Case, peers: Peers, counts: list[int], rounds: int, budget: float,
             tell: Callable[[str, int, int], None]) -> dict[str, Any]:
    tell(f"{case.name}: float64", 0, 1)
    torch.set_num_threads(counts[-1])
    expected = family.truth(case)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    timings: dict[tuple[str, str], Timing] = {}
    others: dict[str, float | None] = {}
    for mode in case.modes:
        torch.compiler.reset()  # each compiled peer is compiled anew for each case, and never falls back to eager for its number
        ready: dict[str, tuple[Work | Yardstick, Timing, float]] = {}
        for place, (name, prepare) in enumerate(peers.items()):
            tell(f"{case.name}, {mode}: checking {name}", place, len(peers))
            rows[name, mode] = row = {"peer": name, "mode": mode}
            try:
                work = prepare(case)
                if isinstance(work, Yardstick):
                    row["yardstick"] = True
                elif mode == MODES[1] and not work.trains:
                    raise Unfit(work.note)
                ready[name] = (work, *tune(work, mode, expected, counts))
                if isinstance(work, Work):
                    row |= _said(work)
            except Unfit as why:
                row["left_out"] = str(why)
            except WrongResult as why:
                row["refused"] = str(why)
                if name == OURS:
                    raise WrongResult(f"{case.name}, {mode}: {name}: {why}") from why
        others[mode] = take_turns(ready, mode, rounds, budget,
                                  lambda done, total, mode=mode: tell(f"{case.name}, {mode}", done, total))
        timings |= {(name, mode): timing for name, (_, timing, _) in ready.items()}
        del ready, work  # each may hold gigabytes
    tell(f"{case.name}: memory", 0, 1)
    measured = [key for key in timings if "yardstick" not in rows[key]]
    extra = memory.measure(family.name, case.name, [(*key, timings[key].threads) for key in measured])
    for key, taken in zip(measured, extra, strict=True):
        rows[key]["extra_bytes"] = taken
    for key, timing in timings.items():
        low, high = timing.quartiles
        rows[key] |= {"threads": timing.threads, "median_ms": 1e3 * timing.median, "quartiles_ms": [1e3 * low, 1e3 * high],
                      "fastest_ms": 1e3 * min(timing.samples), "rounds": len(timing.samples),
                      "error_over_limit": timing.error}
    return {"name": case.name, "what": case.what, "shape": case.shape, "size": case.size, "axis": family.axis,
            "modes": case.modes, "cores_busy_with_others": others, "rows": list(rows.values())}


def _said(work: Work) -> dict[str, Any]:
    """A peer's note, and the time of a part that it names."""
    found: dict[str, Any] = {"note": work.note} if work.note else {}
    if work.part is not None:
        with torch.no_grad():
            work.part()  # compiled, perhaps
            found["part"] = {"name": work.part_name, "ms": 1e3 * min(seconds(work.part) for _ in range(5))}
    return found
