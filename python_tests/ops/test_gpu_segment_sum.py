"""segment_sum alone on a GPU; see test_gpu_families.py. Needs only torch, numpy and pytest."""

from __future__ import annotations

import gpu
import pytest
import torch
from gpu import case_of
from op_cases.segment_sum import SegmentSum
from op_checks import identical
from torch import Tensor

from case_fast.ops import reference, segment_sum, take
from case_fast.ops.device_flag import raise_pending


@pytest.fixture(autouse=True, params=[pytest.param(looks, marks=gpu.NEEDS["triton"], id=str(looks)) for looks in (1 << 24, -1)])
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """In one launch, and sorted first."""
    with gpu.running(monkeypatch, SegmentSum, "triton"):
        from case_fast.ops import segment_sum_triton

        monkeypatch.setattr(segment_sum_triton, "MOST_LOOKS", request.param)
        yield


def on_gpu(function, *arguments) -> Tensor:
    found = function(*arguments)
    torch.cuda.synchronize()
    return found


@pytest.mark.parametrize("wrong", [16, -1, 2**31, -(2**40)])
def test_a_bad_number_is_left_out_and_raised_at_the_next_call_and_the_device_stays_usable(wrong):
    case = case_of(SegmentSum, "knowledge")
    case.segment[5] = wrong
    good = (case.segment != wrong).nonzero().flatten()
    out = on_gpu(segment_sum, case.x, case.segment, 16)
    with pytest.raises(IndexError, match="segment_sum: segment"):
        raise_pending()
    expected = reference.segment_sum(case.x[good].double(), case.segment[good], 16)
    assert torch.allclose(out.double(), expected, atol=1e-4)
    rows = on_gpu(take, case.grad_out, case.segment)
    with pytest.raises(IndexError, match="segment_sum: segment"):
        raise_pending()
    assert rows.isnan().any(1).nonzero().flatten().tolist() == [5]
    assert case_of(SegmentSum, "texts").results()["out"].isfinite().all()


def test_the_gradients_of_both_are_differentiable_again():
    x = torch.randn(9, 4, dtype=torch.float64, device=gpu.DEVICE, requires_grad=True)
    index = torch.randint(5, (9,), device=gpu.DEVICE)
    assert torch.autograd.gradgradcheck(lambda x: segment_sum(x, index, 5).square(), x)
    assert torch.autograd.gradgradcheck(lambda x: take(x, index).square(), x)


def test_compiled_without_breaks_it_gives_the_same():
    case = case_of(SegmentSum, "texts")
    compiled = torch.compile(lambda x, segment: take(segment_sum(x, segment, 430) * 2, segment), fullgraph=True)
    assert identical(compiled(case.x, case.segment), take(segment_sum(case.x, case.segment, 430) * 2, case.segment))
