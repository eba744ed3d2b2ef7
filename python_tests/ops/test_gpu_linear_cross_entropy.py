"""linear_cross_entropy and top_words in Triton on a GPU against equations.py in float64."""

from __future__ import annotations

import hashlib
import importlib.util

import pytest
import torch
from torch import Tensor
from triton_worker_linear_cross_entropy import inputs, truth

from case_fast import equations, ops
from case_fast.ops.device_flag import raise_pending

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

CASES = {
    # name: rows, words, dim, several targets a row
    "training": (480, 24007, 300, False),
    "bags of words": (16, 24007, 300, True),
    "more rows than a block": (5003, 1009, 300, False),
    "prime sizes": (101, 757, 13, False),
    "prime sizes, several": (101, 757, 13, True),
    "one row": (1, 757, 64, False),
    "one word": (5, 1, 4, True),
    "no rows": (0, 7, 4, False),
}
BEST = {
    # name: rows, words, dim, k
    "greedy": (16, 24007, 300, 1),
    "beams": (80, 24007, 300, 5),
    "most": (7, 757, 13, 32),
    "all words": (3, 20, 4, 20),
    "many words": (2, 200_003, 16, 7),
}
KEEP = {"kept": 1 << 40, "recomputed": 0}
LEAVES = ("hidden", "weight", "bias")


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CASE_FAST_BACKEND", "triton")
    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()
    raise_pending()


def there(given: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: x if x is None else x.cuda() for name, x in given.items()}


def on_gpu(given: dict[str, Tensor | None], keep_bytes: int = 0) -> list[Tensor]:
    made = there(given)
    leaves = [made[name].requires_grad_() for name in LEAVES]
    nll, prediction = ops.linear_cross_entropy(*leaves, made["target"], keep_bytes, made["cu_target"])
    return [nll.detach(), *torch.autograd.grad(nll, leaves, made["grad_nll"]), prediction]


def within(found: Tensor, right: Tensor, usual: Tensor) -> bool:
    """The house's rule."""
    if not right.numel():
        return found.shape == right.shape
    error, usual_error = ((x.cpu().double() - right).abs().max() for x in (found, usual))
    return found.shape == right.shape and bool(error <= 2 * usual_error + 1e-5)


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, dtype, keep):
    if dtype not in ("float32", "bfloat16") and not case.startswith("prime"):
        return  # each takes seconds to compile
    given = inputs(*CASES[case], dtype)
    *expected, _ = truth(given)
    *plain, _ = truth(given, getattr(torch, dtype))
    *found, prediction = on_gpu(given, KEEP[keep])
    for ours, right, usual in zip(found, expected, plain, strict=True):
        assert within(ours, right, usual)
    z = torch.nn.functional.linear(*(given[name].double() for name in LEAVES))
    if z.numel():  # rounding may choose another word of as great a z
        chosen = z.gather(1, prediction.cpu().unsqueeze(1)).squeeze(1)
        assert (z.amax(1) - chosen).max() <= 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("case", BEST)
def test_the_most_probable_words(case, dtype):
    rows, words, dim, k = BEST[case]
    given = inputs(rows, words, dim, False, dtype)
    value, word = ops.top_words(*(given[name].cuda() for name in LEAVES), k)
    exact = [given[name].double() for name in LEAVES]
    plain = equations.top_words(*(given[name] for name in LEAVES), k)[0]
    assert within(value, equations.top_words(*exact, k)[0], plain)
    log_p = torch.log_softmax(torch.nn.functional.linear(*exact), 1)
    assert (log_p.gather(1, word.cpu()) - value.cpu().double()).abs().max() <= 1e-4
    assert all(len(set(row)) == k for row in word.tolist())


def test_ties_go_to_the_lowest_word_and_forbidden_words_never_win():
    given = inputs(33, 24007, 8, False, "float32")
    given["weight"] = given["weight"][:100].round().repeat(241, 1)[:24007]
    given["hidden"] = given["hidden"].round()
    given["bias"] = torch.zeros(24007)
    given["bias"][:50] = -torch.inf
    exact = [given[name] for name in LEAVES]
    assert torch.equal(on_gpu(given)[4].cpu(), truth(given)[4])
    assert torch.equal(ops.top_words(*(x.cuda() for x in exact), 30)[1].cpu(), equations.top_words(*exact, 30)[1])


def test_nan_shows_and_a_row_without_gradient_takes_no_part():
    given = inputs(101, 757, 13, False, "float32")
    given["hidden"][3] = torch.nan
    nll, *_, prediction = on_gpu(given)
    assert nll.isnan().nonzero().flatten().tolist() == [3] and prediction[3] == 0
    given["grad_nll"][3] = 0
    grads = on_gpu(given)[1:4]
    assert all(x.isfinite().all() for x in grads) and not grads[0][3].any()
    value, word = ops.top_words(*(given[name].cuda() for name in LEAVES), 4)
    assert value[3].isnan().all() and word[3].tolist() == [0, 1, 2, 3] and value[:3].isfinite().all()


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("case", ["training", "bags of words", "more rows than a block"])
def test_the_same_bits_every_time(case, keep):
    given = inputs(*CASES[case], "float32")

    def digest() -> str:
        return hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in on_gpu(given, KEEP[keep]))).hexdigest()

    assert len({digest() for _ in range(10)}) == 1


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("case", ["prime sizes", "prime sizes, several"])
def test_nothing_is_read_that_was_not_written(case, keep, monkeypatch):
    """Memory that torch hands out holds NaN: outputs and workspaces."""
    given = inputs(*CASES[case], "float32")

    def run() -> list[Tensor]:
        made = there(given)
        return [*on_gpu(given, KEEP[keep]), *ops.top_words(*(made[name] for name in LEAVES), 5)]

    before = run()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        after = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("wrong", [-1, 757, 2**40])
@pytest.mark.parametrize("case", ["prime sizes", "prime sizes, several"])
def test_a_wrong_target_makes_its_own_loss_nan_and_is_raised_at_the_next_call(case, wrong):
    given = inputs(*CASES[case], "float32")
    given["target"][5] = wrong
    made = there(given)
    nll, _ = ops.linear_cross_entropy(*(made[name] for name in LEAVES), made["target"], 0, made["cu_target"])
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="target"):
        raise_pending()
    assert nll.isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize(("place", "wrong"), [(0, 1), (0, -1), (3, 10**6), (4, -(2**40)), (-1, 2)])
def test_wrong_offsets_are_raised_at_the_next_call(place, wrong):
    given = inputs(*CASES["prime sizes, several"], "float32")
    given["cu_target"][place] = wrong
    made = there(given)
    ops.linear_cross_entropy(*(made[name] for name in LEAVES), made["target"], 0, made["cu_target"])
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="cu_target"):
        raise_pending()


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("case", ["training", "bags of words"])
def test_replayed_from_a_cuda_graph(case, keep):
    made = there(inputs(*CASES[case], "bfloat16"))
    leaves = [made[name].requires_grad_() for name in LEAVES]

    def step() -> tuple[Tensor, ...]:
        nll, prediction = ops.linear_cross_entropy(*leaves, made["target"], KEEP[keep], made["cu_target"])
        return nll.detach(), prediction, *torch.autograd.grad(nll, leaves, made["grad_nll"]), *ops.top_words(*leaves, 5)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=side):
        found = step()
    for x in found:
        x.zero_()
    captured.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_recomputed_scores_take_little_memory():
    made = there(inputs(4096, 24007, 300, False, "bfloat16"))
    leaves = [made[name].requires_grad_() for name in LEAVES]

    def run() -> None:
        nll, _ = ops.linear_cross_entropy(*leaves, made["target"], 0)
        torch.autograd.grad(nll, leaves, made["grad_nll"])

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    own = sum(x.numel() * x.element_size() for x in leaves)  # of the gradients
    assert torch.cuda.max_memory_allocated() - before - own < 40e6  # the scores alone would take 393e6
