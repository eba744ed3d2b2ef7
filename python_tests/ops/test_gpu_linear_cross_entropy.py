"""linear_cross_entropy and top_words alone on a GPU, in Triton; see test_gpu_families.py."""

from __future__ import annotations

from dataclasses import replace

import gpu
import pytest
import torch
from gpu import case_of
from op_case import within
from op_cases.linear_cross_entropy import RECOMPUTE, LinearCrossEntropy, best_of_equations

from case_fast.ops import linear_cross_entropy
from case_fast.ops.device_flag import raise_pending

pytestmark = gpu.NEEDS["triton"]
BEST = {  # rows, words, dim, k
    "greedy": (16, 24007, 300, 1),
    "beams": (80, 24007, 300, 5),
    "most": (7, 757, 13, 32),
    "all words": (3, 20, 4, 20),
    "many words": (2, 200_003, 16, 7),
}


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch):
    with gpu.running(monkeypatch, LinearCrossEntropy, "triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", BEST)
def test_the_most_probable_words_keep_the_rule(shape, dtype):
    rows, words, dim, k = BEST[shape]
    case = LinearCrossEntropy.made(rows, words, dim, dtype=dtype, device=gpu.DEVICE, magnitude=2.0)
    exact = case.to(torch.float64)
    value, word = case.best(k).values()
    true = exact.best(k, best_of_equations)["log_probability"]
    within("log_probability", value, case.best(k, best_of_equations)["log_probability"], true, dtype)
    log_p = torch.nn.functional.linear(*exact.floats().values()).log_softmax(1)
    assert (log_p.gather(1, word) - value.double()).abs().max() <= 1e-4
    assert all(len(set(row)) == k for row in word.tolist())


def test_ties_go_to_the_lowest_word_and_forbidden_words_never_win():
    case = LinearCrossEntropy.made(33, 24007, 8, device=gpu.DEVICE, magnitude=2.0)
    bias = torch.zeros_like(case.bias)
    bias[:50] = -torch.inf
    case = replace(case, hidden=case.hidden.round(), weight=case.weight[:100].round().repeat(241, 1)[:24007], bias=bias)
    assert torch.equal(case.call()["prediction"], case.call(case.plain)["prediction"])
    assert torch.equal(case.best(30)["word"], case.best(30, best_of_equations)["word"])


def test_nan_shows_and_a_row_without_gradient_takes_no_part():
    case = case_of(LinearCrossEntropy, "prime sizes", k=4)
    case.hidden[3] = torch.nan
    found = case.results()
    assert found["nll"].isnan().nonzero().flatten().tolist() == [3] and found["prediction"][3] == 0
    value, word = found["log_probability"], found["word"]
    assert value[3].isnan().all() and word[3].tolist() == [0, 1, 2, 3] and value[:3].isfinite().all()
    case.grad_nll[3] = 0
    found = case.results()
    assert all(found[f"grad_{name}"].isfinite().all() for name in case.FLOATS) and not found["grad_hidden"][3].any()


@pytest.mark.parametrize("wrong", [-1, 757, 2**40])
@pytest.mark.parametrize("shape", ["prime sizes", "prime sizes, several"])
def test_a_wrong_target_makes_its_own_loss_nan_and_is_raised_at_the_next_call(shape, wrong):
    case = case_of(LinearCrossEntropy, shape, keep_bytes=RECOMPUTE)
    case.target[5] = wrong
    nll, _ = linear_cross_entropy(**case.arguments())
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="target"):
        raise_pending()
    assert nll.isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize(("place", "wrong"), [(0, 1), (0, -1), (3, 10**6), (4, -(2**40)), (-1, 2)])
def test_wrong_offsets_are_raised_at_the_next_call(place, wrong):
    case = case_of(LinearCrossEntropy, "prime sizes, several", keep_bytes=RECOMPUTE)
    case.cu_target[place] = wrong
    linear_cross_entropy(**case.arguments())
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="cu_target"):
        raise_pending()


def test_a_cuda_graph_replays_the_same_bits_in_half_precision():
    for shape in ("training", "bags of words"):
        for variant in LinearCrossEntropy.VARIANTS:
            assert gpu.replayed_is_launched(case_of(LinearCrossEntropy, shape, dtype=torch.bfloat16, **variant).results), shape


def test_recomputed_scores_take_little_memory():
    case = LinearCrossEntropy.made(4096, 24007, 300, dtype=torch.bfloat16, device=gpu.DEVICE, keep_bytes=RECOMPUTE)
    leaves = [x.requires_grad_() for x in case.floats().values()]

    def run() -> None:
        nll, _ = linear_cross_entropy(*leaves, case.target, RECOMPUTE)
        torch.autograd.grad(nll, leaves, case.grad_nll)

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    own = sum(x.numel() * x.element_size() for x in leaves)  # of the gradients
    assert torch.cuda.max_memory_allocated() - before - own < 40e6  # the scores alone would take 393e6
