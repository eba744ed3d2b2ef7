"""A run of a family of kernels over its cases: every peer checked, tuned, timed in turns, its memory measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import memory
from benchmarks.clock import Clock, clock_of
from benchmarks.family import DTYPES, Family, Peers
from benchmarks.measure import (
    BACKWARD,
    LAUNCHED,
    MODES,
    OURS,
    Case,
    Timing,
    Unfit,
    Work,
    WrongResult,
    Yardstick,
    is_ours,
    prepared,
    take_turns,
    tune,
)


def run(family: Family, sizes: Sequence[str] = (), quick: bool = False, rounds: int = 30, budget: float = 30.0,
        until: float = float("inf"), tell: Callable[[str, int, int], None] = lambda *_: None, dtypes: Sequence[str] = (),
        memories: bool = True) -> Iterator[dict[str, Any]]:
    """Measure each size, in each dtype of the family's device, and yield {"name", "what", "shape", ..., "rows": a dict for each
    peer and mode}.

    Args:
        sizes: names that the family's ``case_of`` knows; default its sizes.
        quick: three rounds of what needs no compilation, on one thread: whether all works, not how fast it is.
        rounds, budget: samples of each, and seconds for all samples of a size and mode.
        until: of `time.monotonic`; after it no case is begun, and the peers of the one that has begun are left out.
        tell: called with what is being done, steps done, steps in all.
        dtypes: default those of the family's device.
        memories: whether memory is measured, on a CPU in a process of its own.

    Raises:
        ConfigError: an unknown size, before anything is measured.
        WrongResult: one of our own results is wrong.
    """
    clock = clock_of(family.device)
    peers = family.quick if quick else family.peers
    rounds, counts = (3, [1]) if quick else (rounds, clock.thread_counts())
    sizes = sizes or (family.quick_sizes if quick else family.sizes)
    for size in sizes:
        family.case_of(size)
    threads = torch.get_num_threads()
    try:
        for size in sizes:
            for dtype in dtypes or DTYPES[family.device]:
                if time.monotonic() > until:
                    return
                case = family.case_of(size, device=family.device, dtype=getattr(torch, dtype))
                yield {"dtype": dtype, **_measure(family, case, peers, clock, counts, rounds, budget, until, tell, memories)}
                del case
    finally:
        torch.set_num_threads(threads)


def _measure(family: Family, case: Case, peers: Peers, clock: Clock, counts: list[int], rounds: int, budget: float, until: float,
             tell: Callable[[str, int, int], None], memories: bool) -> dict[str, Any]:
    tell(f"{case.name}, float64", 0, 1)
    torch.set_num_threads(counts[-1])
    expected = family.truth(case)
    on_gpu = family.device == "cuda"
    modes = (MODES[0], BACKWARD, MODES[1]) if on_gpu and case.modes == MODES else case.modes
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    others: dict[str, float | None] = {}
    for mode in modes:
        torch.compiler.reset()  # each compiled peer is compiled anew for each case, and never falls back to eager for its number
        ready: dict[str, Timing] = {}
        for place, (name, prepare) in enumerate(peers.items()):
            tell(f"{case.name}, {mode}: checking {name}", place, len(peers))
            rows[name, mode] = row = {"peer": name, "mode": mode}
            try:
                if name != OURS and time.monotonic() > until:
                    raise Unfit("the time was over")
                work = prepared(prepare, case, mode)
                if isinstance(work, Yardstick):
                    row["yardstick"] = True
                timing = tune(work, mode, expected, clock, counts)
                if isinstance(work, Work):
                    row |= _said(work, clock)
                    if on_gpu and mode != BACKWARD:
                        with work.switch():
                            row["extra_bytes"] = memory.extra_bytes_on_gpu(work.call(mode))
                ready[name] = timing
                if name == OURS:
                    ours = work
            except Unfit as why:
                row["left_out"] = str(why)
            except WrongResult as why:
                row["refused"] = str(why)
                if is_ours(name):
                    raise WrongResult(f"{case.name}, {mode}: {name}: {why}") from why
            except Exception as why:  # a peer's compiler may fail in any way; the others are still measured
                if name == OURS:
                    raise
                row["failed"] = f"{type(why).__name__}: {f'{why} '.splitlines()[0][:200].strip()}"
        if on_gpu and OURS in ready and not ready[OURS].prepared.launched and any(t.prepared.launched for t in ready.values()):
            rows[LAUNCHED, mode] = {"peer": LAUNCHED, "mode": mode}
            with ours.switch():
                by_call = clock.prepare(lambda ours=ours, mode=mode: ours.call(mode), capture=False)
                ready[LAUNCHED] = replace(ready[OURS], prepared=by_call, taken=clock.seconds(by_call.run), samples=[])
        others[mode] = take_turns(ready, clock, rounds, budget,
                                  lambda done, total, mode=mode: tell(f"{case.name}, {mode}", done, total))
        for name, timing in ready.items():
            rows[name, mode] |= _numbers(timing)
        ready, work, timing, ours, by_call = {}, None, None, None, None  # each may hold gigabytes
    if not on_gpu and memories:
        tell(f"{case.name}, memory", 0, 1)
        timed = [row for row in rows.values() if "median_ms" in row and "yardstick" not in row]
        extra = memory.measure(family.name, case.name, [(row["peer"], row["mode"], row["threads"]) for row in timed])
        for row, taken in zip(timed, extra, strict=True):
            row["extra_bytes"] = taken
    return {"name": case.name, "what": case.what, "shape": case.shape, "size": case.size, "axis": family.axis,
            "modes": modes, "needs": {mode: case.needs(mode) for mode in modes}, "cores_busy_with_others": others,
            "rows": list(rows.values())}


def _numbers(timing: Timing) -> dict[str, Any]:
    low, high = timing.quartiles
    return {"threads": timing.threads, **({"how": timing.prepared.how} if timing.prepared.how else {}),
            **({"launched": True} if timing.prepared.launched else {}),
            "median_ms": 1e3 * timing.median, "quartiles_ms": [1e3 * low, 1e3 * high], "fastest_ms": 1e3 * min(timing.samples),
            "rounds": len(timing.samples), "error_over_limit": timing.error}


def _said(work: Work, clock: Clock) -> dict[str, Any]:
    """A peer's note, and the time of a part that it names."""
    found: dict[str, Any] = {"note": work.note} if work.note else {}
    if work.part is not None:
        with torch.no_grad():
            work.part()  # compiled, perhaps
            found["part"] = {"name": work.part_name, "ms": 1e3 * min(clock.seconds(work.part) for _ in range(5))}
    return found
