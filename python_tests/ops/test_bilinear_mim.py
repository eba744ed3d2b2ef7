"""bilinear_mim and mim_sides alone; what all ops have in common is in test_families.py."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import close
from op_cases.bilinear_mim import BilinearMIM
from op_checks import identical

from case_fast import equations
from case_fast.ops import bilinear_mim, mim_sides

SCORES = equations.SCORES
KERNELS, make_case = BilinearMIM.kernels(), BilinearMIM.made


# ---- what the equation says


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("negatives", [None, 1, 5])
@pytest.mark.parametrize("rows", [None, 1])
def test_without_negatives_loss_and_gradient_are_exactly_zero(runs, score, negatives, rows):
    """One pair alone, or several that share the one row of y there is."""
    case = make_case(1 if rows is None else 4, rows, score=score, magnitude=30.0, num_negatives=negatives, seed=3)
    leaves = {name: x.requires_grad_() for name, x in case.floats().items()}
    loss = bilinear_mim(**(case.arguments() | leaves), reduction="none")
    loss.sum().backward()
    assert loss.shape == case.x.shape[:1] and not loss.any()
    assert all(not leaf.grad.any() for leaf in leaves.values())


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("negatives", [None, 3])
@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_scores_stay_finite(runs, score, negatives, size, dtype):
    x = torch.cat([torch.eye(4), -torch.eye(4)]).to(dtype)
    weight = None if score == "dot" else torch.eye(4, dtype=dtype) * size
    x, y = x * (size if score == "dot" else 1), torch.ones(8, 4, dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in (x, y, weight) if t is not None]
    side_y, side_x, logit = mim_sides(*leaves, *[None] * (3 - len(leaves)), num_negatives=negatives, seed=1, score=score)
    assert logit.abs().max() == size
    grads = torch.autograd.grad((side_y + side_x).sum(), leaves)
    assert all(t.isfinite().all() for t in (side_y, side_x, *grads)) and (side_y >= 0).all() and (side_x >= 0).all()
    # every y is the same, and so is every score of a pair's set over y: the log of how many there are
    assert close(side_y, torch.full_like(side_y, math.log(8 if negatives is None else negatives + 1)), 1e-5)


def test_a_reduction_is_of_both_sides(runs):
    case = make_case(9, 4, dtype=torch.float64)
    side_y, side_x, logit = mim_sides(**case.arguments())
    loss = side_y + side_x
    assert torch.equal(bilinear_mim(**case.arguments(), reduction="none"), loss)
    assert torch.equal(bilinear_mim(**case.arguments(), reduction="sum"), loss.sum())
    assert torch.equal(bilinear_mim(**case.arguments()), loss.sum() / 9)
    assert close(logit, ((case.x @ case.weight) * case.y[case.positive]).sum(-1), 1e-12)
    if runs == "reference":
        assert torch.equal(bilinear_mim(**case.arguments()), equations.bilinear_mim(**case.arguments()))
    assert bilinear_mim(**make_case(0, 3).arguments()) == 0


def test_the_default_pairs_row_with_row(runs):
    case = make_case(6)
    named = mim_sides(**(case.arguments() | {"positive": torch.arange(6)}))
    assert all(identical(a, b) for a, b in zip(mim_sides(**case.arguments()), named, strict=True))


@pytest.mark.parametrize("negatives", [None, 3, 40])
@pytest.mark.parametrize("score", SCORES)
def test_what_does_not_exist_is_as_if_it_were_not_there(runs, score, negatives):
    """The same bits as without it, natively; zeros for it, whatever it holds."""
    case = make_case(30, 12, dim=6, score=score, num_negatives=negatives, seed=3, beyond=(7, 4))
    existing = replace(case, x=case.x[:23], y=case.y[:8], positive=case.positive[:23], grad_y=case.grad_y[:23],
                       grad_x=case.grad_x[:23], sizes=None).results()
    held = case.sizes.clone()
    for found in (case.results(), replace(case, x=case.x.index_fill(0, torch.arange(23, 30), torch.nan)).results()):
        for name, x in found.items():
            kept = len(existing[name])
            assert identical(x[:kept], existing[name]) if runs == "native" else close(x[:kept], existing[name], 1e-6), name
            assert not x[kept:].any(), name
    mean = bilinear_mim(**case.arguments())
    assert close(mean, (existing["side_y"] + existing["side_x"]).sum() / 23, 1e-6) and torch.equal(case.sizes, held)
    none = replace(case, sizes=torch.zeros(2, dtype=torch.int64))
    assert bilinear_mim(**none.arguments()) == 0 and not any(x.any() for x in none.results().values())


def draws_taken(positive: torch.Tensor, rows: int, num_negatives: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, Q) and (P, P): how often a backend drew each row for each pair, read from gradients.

    With every score 0, each of the k + 1 terms of a sum has the same share of its gradient: that of the score of one row is
    the number of its draws / (k + 1), and for the positive its own term too, less 1, which makes it 0.
    """
    pairs = positive.numel()
    ones, zeros = (torch.full((n, 1), value, dtype=torch.float64) for n, value in ((pairs, 1.0), (rows, 0.0)))
    over_y, over_x = torch.zeros(pairs, rows, dtype=torch.int64), torch.zeros(pairs, pairs, dtype=torch.int64)
    for pair in range(pairs):
        for counts, x, y, place in ((over_y, ones, zeros, 0), (over_x, ones * 0, zeros + 1, 1)):
            x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
            sides = mim_sides(x, y, None, positive, num_negatives, seed, "dot")
            (found,) = torch.autograd.grad(sides[place][pair], y if place == 0 else x)
            found = found[:, 0] * (num_negatives + 1)
            found[positive[pair] if place == 0 else pair] = 0
            counts[pair] = found.round().long()
            assert (found - counts[pair]).abs().max() < 1e-6
    return over_y, over_x


@pytest.mark.parametrize("number", range(3))
def test_the_rows_drawn_are_the_equation_s_and_uniform_over_the_eligible(runs, number):
    positive, seed = torch.tensor([4, 0, 0, 2, 4, 4, 1]), (number * 0x9E3779B97F4A7C15) % 2**63
    taken = draws_taken(positive, 7, 2_000, seed)
    expected = equations.draw_negatives(positive, 7, 2_000, seed)
    for counts, drawn in zip(taken, expected[:2], strict=True):
        assert torch.equal(counts, torch.stack([torch.bincount(row, minlength=7) for row in drawn]))
    stats = pytest.importorskip("scipy.stats")
    for pair, c in enumerate(positive.tolist()):
        for counts, eligible in zip(taken, (torch.arange(7) != c, positive != c), strict=True):
            assert not counts[pair][~eligible].any()
            assert stats.chisquare(counts[pair][eligible].numpy()).pvalue > 1e-6


def test_one_side_may_be_used_alone():
    case = make_case(7, 5, dtype=torch.float64)
    for name in ("grad_y", "grad_x"):
        alone = replace(case, **{name: torch.zeros_like(case.grad_y)})
        assert all(close(x, alone.results(alone.plain)[key], 1e-12) for key, x in alone.results().items())
    x = case.x.clone().requires_grad_()
    (found,) = torch.autograd.grad(mim_sides(**(case.arguments() | {"x": x}))[1], x, case.grad_x)
    assert torch.equal(found, replace(case, grad_y=torch.zeros_like(case.grad_y)).results()["grad_x"])


def test_another_default_device_changes_nothing(native):
    case = make_case(7, 7)
    expected = bilinear_mim(case.x, case.y, case.weight)
    KERNELS._one_to_one.cache_clear()
    with torch.device("meta"):
        assert torch.equal(bilinear_mim(case.x, case.y, case.weight), expected)
    assert torch.equal(bilinear_mim(case.x, case.y, case.weight), expected)


def test_no_matrix_of_scores_is_kept(native):
    case = make_case(300, 200, dim=7)
    saved = case.having({name: x.requires_grad_() for name, x in case.floats().items()}).call()["side_y"].grad_fn.saved_tensors
    own = {x.data_ptr() for x in case.arguments().values() if isinstance(x, torch.Tensor)}
    kept = [x for x in saved if x is not None and x.data_ptr() not in own]
    assert kept and sum(x.numel() for x in kept) <= 2 * 500 * 7


# ---- torch.compile


def test_the_size_that_a_compiler_is_told_is_the_kernel_s(native):
    for pairs, rows, dim, negatives, score in itertools.product((0, 1, 9), (0, 1, 20), (1, 30), (None, 1, 15, 16), SCORES):
        x, y = torch.empty(pairs, dim), torch.empty(rows, dim)
        expected = native.bilinear_mim_saved(KERNELS._problem(x, y, None, negatives, 0, None, score))
        assert KERNELS._saved_elements(pairs, rows, dim, negatives, score) == expected
