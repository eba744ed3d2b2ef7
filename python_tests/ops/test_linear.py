"""What linear says alone; what it shares with the other families is in test_families.py."""

from __future__ import annotations

import pytest
import torch
from op_cases.linear import Linear
from op_checks import by_threads, counted, identical
from torch.nn import functional as F

from case_fast import ops
from case_fast.ops import reference

STEP = [(16, 300, 300), (250, 300, 900), (670, 900, 300)]  # rows, K and N of a step's layers


def made(rows: int, *more: int) -> torch.Tensor:
    return torch.randn(rows, *more, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("rows, depth, outputs", STEP)
def test_a_row_does_not_depend_on_the_others(native, rows, depth, outputs):
    case = Linear.made(rows, depth, outputs, activation="gelu")
    whole = case.results()
    for part in (slice(0, 1), slice(rows // 3, rows // 3 + 9), slice(rows // 2, rows)):
        few = Linear(case.x[part], case.weight, None, case.bias, case.grad_out[part], "gelu").results()
        assert identical(few["out"], whole["out"][part]) and identical(few["grad_x"], whole["grad_x"][part])


@pytest.mark.parametrize("rows, depth, outputs", STEP)
def test_any_number_of_threads_gives_the_same_bits(native, rows, depth, outputs):
    found = by_threads(Linear.made(rows, depth, outputs, second=31, activation="gelu").results)
    assert all(identical(x, found[0][name]) for one in found for name, x in one.items())


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_several_weights_are_one_product(native, activation):
    x, weights, bias = made(40, 30), [made(n, 30) for n in (30, 0, 7, 64)], made(101)
    with counted(Linear) as calls:
        found = ops.linear(x, weights, bias, activation)
        assert identical(found, ops.linear(x, torch.cat(weights), bias, activation))
        each = [ops.linear(x, w, b, activation) for w, b in zip(weights, bias.split([30, 0, 7, 64]), strict=True)]
    assert identical(found, torch.cat(each, 1)) and calls["linear_forward"] == 2 + 4
    leaves = [w.requires_grad_() for w in weights]
    grad_out = made(40, 101)
    with counted(Linear) as calls:
        gradients = torch.autograd.grad(ops.linear(x, tuple(leaves), bias), leaves, grad_out)
    assert calls["linear_backward"] == 1
    for gradient, part in zip(gradients, grad_out.split([30, 0, 7, 64], 1), strict=True):
        assert torch.allclose(gradient, part.T @ x, atol=1e-4)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("groups", [(), (3,)])
def test_results_of_each_weight_are_those_of_all(runs, monkeypatch, groups, activation):
    x, bias = made(40, *groups, 30), made(*groups, 101)
    leaves = [x, bias, *(made(*groups, n, 30) for n in (30, 0, 7, 64))]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, bias, *weights = leaves
    grad_out = [made(40, *groups, n) for n in (30, 0, 7, 64)]
    whole, parts = ops.linear(x, weights, bias, activation), ops.linear(x, weights, bias, activation, split=True)
    assert isinstance(parts, tuple) and identical(torch.cat(parts, -1), whole)
    expected = torch.autograd.grad(whole, leaves, torch.cat(grad_out, -1))
    found = torch.autograd.grad(parts, leaves, grad_out)
    assert all(identical(a, b) for a, b in zip(found, expected, strict=True))
    if runs == "native" and activation is None:
        assert all(part.is_contiguous() for part in parts)
        one = torch.autograd.grad(ops.linear(x, weights, split=True)[3], weights, grad_out[3])  # the others have no gradient
        assert not one[0].any() and identical(one[3], torch.autograd.grad(ops.linear(x, weights[3]), weights[3], grad_out[3])[0])
    with torch.no_grad():
        assert identical(torch.cat(ops.linear(x, weights, bias, activation, split=True), -1), whole)
    (alone,) = ops.linear(x, weights[:1], split=True)
    assert identical(alone, ops.linear(x, weights[0]))


def test_a_view_of_a_weight_is_not_copied_and_its_gradient_lies_as_it_does(native, monkeypatch):
    x, grad_y = made(40, 2, 15), made(40, 2, 30)
    stored = made(2, 15, 30).requires_grad_()  # (G, K, N): what the product takes is its transpose
    view, strides = stored.mT, []
    view.register_hook(lambda gradient: strides.append(gradient.stride()))
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x, **_: x if x.is_contiguous() else pytest.fail("copied"))
    ops.linear(x, view).backward(grad_y)
    assert strides == [view.stride()]
    expected = torch.einsum("igk,ign->gkn", x, grad_y)
    assert torch.allclose(stored.grad, expected, atol=1e-4)
    shared = made(30, 40)  # half of the columns of one weight
    assert torch.allclose(ops.linear(made(5, 20), shared[:, 20:]), made(5, 20) @ shared[:, 20:].T, atol=1e-4)


def test_groups_are_products_of_their_own(native):
    x, weight, bias = made(60, 3, 20), made(3, 11, 20), made(3, 11)
    found = ops.linear(x, weight, bias, "relu")
    for g in range(3):
        assert identical(found[:, g].contiguous(), ops.linear(x[:, g], weight[g], bias[g], "relu"))


@pytest.mark.parametrize("wanted", range(3))
def test_one_input_alone_may_want_a_gradient(runs, wanted):
    given = [made(50, 20), made(30, 20), made(30)]
    expected = torch.autograd.grad(F.linear(*(x.requires_grad_() for x in given)).tanh(), given, made(50, 30))[wanted]
    given = [x.detach().requires_grad_(place == wanted) for place, x in enumerate(given)]
    ops.linear(*given, "tanh").backward(made(50, 30))
    assert torch.allclose(given[wanted].grad, expected, atol=1e-4)
    assert all(x.grad is None for place, x in enumerate(given) if place != wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, function, limit", [("gelu", F.gelu, 2.5e-7), ("tanh", torch.tanh, 1.5e-7), ("relu", F.relu, 0)])
def test_activations_are_those_of_torch(native, name, function, limit, dtype):
    """Over the range where they bend and far beyond; with their derivatives, and NaN and infinities as torch has them."""
    far = torch.tensor([0.0, -0.0, 1e-30, 1e4, -1e4, 3e38, torch.inf, -torch.inf, torch.nan])
    z = torch.cat([torch.linspace(-12, 12, 40_001), far]).to(dtype)[:, None].requires_grad_()
    exact = z.detach().double().requires_grad_()
    found, true = ops.linear(z, torch.ones(1, 1, dtype=dtype), None, name), function(exact)
    (slope,), (true_slope,) = torch.autograd.grad(found.sum(), z), torch.autograd.grad(true.sum(), exact)
    limit = limit if dtype == torch.float32 else 1e-15
    for value, expected in ((found.detach(), true.detach()), (slope, true_slope)):
        same = (value.double() == expected) | (value.isnan() & expected.isnan())
        error = (value.double() - expected).abs() / expected.abs().clamp(min=1)
        assert error.masked_fill(same, 0).max() <= 2 * limit


def test_nothing_is_computed_for_what_wants_no_gradient(native):
    x, weight = made(8, 4), made(3, 4)
    with counted(Linear) as calls:
        assert not ops.linear(x, weight).requires_grad
        with torch.no_grad():
            assert not ops.linear(x.requires_grad_(), weight.requires_grad_()).requires_grad
    assert calls["linear_forward"] == 2 and not calls["linear_backward"]
    with pytest.raises(ValueError, match="^weight must be a tensor or several, not none"):
        ops.linear(x, [])
