"""What residual_norm and residual say alone; what they share with the other families is in test_families.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import close
from op_case import HALF
from op_cases.residual_norm import ResidualNorm
from op_checks import by_threads, counted, identical

from case_fast import ops
from case_fast.ops import reference

DROPS = {"dropout_p": 0.3, "seed": 7}


def residual_of(case: ResidualNorm, **leaves: torch.Tensor) -> torch.Tensor:
    given = {"x": case.x, "update": case.update} | leaves
    return ops.residual(**given, dropout_p=case.dropout_p, seed=case.seed)


@pytest.mark.parametrize("updates", [True, False])
def test_without_dropout_it_is_torch_s_sum_and_layer_norm(runs, updates):
    case = ResidualNorm.made(61, 43, dtype=torch.float64, updates=updates)

    def torch_s(x, update, weight, bias, eps, dropout_p, seed):
        total = x if update is None else x + update
        return total, F.layer_norm(total, (43,), weight, bias, eps)

    expected = case.results(torch_s)
    assert all(close(x, expected[name], 1e-12) for name, x in case.results().items())


@pytest.mark.parametrize("seed", [0, 2**40 + 3])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p_and_neighbours_do_not_hang_together(p, seed):
    keep = reference.residual_keep(700, 301, p, seed)
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(keep.double().mean() - (1 - p)) < 4 * deviation
    kept = keep.double() - keep.double().mean()
    for rows, columns in ((0, 1), (0, 2), (0, 8), (0, 16), (1, 0), (1, 1)):
        together = (kept[: 700 - rows, : 301 - columns] * kept[rows:, columns:]).mean()
        assert abs(together) < 4 * p * (1 - p) / (650 * 285) ** 0.5


def test_what_is_kept_is_a_function_of_seed_row_and_column_alone():
    keep = reference.residual_keep(40, 70, 0.3, 5)
    assert torch.equal(reference.residual_keep(9, 13, 0.3, 5), keep[:9, :13])
    assert not torch.equal(reference.residual_keep(40, 70, 0.3, 6), keep)
    attention = reference.dropout_keep(40, 70, 0.3, 5)
    assert abs((keep == attention).double().mean() - (0.7**2 + 0.3**2)) < 0.04  # the same seed draws weights apart


def test_a_probability_counts_in_steps_of_two_to_the_minus_16(runs):
    x, update = torch.zeros(500, 300), torch.ones(500, 300)
    assert torch.equal(ops.residual(x, update, 2.0**-17, 3), update)  # rounded down to 0
    kept = ops.residual(x, update, 0.1, 3)
    share = int(0.1 * 2**16) / 2**16
    assert close(kept[kept > 0], torch.full_like(kept[kept > 0], 1 / (1 - share)), 1e-6)


@pytest.mark.parametrize("alone", ["total", "normed"])
@pytest.mark.parametrize("recipe", [{}, DROPS, {"updates": False}], ids=["added", "dropped", "nothing added"])
def test_each_result_may_be_all_that_is_differentiated(runs, recipe, alone):
    case = ResidualNorm.made(23, 37, dtype=torch.float64, **recipe)
    other = case.GRADIENTS["normed" if alone == "total" else "total"]
    expected = replace(case, **{other: torch.zeros_like(case.x)}).results(case.plain)
    leaves = {name: x.clone().requires_grad_() for name, x in case.floats().items()}
    found = case.having(leaves).call()[alone]
    grads = torch.autograd.grad(found, list(leaves.values()), case.gradients()[alone], allow_unused=True, materialize_grads=True)
    assert all(close(grad, expected[f"grad_{name}"], 1e-12) for name, grad in zip(leaves, grads, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_residual_is_the_total_of_the_other(runs, p):
    case = ResidualNorm.made(29, 45, dropout_p=p, seed=2**41 + 9)
    assert identical(residual_of(case), case.call()["total"])
    given = case.seeded_by_tensor()
    assert identical(residual_of(given), residual_of(case))


def test_residual_has_derivatives_of_any_order(runs):
    case = ResidualNorm.made(7, 11, dtype=torch.float64, **DROPS)
    leaves = {"x": case.x.clone().requires_grad_(), "update": case.update.clone().requires_grad_()}

    def call(x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return residual_of(case, x=x, update=update)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(lambda x, update: call(x, update).square(), tuple(leaves.values()))
    found = torch.autograd.grad(call(*leaves.values()), list(leaves.values()), case.grad_total)
    plain = reference.residual(*leaves.values(), case.dropout_p, case.seed)
    expected = torch.autograd.grad(plain, list(leaves.values()), case.grad_total)
    assert all(close(x, y, 1e-12) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_residual_in_half_precision_and_under_autocast_is_computed_in_float32(runs, dtype):
    case = ResidualNorm.made(19, 21, **DROPS)
    half = case.to(dtype)
    exact = residual_of(half.to(torch.float32))
    assert identical(residual_of(half), exact.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert identical(residual_of(half), exact)


@pytest.mark.parametrize("change, said", [
    ({"x": torch.ones(3)}, "x must be"), ({"update": torch.ones(2, 3)}, "update must be"),
    ({"dropout_p": 1.0}, "dropout_p must be"), ({"seed": -1}, "seed must be"),
], ids=str)
def test_residual_refuses_what_the_other_does(runs, change, said):
    given = {"x": torch.ones(3, 4), "update": torch.ones(3, 4), "dropout_p": 0.5, "seed": 0} | change
    with pytest.raises(ValueError, match=f"^{said}"):
        ops.residual(**given)


@pytest.mark.parametrize("rows, width", [(1, 300), (16, 300), (97, 300), (750, 300), (2403, 301)])
def test_any_number_of_threads_gives_the_same_bits(native, rows, width):
    case = ResidualNorm.made(rows, width, **DROPS)
    with counted(ResidualNorm) as calls:
        found = by_threads(lambda: case.results() | {"residual": residual_of(case)})
    assert calls == {"residual_norm_forward": 4, "residual_norm_backward": 4, "residual_norm_drop": 4}
    assert all(identical(x, found[0][name]) for others in found[1:] for name, x in others.items())


def test_the_bits_of_a_row_do_not_depend_on_other_rows(native):
    whole = ResidualNorm.made(700, 131, **DROPS)
    part = replace(whole, **{name: getattr(whole, name)[:9] for name in ("x", "update", "grad_total", "grad_normed")})
    of_all, of_part = whole.results(), part.results()
    assert all(identical(of_part[name], of_all[name][:9]) for name in ("total", "normed", "grad_x", "grad_update"))
