"""Each family and its peers under pytest-benchmark; groups: a size, forward or forward+backward."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.clock import CpuClock
from benchmarks.family import Family, family_of
from benchmarks.measure import Case, Truth, Unfit, prepared, tune
from case_fast.errors import ConfigError


@cache
def checked_case(name: str, size: str) -> tuple[Family, Case, Truth]:
    family = family_of(name)
    try:
        case = family.case_of(size)
    except ConfigError as error:
        pytest.skip(str(error))
    return family, case, family.truth(case)


def test_peer(benchmark, request, family, size, mode, peer):
    known, case, expected = checked_case(family, size)
    torch.compiler.reset()
    if mode not in case.modes:
        pytest.skip(f"{size}: no {mode}")
    try:
        work = prepared(known.peers[peer], case, mode)
    except Unfit as why:
        pytest.skip(f"{peer}: {why}")
    clock, given = CpuClock(), request.config.getoption("--threads")
    timing = tune(work, mode, expected, clock, [given] if given else clock.thread_counts())  # raises WrongResult
    torch.set_num_threads(timing.threads)
    benchmark.group = f"{family}, {size}, {mode}"
    benchmark.extra_info.update(threads=timing.threads, error_over_limit=timing.error)
    benchmark(timing.prepared.run)
