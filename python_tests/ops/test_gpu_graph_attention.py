"""graph_attention alone on a GPU, by each backend and plan; see test_gpu_families.py. Needs only torch, numpy and pytest."""

from __future__ import annotations

from dataclasses import replace

import gpu
import pytest
import torch
from gpu import case_of
from op_cases.graph_attention import GraphAttention
from torch import Tensor

from case_fast.ops import graph_attention
from case_fast.ops.device_flag import raise_pending

BATCH = "the paper's batch"
WAYS = [("native", 0), ("native", 1), ("native", 2), ("triton", 0)]  # and its plan: chosen, by graphs, by rows


@pytest.fixture(autouse=True, params=[pytest.param(way, marks=gpu.NEEDS[way[0]], id=f"{way[0]}-{way[1]}") for way in WAYS])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    with gpu.running(monkeypatch, GraphAttention, *request.param):
        yield


def forward(case: GraphAttention) -> Tensor:
    """Output alone: backward would raise what forward has found."""
    out = case.call()["out"]
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("name, wrong", [("indices", 1344), ("indices", -1), ("relation", 7), ("indptr", -5)])
def test_a_bad_index_is_raised_at_the_next_call_and_the_device_stays_usable(name, wrong):
    case = case_of(GraphAttention, BATCH)
    getattr(case, name)[5] = wrong
    forward(case)
    with pytest.raises(IndexError, match=name):
        raise_pending()
    raise_pending()
    assert case_of(GraphAttention, "plain").results()["out"].isfinite().all()


def test_a_bad_index_makes_its_own_row_nan_alone():
    case = case_of(GraphAttention, BATCH, isolated=0.0)
    row = next(row for row in range(9, 1344) if case.indptr[row] < case.indptr[row + 1])
    case.indices[int(case.indptr[row])] = 99999
    rows = forward(case).isnan().any(dim=(1, 2)).nonzero().flatten().tolist()
    with pytest.raises(IndexError):
        raise_pending()
    assert rows == [row]


def test_nan_in_one_graph_stays_there():
    case = case_of(GraphAttention, BATCH)
    clean = case.results()
    broken = {name: getattr(case, name).clone() for name in ("query", "key", "value", "grad_out")}
    for x in broken.values():
        x[84:168] = torch.nan
    found = replace(case, **broken).results()
    others = torch.cat([torch.arange(84), torch.arange(168, 1344)])
    assert all(torch.equal(found[name][others], clean[name][others]) for name in ("out", "grad_query", "grad_key", "grad_value"))


def test_compiled_without_breaks_it_gives_the_same():
    arguments = case_of(GraphAttention, BATCH).arguments()
    compiled = torch.compile(lambda **x: graph_attention(**x) * 2, fullgraph=True)
    assert torch.equal(compiled(**arguments), graph_attention(**arguments) * 2)
