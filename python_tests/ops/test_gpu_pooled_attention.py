"""pooled_attention alone on a GPU; see test_gpu_families.py. Needs only torch, numpy and pytest."""

from __future__ import annotations

from dataclasses import replace

import gpu
import pytest
import torch
from gpu import case_of
from op_cases.pooled_attention import PooledAttention
from op_checks import identical
from torch import Tensor

from case_fast.ops import pooled_attention
from case_fast.ops.device_flag import raise_pending

pytestmark = gpu.NEEDS["triton"]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch):
    with gpu.running(monkeypatch, PooledAttention, "triton"):
        yield


def test_dropout_is_the_cpu_s():
    case = case_of(PooledAttention, "prime sizes", dtype=torch.float64, dropout_p=0.4, seed=2**63 - 1)
    there = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in case.arguments().items()}
    found = pooled_attention(**case.arguments()).cpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CASE_FAST_BACKEND")
        assert (found - pooled_attention(**there)).abs().max() < 1e-12


@pytest.mark.parametrize("place, wrong", [(0, 1), (2, 10**6), (-1, 3), (1, -5)])
def test_a_bad_offset_is_raised_at_the_next_call_and_the_device_stays_usable(place, wrong):
    case = PooledAttention.made([3, 20, 5], device=gpu.DEVICE, dim=10)
    cu = case.cu.clone()
    cu[place] = wrong
    pooled_attention(**(case.arguments() | {"cu": cu}))
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="pooled_attention: cu"):
        raise_pending()
    raise_pending()
    with pytest.raises(IndexError, match="cu"):
        pooled_attention(**(case.arguments() | {"cu": cu, "validate": True}))
    assert pooled_attention(**case.arguments()).isfinite().all()


def test_nan_in_one_sequence_stays_there():
    case = case_of(PooledAttention, "reactions in context")
    clean = case.results()
    rows = slice(int(case.cu[1]), int(case.cu[2]))
    broken = {name: getattr(case, name).clone() for name in (*case.FLOATS, "grad_out")}
    for name, x in broken.items():
        x[rows if name == "rows" else 1] = torch.nan
    for name, x in replace(case, **broken).results().items():
        own = rows if name == "grad_rows" else 1
        x[own] = clean[name][own]
        assert identical(x, clean[name]), name


def test_wider_rows_run_on_the_reference(monkeypatch):
    monkeypatch.delenv("CASE_FAST_BACKEND")
    PooledAttention.made([5, 40], heads=1, dim=1030, device=gpu.DEVICE).close_to_truth()
