"""linear_cross_entropy and top_words alone; what all ops have in common is in test_families.py."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import close
from op_cases.linear_cross_entropy import BASE, KEEP, OF_BOTH, RECOMPUTE, LinearCrossEntropy
from op_checks import counted, identical
from torch.nn import functional as F

from case_fast.ops import linear_cross_entropy, top_words

FLOATS, KERNELS, make_case = LinearCrossEntropy.FLOATS, LinearCrossEntropy.kernels(), LinearCrossEntropy.made


# ---- what the op means


def test_the_loss_and_the_best_words_are_torchs(runs):
    case = make_case(13, 41, dim=7, dtype=torch.float64)
    scores = F.linear(case.hidden, case.weight, case.bias)
    found = case.results()
    assert close(found["nll"], F.cross_entropy(scores, case.target, reduction="none"), 1e-12)
    assert torch.equal(found["prediction"], scores.argmax(1))
    value, word = scores.log_softmax(1).topk(5, dim=1)
    top = case.best(5)
    assert close(top["log_probability"], value, 1e-12) and torch.equal(top["word"], word)


@pytest.mark.parametrize("keep_bytes", [KEEP, RECOMPUTE])
@pytest.mark.parametrize("rows", [3, 40])
def test_a_bag_of_words_is_each_row_repeated_for_each_of_its_targets(runs, rows, keep_bytes):
    """Eq. 8; a row without targets, one with the same word twice, and one with many."""
    sizes = [0, 2, 17] if rows == 3 else torch.randint(5, (rows,)).tolist()
    case = make_case(rows, 60, 7, dtype=torch.float64, keep_bytes=keep_bytes)
    row_of = torch.arange(rows).repeat_interleave(torch.tensor(sizes))
    target = torch.randint(60, (sum(sizes),))
    target[:2] = 5
    leaves = [x.clone().requires_grad_() for x in case.floats().values()]
    cu_target = torch.tensor([0, *itertools.accumulate(sizes)])
    nll, prediction = linear_cross_entropy(*leaves, target, keep_bytes, cu_target)
    alone, predicted = linear_cross_entropy(leaves[0][row_of], *leaves[1:], target, keep_bytes)
    plain = F.cross_entropy(F.linear(leaves[0][row_of], *leaves[1:]), target, reduction="none")
    assert close(nll, plain, 1e-12) and close(alone, plain, 1e-12) and torch.equal(prediction[row_of], predicted)
    found, expected = torch.autograd.grad(nll.mean(), leaves), torch.autograd.grad(plain.mean(), leaves)
    assert all(close(a, b, 1e-12) for a, b in zip(found, expected, strict=True))
    assert rows > 3 or not found[0][0].any()


def test_both_decoder_losses_are_one_weighting_of_the_nll(runs):
    case = make_case(9, 15, dtype=torch.float64)
    word_weight = torch.rand(15, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = []
    for two_losses in (True, False):
        leaf = case.hidden.detach().requires_grad_()
        if two_losses:
            log_p = F.linear(leaf, case.weight, case.bias).log_softmax(1)
            loss = F.nll_loss(log_p, case.target) + 1.5 * F.nll_loss(log_p, case.target, word_weight, reduction="sum") / 9
        else:
            nll, _ = linear_cross_entropy(leaf, case.weight, case.bias, case.target)
            loss = ((1 + 1.5 * word_weight[case.target]) * nll).sum() / 9
        grads.append(torch.autograd.grad(loss, leaf)[0])
    assert close(*grads, 1e-12)


@pytest.mark.parametrize("rows", [1, 24, 25, 300])
def test_of_equal_scores_the_lowest_word_is_predicted(runs, rows):
    """Within a vector, a block of 192 words, and across what threads share."""
    words, hidden = 1000, torch.zeros(rows, 3)
    for equal in ([0, 1], [7, 8, 15, 16], [190, 191, 192, 193], [5, 999], [400, 700], [998, 999], range(words)):
        bias = torch.zeros(words)
        bias[list(equal)] = 1.5
        target = torch.zeros(rows, dtype=torch.int64)
        assert (linear_cross_entropy(hidden, torch.ones(words, 3), bias, target)[1] == min(equal)).all()
        for k in (1, 2, 4, len(list(equal))):
            value, word = top_words(hidden, torch.ones(words, 3), bias, k)
            order = [*equal, *(v for v in range(words) if v not in equal)][:k]
            assert (word == torch.tensor(order)).all() and (value[:, 1:] <= value[:, :-1]).all()


@pytest.mark.parametrize("rows", [5, 40])
def test_a_bias_of_minus_infinity_forbids_a_word(runs, rows):
    case = make_case(rows, 400, 9, dtype=torch.float64)
    free = torch.arange(400) % 3 == 1
    bias = case.bias.masked_fill(~free, -math.inf)
    target = free.nonzero().squeeze(1)[torch.randint(int(free.sum()), (rows,))]
    leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight, bias)]
    nll, prediction = linear_cross_entropy(*leaves, target)
    among = [x.clone().requires_grad_() for x in (case.hidden, case.weight[free], bias[free])]
    expected = F.cross_entropy(F.linear(*among), target // 3, reduction="none")
    assert close(nll, expected, 1e-12) and free[prediction].all()
    found, plain = torch.autograd.grad(nll.sum(), leaves), torch.autograd.grad(expected.sum(), among)
    assert close(found[0], plain[0], 1e-12) and close(found[1][free], plain[1], 1e-12) and close(found[2][free], plain[2], 1e-12)
    assert not found[1][~free].any() and not found[2][~free].any()
    value, word = top_words(case.hidden, case.weight, bias, 200)
    assert free[word[:, :133]].all() and (value[:, 133:] == -math.inf).all()
    assert torch.equal(word[:, 133:], (~free).nonzero().squeeze(1)[:67].expand(rows, -1))
    forbidden = target - 1
    nll, _ = linear_cross_entropy(case.hidden, case.weight, bias, forbidden)
    assert (nll == math.inf).all()


@pytest.mark.parametrize(
    "rows, words, k", [(1, 24000, 1), (1, 24000, 5), (16, 5000, 5), (80, 3000, 50), (3, 100, 100), (2, 1, 1)]
)
def test_top_words_are_the_topk_of_log_softmax(runs, rows, words, k):
    case = make_case(rows, words, 40, dtype=torch.float64, magnitude=2.0)
    value, word = top_words(**case.floats(), k=k)
    expected = F.log_softmax(F.linear(*case.floats().values()), dim=1).topk(k)
    assert close(value, expected.values, 1e-12) and torch.equal(word, expected.indices)
    predicted = linear_cross_entropy(**case.arguments())[1]
    assert torch.equal(word[:, 0], predicted)


def test_top_words_of_a_row_do_not_depend_on_the_others(native):
    case = make_case(1000, 300, 33)
    together = case.best(4)
    for row in (0, 1, 95, 96, 959, 960, 999):
        alone = top_words(case.hidden[row : row + 1], case.weight, case.bias, 4)
        assert identical(together["log_probability"][row], alone[0][0]) and torch.equal(together["word"][row], alone[1][0])


def test_of_one_word_the_loss_is_exactly_zero(runs):
    for keep_bytes in (KEEP, RECOMPUTE):
        found = make_case(30, 1, keep_bytes=keep_bytes).results()
        assert not found["nll"].any() and not found["prediction"].any()
        assert not any(found[f"grad_{name}"].any() for name in FLOATS)


@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e12])
@pytest.mark.parametrize("rows, still", [(10, 0.0), (60, 0.0), (60, 0.9)])
@pytest.mark.parametrize("keep_bytes", [KEEP, RECOMPUTE])
def test_gradients_of_huge_scores_stay_of_the_size_of_grad_nll(native, magnitude, rows, still, keep_bytes):
    """Scores computed again by another kernel than before would differ by more than 1, and their exponentials overflow."""
    case = make_case(rows, 400, 300, 3, magnitude=magnitude, still=still, keep_bytes=keep_bytes)
    found = case.results()
    assert found["nll"].isfinite().all() and (found["nll"] >= 0).all()
    most = 2 * case.grad_nll.abs().sum()
    assert found["grad_bias"].abs().max() <= most and found["grad_hidden"].abs().max() <= most * case.weight.abs().max()


def test_rows_without_a_gradient_take_no_part(native):
    """What they cost is not paid, and what they hold is not read: NaN there stays there."""
    case = make_case(60, 300, 20)
    still = torch.arange(60) % 3 > 0
    hidden, gradient = case.hidden.clone(), case.grad_nll.masked_fill(still, 0)
    hidden[still] = math.nan
    found = replace(case, hidden=hidden, grad_nll=gradient).results()
    alone = replace(case, hidden=case.hidden[~still], target=case.target[~still], grad_nll=gradient[~still]).results()
    assert not found["grad_hidden"][still].any() and close(found["grad_hidden"][~still], alone["grad_hidden"], 1e-6)
    assert close(found["grad_weight"], alone["grad_weight"], 1e-6) and close(found["grad_bias"], alone["grad_bias"], 1e-6)


# ---- what is kept, and what runs


def test_keep_bytes_is_the_most_that_is_kept(native):
    rows, words = 30, 17
    kept = []
    original = KERNELS._forward

    def noted(*arguments):
        kept.append(arguments[-1])
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KERNELS, "_forward", noted)
        for dtype, keep_bytes in itertools.product((torch.float32, torch.float64), (0, 4 * rows * words - 1, 4 * rows * words,
                                                                                   8 * rows * words)):
            make_case(rows, words, dtype=dtype, keep_bytes=keep_bytes).results()
    assert kept == [False, False, True, True] + [False, False, False, True]


@pytest.mark.parametrize("rows", [20, 300])
def test_kept_and_recomputed_scores_give_the_same(native, rows):
    case = make_case(rows, 700, dim=30, most=2, still=0.3, number=rows)
    kept, computed = (replace(case, keep_bytes=keep_bytes).results() for keep_bytes in (KEEP, RECOMPUTE))
    assert all(identical(kept[name], computed[name]) for name in kept)


def test_without_gradient_nothing_is_kept_and_backward_does_not_run(native):
    case = make_case(9, 5)
    with counted(LinearCrossEntropy) as calls:
        nll, _ = linear_cross_entropy(**case.arguments())
    assert calls["linear_cross_entropy_forward"] == 1 and not calls["linear_cross_entropy_backward"] and not nll.requires_grad


def test_target_and_cu_target_may_be_of_two_widths(runs):
    case = make_case(9, 20, most=3)
    expected = case.results()
    for target, cu_target in ((torch.int32, torch.int64), (torch.int64, torch.int32), (torch.int32, torch.int32)):
        found = replace(case, target=case.target.to(target), cu_target=case.cu_target.to(cu_target)).results()
        assert all(identical(x, expected[name]) for name, x in found.items())


# ---- in torch


@pytest.mark.slow
@pytest.mark.parametrize("most", [None, 3])
def test_compiles_without_a_break(native, most):
    case = make_case(30, 40, dim=8, most=most)

    @torch.compile(fullgraph=True)
    def loss(hidden, weight, bias):
        nll, prediction = linear_cross_entropy(hidden, weight, bias, case.target, cu_target=case.cu_target)
        return (nll * case.grad_nll).sum(), prediction, top_words(hidden, weight, bias, 3)

    leaves = [x.detach().requires_grad_() for x in case.floats().values()]
    total, prediction, top = loss(*leaves)
    grads = torch.autograd.grad(total, leaves)
    eager = case.results()
    assert torch.equal(prediction, eager["prediction"]) and torch.equal(top[1], case.best(3)["word"])
    assert all(close(grad, eager[f"grad_{name}"], 1e-5) for grad, name in zip(grads, FLOATS, strict=True))


# ---- errors of top_words: each names the argument


@pytest.mark.parametrize("k, error", [(0, ValueError), (21, ValueError), (True, TypeError), (1.0, TypeError)])
def test_a_bad_number_of_words_is_named(runs, k, error):
    with pytest.raises(error, match="^k must be"):
        top_words(**BASE.floats(), k=k)


@pytest.mark.parametrize("said, change, error", OF_BOTH)
def test_a_bad_argument_of_top_words_is_named(runs, said, change, error):
    with pytest.raises(error) as caught:
        top_words(**(BASE.floats() | {"k": 2} | change))
    assert str(caught.value).startswith(said)
