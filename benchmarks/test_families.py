"""Each family and its peers under pytest-benchmark; groups: a size, forward or forward+backward."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.measure import Case, Truth, Unfit, Work, thread_counts, tune
from benchmarks.run import Family, family_of
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
    try:
        work = known.peers[peer](case)
    except Unfit as why:
        pytest.skip(f"{peer}: {why}")
    if mode not in case.modes or (isinstance(work, Work) and mode != case.modes[0] and not work.trains):
        pytest.skip(f"{peer}: no {mode}")
    given = request.config.getoption("--threads")
    timing, _ = tune(work, mode, expected, [given] if given else thread_counts())  # raises WrongResult
    torch.set_num_threads(timing.threads)
    benchmark.group = f"{family}, {size}, {mode}"
    benchmark.extra_info.update(threads=timing.threads, error_over_limit=timing.error)
    benchmark(work.run, mode)
