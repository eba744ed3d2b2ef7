"""packed_attention alone on a GPU, by both plans; see test_gpu_families.py. Needs only torch, numpy and pytest."""

from __future__ import annotations

from dataclasses import replace

import gpu
import pytest
import torch
from gpu import case_of
from op_cases.packed_attention import PackedAttention
from op_checks import identical
from torch import Tensor

from case_fast.ops import packed_attention
from case_fast.ops.device_flag import raise_pending

pytestmark = gpu.NEEDS["native"]


@pytest.fixture(autouse=True, params=[0, 1, 2], ids=["auto", "rows", "tiles"])
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    with gpu.running(monkeypatch, PackedAttention, "native", request.param):
        yield


def test_dropout_is_the_cpu_s():
    case = case_of(PackedAttention, "primes", dtype=torch.float64, dropout_p=0.4, seed=2**63 - 1)
    there = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in case.arguments().items()}
    assert (packed_attention(**case.arguments()).cpu() - packed_attention(**there)).abs().max() < 1e-12


@pytest.mark.parametrize("name, place, wrong", [("cu_query", 2, 10**6), ("cu_query", -1, 3), ("cu_key", 1, -5), ("key_of", 0, 3),
                                                ("key_of", 2, -1), ("key_length", 1, 65)])
def test_a_bad_entry_is_raised_at_the_next_call_and_the_device_stays_usable(name, place, wrong):
    case = PackedAttention.made([3, 20, 5], [9, 64, 5], device=gpu.DEVICE, share=True, room=True, dim=10)
    index = getattr(case, name).clone()
    index[place] = wrong
    packed_attention(**(case.arguments() | {name: index}))
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=name if name != "cu_key" else "cu_key|key_length"):
        raise_pending()
    raise_pending()
    with pytest.raises(IndexError, match=name):
        packed_attention(**(case.arguments() | {name: index, "validate": True}))
    assert packed_attention(**case.arguments()).isfinite().all()


def test_nan_in_one_sequence_stays_there():
    case = case_of(PackedAttention, "the paper's decoder")
    clean = case.results()
    span, keys = (slice(int(cu[1]), int(cu[2])) for cu in (case.cu_query, case.cu_key))
    broken = {name: getattr(case, name).clone() for name in (*case.FLOATS, "grad_out")}
    for name, x in broken.items():
        x[keys if name in ("key", "value") else span] = torch.nan
    found = replace(case, **broken).results()
    for name, x in found.items():
        own = keys if name in ("grad_key", "grad_value") else span
        x[own] = clean[name][own]
        assert identical(x, clean[name]), name
