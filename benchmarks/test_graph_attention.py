"""graph_attention and its peers under pytest-benchmark; groups: a size, forward or forward+backward."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.graph_attention import truth
from benchmarks.graph_attention_peers import PEERS
from benchmarks.graphs import Case, case_of
from benchmarks.measure import MODES, Truth, Unfit, thread_counts, tune
from case_fast.errors import ConfigError


@cache
def checked_case(size: str) -> tuple[Case, Truth]:
    try:
        case = case_of(size)
    except ConfigError as error:
        pytest.skip(str(error))
    return case, truth(case)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("peer", PEERS)
def test_graph_attention(benchmark, request, size, mode, peer):
    case, expected = checked_case(size)
    torch.compiler.reset()
    try:
        work = PEERS[peer](case)
    except Unfit as why:
        pytest.skip(f"{peer}: {why}")
    if mode == MODES[1] and not work.trains:
        pytest.skip(f"{peer}: {work.note}")
    given = request.config.getoption("--threads")
    timing, _ = tune(work, mode, expected, [given] if given else thread_counts())  # raises WrongResult
    torch.set_num_threads(timing.threads)
    benchmark.group = f"{size}, {mode}"
    benchmark.extra_info.update(threads=timing.threads, error_over_limit=timing.error)
    benchmark(work.run, mode)
