"""cross_attention alone on a GPU: the kernels of decoding; see test_gpu_families.py. Needs only torch, numpy and pytest."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import gpu
import pytest
import torch
from gpu import case_of
from op_case import within
from op_cases.cross_attention import CrossAttention
from op_checks import counted, nan_filled

from case_fast.ops.device_flag import raise_pending

pytestmark = gpu.NEEDS["native"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch):
    with gpu.running(monkeypatch, CrossAttention, "native"):
        yield


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", CrossAttention.VARIANTS, ids=["", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CrossAttention.ON_GPU)
def test_without_gradients_it_keeps_the_rule(shape, dtype, variant, fused, monkeypatch):
    monkeypatch.setattr(CrossAttention.kernels(), "FEW_ROWS", 256 if fused else -1)
    case = case_of(CrossAttention, shape, dtype=dtype, **variant)
    with counted(CrossAttention) as calls, torch.no_grad():
        found = case.call()["out"]
    assert calls["cross_attention_forward_cuda"] == fused
    plain, true = case.call(case.plain)["out"], case.to(torch.float64).call(case.plain)["out"]
    assert found.dtype == dtype and found.shape == true.shape
    within("out", found, plain, true, dtype)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name, place, wrong", [("cu_hidden", 2, 10**6), ("cu_keys", 1, -5), ("key_of", 0, 2)])
def test_a_bad_entry_is_raised_at_the_next_call_and_the_device_stays_usable(name, place, wrong, trained):
    case = case_of(CrossAttention, "shared keys")
    index = (case.cu_hidden if name == "cu_hidden" else getattr(case.sources[1], name)).clone()
    index[place] = wrong
    broken = replace(case, cu_hidden=index) if name == "cu_hidden" else case.with_source(1, **{name: index})
    with pytest.raises(IndexError, match=name):
        broken.having({"hidden": case.hidden.detach().requires_grad_(trained)}).call()
        torch.cuda.synchronize()
        raise_pending()  # where no launch of the same call has seen it
    torch.cuda.synchronize()
    with suppress(IndexError):  # what launches after the first have found
        raise_pending()
    raise_pending()
    assert case.call()["out"].isfinite().all()


def test_a_step_gives_the_same_bits_every_time_and_from_a_cuda_graph():
    case = case_of(CrossAttention, "the paper's step")
    first = case.call()
    assert all(gpu.same_bits(case.call(), first) for _ in range(10))
    assert gpu.replayed_is_launched(case.call)


@pytest.mark.parametrize("shape", CrossAttention.ON_GPU)
def test_a_step_reads_nothing_that_was_not_written(shape):
    case = case_of(CrossAttention, shape, **CrossAttention.VARIANTS[1])
    clean = case.call()
    with nan_filled():
        assert gpu.same_bits(case.call(), clean)


def test_autocast_computes_a_step_in_its_dtype():
    case = case_of(CrossAttention, "the paper's training")
    with torch.autocast("cuda", torch.bfloat16):
        assert case.call()["out"].dtype == torch.bfloat16
