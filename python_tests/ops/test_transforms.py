"""Transforms of torch around the ops: their values are those of plain torch, or an error names the op and the transform. And
tensors whose numbers torch has not yet written down: negated ones, zeros."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import same
from op_cases import FAMILIES
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._pytree import tree_leaves

from case_fast import ops
from case_fast.errors import ConfigError
from case_fast.ops import common, reference

pytestmark = pytest.mark.usefixtures("native")
of_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


class Call:
    """A family's call as a function of its floats, ``f`` all of its results that have a gradient and ``loss`` a number, with
    tangents and gradients that go with them."""

    def __init__(self, family: type, place: int = 0, plain: bool = False):
        self.case = family.made(number=place, **(family.OPCHECK[place] | {"dtype": torch.float64}))
        self.op = family.plain if plain else family.op
        self.floats = tuple(self.case.floats().values())
        self.all = tuple(range(len(self.floats)))
        self.gradients = tuple(self.case.gradients().values())
        g = torch.Generator().manual_seed(place)
        self.tangents = tuple(torch.randn(x.shape, dtype=x.dtype, generator=g) for x in self.floats)

    def f(self, *floats: Tensor) -> tuple[Tensor, ...]:
        found = self.case.having(dict(zip(self.case.floats(), floats, strict=True))).call(self.op)
        return tuple(found[name] for name in self.case.GRADIENTS)

    def loss(self, *floats: Tensor) -> Tensor:
        return sum((x * gradient).sum() for x, gradient in zip(self.f(*floats), self.gradients, strict=True))

    def two(self) -> tuple[Tensor, ...]:
        """The floats of two calls."""
        return tuple(torch.stack([x, x + t]) for x, t in zip(self.floats, self.tangents, strict=True))

    def leaves(self) -> list[Tensor]:
        return [x.detach().clone().requires_grad_() for x in self.floats]

    def three_gradients(self) -> tuple[Tensor, ...]:
        return tuple(torch.stack([x, 2 * x, -x]) for x in self.gradients)


def dual(call: Call):
    with forward_ad.dual_level():
        out = call.f(*map(forward_ad.make_dual, call.floats, call.tangents))
        return [forward_ad.unpack_dual(x).tangent for x in out]


def vmap_of_leaves(call: Call):
    leaves = call.leaves()
    out = vmap(call.f)(*[torch.stack([x, 2 * x]) for x in leaves])
    return torch.autograd.grad(sum((x * x).sum() for x in out), leaves)


def batched_gradients(call: Call, create_graph: bool = False):
    leaves = call.leaves()
    return torch.autograd.grad(call.f(*leaves), leaves, call.three_gradients(), is_grads_batched=True, create_graph=create_graph)


def vmap_of_gradients(call: Call, create_graph: bool = False):
    leaves = call.leaves()
    out = call.f(*leaves)

    def back(*gradients: Tensor):
        return torch.autograd.grad(out, leaves, gradients, retain_graph=True, create_graph=create_graph)

    return vmap(back)(*call.three_gradients())


TRANSFORMS: dict[str, Callable[[Call], object]] = {
    "grad": lambda call: grad(call.loss, call.all)(*call.floats),
    "vjp": lambda call: vjp(call.f, *call.floats)[1](call.gradients),
    "jvp": lambda call: jvp(call.f, call.floats, call.tangents),
    "jacrev": lambda call: jacrev(call.loss, call.all)(*call.floats),
    "jacfwd": lambda call: jacfwd(call.loss)(*call.floats),
    "hessian": lambda call: hessian(call.loss)(*call.floats),
    "jvp of grad": lambda call: jvp(grad(call.loss, call.all), call.floats, call.tangents),
    "grad of grad": lambda call: grad(lambda *x: sum((y * y).sum() for y in grad(call.loss, call.all)(*x)))(*call.floats),
    "vmap": lambda call: vmap(call.f)(*call.two()),
    "vmap of one": lambda call: vmap(call.f, (0, *[None] * (len(call.floats) - 1)))(call.two()[0], *call.floats[1:]),
    "vmap of grad": lambda call: vmap(grad(call.loss, call.all))(*call.two()),
    "vmap of vmap": lambda call: vmap(vmap(call.f))(*[torch.stack([x, -x]) for x in call.two()]),
    "dual numbers": dual,
    "vmap of leaves": vmap_of_leaves,
    "is_grads_batched": batched_gradients,
    "is_grads_batched, create_graph": partial(batched_gradients, create_graph=True),
    "vmap of gradients": vmap_of_gradients,
    "vmap of gradients, create_graph": partial(vmap_of_gradients, create_graph=True),
    "jacobian": lambda call: torch.autograd.functional.jacobian(call.f, call.floats, vectorize=True),
    "jacobian, forward-mode": lambda call: torch.autograd.functional.jacobian(
        call.f, call.floats, vectorize=True, strategy="forward-mode"),
}


LARGEST = ("hessian", 2)  # left out; a place among the recipes for opcheck, of which the third draws, where a family can


def agree(found: object, expected: object) -> None:
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        same(ours.detach(), theirs.detach(), 1e-9)


@pytest.mark.parametrize("name, place", [(name, place) for name in TRANSFORMS for place in (0, 2) if (name, place) != LARGEST])
@of_family
def test_a_transform_gives_what_plain_torch_gives(family, name, place):
    transform = TRANSFORMS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its vmap and of torch.jit
        agree(transform(Call(family, place)), transform(Call(family, place, plain=True)))


@of_family
def test_linearize_and_functionalize_give_what_plain_torch_gives(family):
    """Though ops with offsets read them, which no trace could."""
    call, plain = Call(family), Call(family, plain=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value, along = linearize(call.f, *call.floats)
    agree((value, along(*call.tangents)), jvp(plain.f, plain.floats, plain.tangents))
    agree(functionalize(call.f)(*call.floats), plain.f(*plain.floats))


@of_family
def test_a_derivative_of_a_gradient_that_was_taken_outside_is_right_or_refused(family):
    """What the kernel computed has no second derivative, but where it is linear."""
    call = Call(family)
    leaves = call.leaves()
    out = call.f(*leaves)

    def back(*gradients: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out, leaves, gradients, retain_graph=True))

    def forward_mode() -> list[Tensor]:
        with forward_ad.dual_level():
            found = back(*[forward_ad.make_dual(x, 2 * x) for x in call.gradients])
            return [forward_ad.unpack_dual(x).tangent for x in found]

    double = tuple(2 * x for x in call.gradients)
    for transform, said in ((lambda: jvp(back, call.gradients, double)[1], "torch.func.jvp"),
                            (forward_mode, "forward-mode derivatives")):
        if family.LINEAR:
            agree(transform(), back(*double))
            continue
        with pytest.raises(NotImplementedError, match=rf"^case_fast::{family.family}_backward has no derivative under .*{said}"):
            transform()


def test_a_second_derivative_of_a_batch_of_gradients_is_refused():
    call = Call(FAMILIES["linear"])
    for transform in (batched_gradients, vmap_of_gradients):
        with pytest.raises(NotImplementedError, match="case_fast.ops.linear has no second derivative"):
            transform(call, create_graph=True)[0].sum().backward()


def test_a_batch_of_gradients_that_are_differentiated_themselves_is_refused_where_a_kernel_runs():
    leaf = X.clone().requires_grad_()
    out = ops.take(leaf, SEGMENT, few=0)
    gradients = torch.stack([X, Y]).requires_grad_()
    with pytest.raises(NotImplementedError, match="case_fast::segment_sum_forward cannot differentiate a batch of gradients"):
        torch.autograd.grad(out, leaf, gradients, is_grads_batched=True, create_graph=True)


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap", "vmap of grad", "dual numbers"])
def test_a_forced_backend_that_knows_no_transform_says_so(monkeypatch, name):
    said = {"dual numbers": "forward-mode derivatives", "vmap of grad": "torch.func.grad or vjp in torch.vmap"}.get(name, name)
    monkeypatch.setenv("CASE_FAST_BACKEND", "native")
    with pytest.raises(ConfigError, match=f"linear on cpu cannot run there: it is called under .*{said}"):
        TRANSFORMS[name](Call(FAMILIES["linear"]))


# ---- the ops that are no family's own

G = torch.Generator().manual_seed(1)
X, Y, WEIGHT = (torch.randn(shape, dtype=torch.float64, generator=G) for shape in ((5, 4), (5, 4), (7, 4)))
SEGMENT = torch.tensor([2, 0, 2, 1, 0])
OTHERS: dict[str, tuple[Callable, Callable]] = {
    "take": (lambda x: ops.take(x, SEGMENT), lambda x: x[SEGMENT]),
    "take, kernel": (lambda x: ops.take(x, SEGMENT, few=0), lambda x: x[SEGMENT]),
    "segment_sum": (lambda x: ops.segment_sum(x, SEGMENT, 4), lambda x: reference.segment_sum(x, SEGMENT, 4)),
    "segment_mean": (lambda x: ops.segment_mean(x, SEGMENT, 4), lambda x: reference.segment_mean(x, SEGMENT, 4)),
    "segment_log_softmax": (lambda x: ops.segment_log_softmax(x, SEGMENT, 4),
                            lambda x: reference.segment_log_softmax(x, SEGMENT, 4)),
    "residual": (lambda x: ops.residual(x, Y, 0.4, 7), lambda x: reference.residual(x, Y, 0.4, 7)),
    "residual, update": (lambda x: ops.residual(Y, x * x, 0.4, 7), lambda x: reference.residual(Y, x * x, 0.4, 7)),
    "residual, no dropout": (lambda x: ops.residual(x, x * x), lambda x: x + x * x),
    "mim_sides": (lambda x: torch.cat(ops.mim_sides(x, Y, None, score="dot")[:2]),
                  lambda x: torch.cat(reference.mim_sides(x, Y, None, torch.arange(5), score="dot")[:2])),
    "top_words": (lambda x: ops.top_words(x, WEIGHT, None, 3)[1].double() + 0 * x[:, :3],
                  lambda x: (x @ WEIGHT.T).topk(3).indices.double() + 0 * x[:, :3]),
    "linear, split": (lambda x: torch.cat(ops.linear(x, [WEIGHT, Y], split=True), 1), lambda x: x @ torch.cat([WEIGHT, Y]).T),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_ops_give_what_plain_torch_gives(name):
    op, plain = OTHERS[name]

    def forward_mode(f):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(X, Y))).tangent

    for transform in (lambda f: grad(lambda x: (f(x) ** 2).sum())(X), lambda f: jvp(f, (X,), (Y,)), lambda f: vjp(f, X)[1](f(X)),
                      lambda f: vmap(f)(torch.stack([X, Y])), lambda f: vmap(grad(lambda x: f(x).sum()))(torch.stack([X, Y])),
                      lambda f: hessian(lambda x: (f(x) ** 3).sum())(X), forward_mode):
        agree(transform(op), transform(plain))


def test_every_op_of_the_package_is_public_so():
    classes = (ops.Source, ops.RowSource, ops.PreparedSources)
    functions = [getattr(ops, name) for name in ops.__all__ if getattr(ops, name) not in classes]
    asking = (ops.backend_name, ops.native_report)
    assert all(hasattr(function, "__wrapped__") for function in functions if function not in asking)


# ---- what torch.vmap cannot have

INDEXED = {
    "segment_sum": lambda i: ops.segment_sum(X, i[:5], 2, few=0),
    "take": lambda i: ops.take(X, i, few=0),
    "graph_attention": lambda i: ops.graph_attention(X.view(5, 2, 2), X.view(5, 2, 2), X.view(5, 2, 2), i.clamp(max=0), i[:0]),
    "packed_attention": lambda i: ops.packed_attention(X.view(5, 2, 2), X.view(5, 2, 2), X.view(5, 2, 2), i * 5, i * 5),
    "pooled_attention": lambda i: ops.pooled_attention(X.view(5, 1, 4), X, i * 5, 0.5),
    "linear_cross_entropy": lambda i: ops.linear_cross_entropy(X, WEIGHT, None, i[:5])[0],
    "mim_sides": lambda i: ops.mim_sides(X, Y, None, i[:5], score="dot")[0],
}


@pytest.mark.parametrize("name", INDEXED)
def test_an_index_that_is_mapped_is_refused_by_name(name):
    with pytest.raises(NotImplementedError, match=rf"^case_fast\.ops\.{name} cannot run so under torch.vmap: "):
        vmap(INDEXED[name])(torch.tensor([[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]]))


def test_wrong_arguments_are_named_under_a_transform_too():
    with pytest.raises(ValueError, match="weight must be"):
        grad(lambda x: ops.linear(x, WEIGHT[:, :3]).sum())(X)
    with pytest.raises(TypeError, match="^bias must be a tensor or None, not 3 "):
        vmap(lambda x: ops.linear(x, WEIGHT, 3))(torch.stack([X, Y]))


# ---- sources that were prepared

def prepared_call(hidden: Tensor, prepared: bool, sources: list) -> Tensor:
    cu = torch.tensor([0, 2, 5])
    return ops.cross_attention(hidden, cu, ops.prepare_sources(sources) if prepared else sources)


@pytest.mark.parametrize("when", ["before", "inside"])
def test_prepared_sources_under_transforms(when):
    family = FAMILIES["cross_attention"]
    case = family.made([2, 3], [[3, 2], [1, 4]], 4, 2, 3, dtype=torch.float64)
    before = ops.prepare_sources(case.sources)

    def f(x: Tensor) -> Tensor:
        return ops.cross_attention(x, case.cu_hidden, before if when == "before" else ops.prepare_sources(case.sources))

    def plain(x: Tensor) -> Tensor:
        return reference.cross_attention(x, case.cu_hidden, case.sources)

    with torch.no_grad():
        agree(jvp(f, (X,), (Y,)), jvp(plain, (X,), (Y,)))
        agree(vmap(f)(torch.stack([X, Y])), vmap(plain)(torch.stack([X, Y])))
        agree(TRANSFORMS["dual numbers"](_like(f)), TRANSFORMS["dual numbers"](_like(plain)))
    agree(grad(lambda x: f(x).sum())(X), grad(lambda x: plain(x).sum())(X))


def _like(f: Callable) -> Call:
    call = object.__new__(Call)
    call.floats, call.tangents, call.f = (X,), (Y,), lambda x: (f(x),)
    return call


def test_weights_of_sources_that_are_prepared_inside_have_tangents():
    family = FAMILIES["cross_attention"]
    case = family.made([2, 3], [[3, 2], [1, 4]], 4, 2, 3, dtype=torch.float64)

    def f(key: Tensor, prepared: bool) -> Tensor:
        sources = case.with_source(0, key=key).sources
        return prepared_call(case.hidden, prepared, sources)

    key = case.sources[0].key
    agree(*[jvp(partial(f, prepared=prepared), (key,), (key * key,)) for prepared in (True, False)])


# ---- numbers that are not yet written down


def negated(x: Tensor) -> Tensor:
    """The same numbers, each with a sign that is still to be turned."""
    return torch._neg_view(-x)


def imaginary(x: Tensor) -> Tensor:
    return torch.complex(torch.full_like(x, 7), -x).conj().imag


@pytest.mark.parametrize("lazy", [negated, imaginary])
@of_family
def test_signs_that_are_still_to_be_turned_are_turned(family, lazy):
    for number, recipe in enumerate(family.SMALL):
        case = family.made(number=number, **recipe)
        floats = {name: lazy(x) for name, x in case.floats().items()}
        assert all(x.is_neg() for x in floats.values())
        expected = case.results()
        of_gradients = replace(case, **{field: lazy(getattr(case, field)) for field in case.GRADIENTS.values()})
        for found in (case.having(floats).results(), of_gradients.results()):
            assert all(torch.equal(found[name], x) for name, x in expected.items())
        assert all(torch.equal(x, expected[name]) for name, x in case.having(floats).call().items())  # without gradients


@pytest.mark.parametrize("few", [0, 1 << 20])
def test_an_index_whose_sign_is_still_to_be_turned(few):
    assert torch.equal(ops.segment_sum(X, negated(SEGMENT), 4, few=few), ops.segment_sum(X, SEGMENT, 4))
    assert torch.equal(ops.take(X, negated(SEGMENT), few=few), X[SEGMENT])
    seed = torch.tensor(5)
    assert torch.equal(ops.residual(X, Y, 0.5, negated(seed)), ops.residual(X, Y, 0.5, 5))


def test_prepared_sources_with_signs_that_are_still_to_be_turned():
    family = FAMILIES["cross_attention"]
    case = family.made([1, 1], [[3, 2], [1, 4]], 4, 2, 3)
    lazy = case.having({name: negated(x) for name, x in case.floats().items()})
    with torch.no_grad():
        expected = ops.cross_attention(case.hidden, case.cu_hidden, ops.prepare_sources(case.sources))
        for hidden, sources in ((case.hidden, lazy.sources), (lazy.hidden, case.sources), (lazy.hidden, lazy.sources)):
            assert torch.equal(ops.cross_attention(hidden, case.cu_hidden, ops.prepare_sources(sources)), expected)


def test_a_part_of_a_complex_loss_sends_back_gradients_with_signs_to_be_turned():
    def total(f: Callable, x: Tensor) -> Tensor:
        return torch.complex(torch.ones(5, 7, dtype=torch.float64), f(x)).conj().prod().imag

    found, expected = (torch.autograd.grad(total(f, leaf), leaf)[0] for f, leaf in (
        (lambda x: ops.linear(x, WEIGHT), X.clone().requires_grad_()), (lambda x: x @ WEIGHT.T, X.clone().requires_grad_())))
    same(found, expected, 1e-9)


@of_family
def test_zeros_that_are_still_to_be_written_are_zeros(family):
    case = family.made(number=1, **family.SMALL[0])
    for name, x in case.floats().items():
        found = case.having({name: torch._efficientzerotensor(x.shape)}).call()
        expected = case.having({name: torch.zeros_like(x)}).call()
        assert all(torch.equal(found[result], value) for result, value in expected.items()), name
    fields = case.GRADIENTS.values()
    found = replace(case, **{field: torch._efficientzerotensor(getattr(case, field).shape) for field in fields}).results()
    assert not any(x.any() for name, x in found.items() if name.startswith("grad_"))


def test_what_fails_for_another_reason_is_said_as_it_was():
    def fails(*_):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="^something else$"):
        common.call(None, fails, X)
