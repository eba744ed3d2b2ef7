"""bilinear_mim alone on a GPU, in Triton; see test_gpu_families.py."""

from __future__ import annotations

from dataclasses import replace

import gpu
import pytest
import torch
from gpu import case_of
from op_cases.bilinear_mim import BilinearMIM

from case_fast.ops import bilinear_mim, mim_sides
from case_fast.ops.device_flag import raise_pending

pytestmark = gpu.NEEDS["triton"]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch):
    with gpu.running(monkeypatch, BilinearMIM, "triton"):
        yield


def test_atomics_are_as_right():
    case = case_of(BilinearMIM, "more rows than a block")
    exact = case.results()
    for name, x in case.results(lambda **given: mim_sides(**given, deterministic=False)).items():
        assert torch.allclose(x, exact[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 757, 2**40])
@pytest.mark.parametrize("shape", ["prime sizes", "dot"])
def test_a_bad_positive_makes_its_own_loss_nan_and_is_raised_at_the_next_call(shape, wrong):
    case = case_of(BilinearMIM, shape)
    case.positive[5] = wrong
    loss = bilinear_mim(**case.arguments(), reduction="none")
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="positive"):
        raise_pending()
    assert loss.isnan().nonzero().flatten().tolist() == [5]


def test_a_nan_row_shows_and_large_scores_are_finite():
    case = case_of(BilinearMIM, "prime sizes")
    assert all(x.isfinite().all() for x in replace(case, weight=case.weight * 1e4).results().values())
    case.y[3] = torch.nan
    found = case.results()
    assert found["side_y"].isnan().all() and torch.equal(found["side_x"].isnan(), case.positive == 3)


def test_a_large_batch_takes_little_memory():
    x, y = (torch.randn(32768, 300, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    weight = (torch.randn(300, 300, device="cuda", dtype=torch.bfloat16) / 150).requires_grad_()
    torch.autograd.grad(bilinear_mim(x, y, weight), (x, y, weight))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(bilinear_mim(x, y, weight), (x, y, weight))
    assert torch.cuda.max_memory_allocated() - before < 300e6  # the scores alone would take 2.1e9
