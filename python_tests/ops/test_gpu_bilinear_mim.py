"""bilinear_mim in Triton on a GPU, both scores, in-batch and sampled, against equations.py in float64."""

from __future__ import annotations

import hashlib
import importlib.util

import pytest
import torch
from torch import Tensor
from triton_worker import SEED
from triton_worker_bilinear_mim import DOT, SIGMOID, inputs, truth

from case_fast import ops
from case_fast.ops.device_flag import raise_pending

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

CASES = {
    # name: pairs, rows, dim, one to one, negatives (None: all), score
    "coarse": (16, 16, 300, True, None, SIGMOID),
    "fine": (1280, 64, 300, False, None, SIGMOID),
    "sampled": (1280, 1280, 300, True, 64, SIGMOID),
    "sampled, shared": (300, 70, 75, False, 19, SIGMOID),
    "prime sizes": (1009, 757, 13, False, None, SIGMOID),
    "more rows than a block": (5003, 1501, 300, False, None, SIGMOID),
    "one pair": (1, 1, 4, True, None, SIGMOID),
    "one row of y": (5, 1, 4, False, None, SIGMOID),
    "no pairs": (0, 3, 4, False, None, SIGMOID),
    "dot": (1009, 757, 13, False, None, DOT),
    "dot, sampled": (300, 70, 75, False, 19, DOT),
    "dot, one row of y": (5, 1, 4, False, None, DOT),
}


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CASE_FAST_BACKEND", "triton")
    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()
    raise_pending()


def made(case: str, dtype: str = "float32") -> dict[str, Tensor | None]:
    pairs, rows, dim, one_to_one, _, score = CASES[case]
    return inputs(pairs, rows, dim, one_to_one, score, dtype)


def on_gpu(case: str, given: dict[str, Tensor | None], **more) -> list[Tensor]:
    *_, negatives, score = CASES[case]
    there = {name: x if x is None else x.cuda() for name, x in given.items()}
    leaves = [there[name].requires_grad_() for name in ("x", "y", "weight") if there[name] is not None]
    *sides, logit = ops.mim_sides(leaves[0], leaves[1], there["weight"], there["positive"], negatives, SEED, score, **more)
    grads = torch.autograd.grad(sides, leaves, [there[name] for name in ("grad_side_y", "grad_side_x")])
    return [*(side.detach() for side in sides), logit, *grads]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, dtype):
    if dtype not in ("float32", "bfloat16") and case not in ("prime sizes", "dot", "sampled, shared"):
        return  # each takes seconds to compile
    *_, negatives, score = CASES[case]
    given = made(case, dtype)
    expected, plain = (truth(given, negatives, score, of) for of in (torch.float64, getattr(torch, dtype)))
    for found, right, usual in zip(on_gpu(case, given), expected, plain, strict=True):
        assert found.shape == right.shape
        if right.numel():
            error, usual_error = (found.cpu().double() - right).abs().max(), (usual.double() - right).abs().max()
            assert error <= 2 * usual_error + 1e-5


@pytest.mark.parametrize("case", ["more rows than a block", "sampled", "dot"])
def test_the_same_bits_every_time(case):
    given = made(case)

    def digest() -> str:
        return hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in on_gpu(case, given))).hexdigest()

    assert len({digest() for _ in range(10)}) == 1


def test_atomics_are_as_right():
    given = made("more rows than a block")
    exact = on_gpu("more rows than a block", given)
    for a, b in zip(on_gpu("more rows than a block", given, deterministic=False), exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["prime sizes", "sampled", "dot"])
def test_nothing_is_read_that_was_not_written(case, monkeypatch):
    """Memory that torch hands out holds NaN: outputs and workspaces."""
    given = made(case)
    before = on_gpu(case, given)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        after = on_gpu(case, given)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("wrong", [-1, 757, 2**40])
@pytest.mark.parametrize("case", ["prime sizes", "dot"])
def test_a_bad_positive_makes_its_own_loss_nan_and_is_raised_at_the_next_call(case, wrong):
    given = made(case)
    given["positive"][5] = wrong
    loss = ops.bilinear_mim(*(x if x is None else x.cuda() for x in (given["x"], given["y"], given["weight"], given["positive"])),
                            reduction="none", score=CASES[case][-1])
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="positive"):
        raise_pending()
    assert loss.isnan().nonzero().flatten().tolist() == [5]


def test_a_nan_row_shows_and_large_scores_are_finite():
    given = made("prime sizes")
    given["y"][3] = float("nan")
    side_y, side_x, *_ = on_gpu("prime sizes", given)
    assert side_y.isnan().all() and torch.equal(side_x.isnan().cpu(), given["positive"] == 3)
    given = made("prime sizes")
    given["weight"] *= 1e4
    assert all(x.isfinite().all() for x in on_gpu("prime sizes", given))


@pytest.mark.parametrize("case", ["fine", "sampled", "dot"])
def test_replayed_from_a_cuda_graph(case):
    given = {name: x if x is None else x.cuda() for name, x in made(case).items()}
    *_, negatives, score = CASES[case]
    leaves = [given[name].requires_grad_() for name in ("x", "y", "weight") if given[name] is not None]

    def step() -> tuple[Tensor, ...]:
        loss = ops.bilinear_mim(given["x"], given["y"], given["weight"], given["positive"], negatives, 3, score=score)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=side):
        found = step()
    for x in found:
        x.fill_(float("nan"))
    captured.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_large_batch_takes_little_memory():
    x, y = (torch.randn(32768, 300, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    weight = (torch.randn(300, 300, device="cuda", dtype=torch.bfloat16) / 150).requires_grad_()
    torch.autograd.grad(ops.bilinear_mim(x, y, weight), (x, y, weight))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(ops.bilinear_mim(x, y, weight), (x, y, weight))
    assert torch.cuda.max_memory_allocated() - before < 300e6  # the scores alone would take 2.1e9
