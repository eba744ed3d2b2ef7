"""What the ops of all families have in common: a share of the scorecard, which backend runs, arguments and errors, and how they
stand in torch. What one of them says alone is in the test file of its name."""

from __future__ import annotations

import itertools
import types
from dataclasses import replace

import pytest
import torch
from helpers import close
from op_case import HALF, generator
from op_cases import FAMILIES
from op_checks import ROWS, counted, full_size, identical, mean_errors
from torch._dynamo.backends.common import aot_autograd

from case_fast import ops
from case_fast.errors import ConfigError
from case_fast.ops import backend

SHARE = {3: 100, 4: 250, 5: 150, 6: 1, 11: 1}  # cases of a row, where not all of them; all: scorecard.py
of_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def of_each(names: str, listed: str):
    """A test for each entry that each family has under this name."""
    found = [pytest.param(family, *(entry if isinstance(entry, tuple) else (entry,)), id=f"{name}-{place}")
             for name, family in FAMILIES.items() for place, entry in enumerate(getattr(family, listed))]
    return pytest.mark.parametrize(f"family, {names}", found)


def of_rows(rows):
    """A test for each family and each of these rows of the scorecard that it has cases for."""
    found = [pytest.param(family, row, id=f"{row}-{name}") for row in rows for name, family in FAMILIES.items()
             if full_size(family, row)]
    return pytest.mark.parametrize("family, row", found)


def first_of(case) -> tuple[str, torch.Tensor]:
    return next(iter(case.floats().items()))


# ---- the scorecard


def test_the_table_holds_every_family_of_the_native_module(native):
    assert set(native.report()["families"]) == set(FAMILIES)
    assert set(FAMILIES) <= set(ops.__all__)
    assert all(hasattr(native, name) for family in FAMILIES.values() for name in family.native_calls())


@of_rows(ROWS)
def test_the_row_of_the_scorecard_holds(native, family, row):
    if row == 3:
        pytest.importorskip("hypothesis")
    size = min(SHARE.get(row, full_size(family, row)), full_size(family, row))
    with counted(family) as calls:
        assert ROWS[row](family, size, "cpu") >= size
    forward, *others = family.native_calls()
    assert calls[forward] >= size, "the native kernel did not run"
    assert row == 4 or all(calls[name] > 0 for name in (others[:1] if row == 2 else others))


@of_rows((2, 3, 4, 5))
def test_the_row_of_the_scorecard_holds_on_the_reference(on_reference, family, row):
    if row == 3:
        pytest.importorskip("hypothesis")
    size = min(25, full_size(family, row))
    with counted(family) as calls:
        assert ROWS[row](family, size, "cpu") >= size
    assert not calls


@of_each("recipe, cases, most, most_of_gradients", "AVERAGE")
def test_on_average_hardly_less_exact_than_plain_torch(family, recipe, cases, most, most_of_gradients):
    for name, ratio in mean_errors(lambda number: family.made(number=number, **recipe), cases).items():
        assert ratio < (most_of_gradients if name.startswith("grad_") else most), name


# ---- which backend runs


@of_each("recipe", "DRAWN")
def test_backends_drop_and_draw_alike_for_any_seed(native, monkeypatch, family, recipe):
    for seed in (0, 5, 2**32 + 5, 2**63 - 1):
        case, found = family.made(dtype=torch.float64, seed=seed, **recipe), {}
        for name in ("native", "reference"):
            monkeypatch.setenv("CASE_FAST_BACKEND", name)
            with counted(family) as calls:
                found[name] = case.results()
            assert bool(calls) == (name == "native")
        assert all(close(x, found["reference"][name], 1e-12) for name, x in found["native"].items())
    name = family.OUTPUTS[0]
    assert not torch.equal(replace(case, seed=1).results()[name], found["reference"][name])


@of_each("recipe", "DRAWN")
def test_a_tensor_drops_and_draws_as_the_number_that_it_holds(runs, family, recipe):
    for seed in (0, 5, 2**32 + 5, 2**63 - 1):
        case = family.made(seed=seed, **recipe)
        expected = case.results()
        for given in (case.seeded_by_tensor(), case.seeded_by_tensor(shape=(1,)), case.seeded_by_tensor(seed - 2**63)):
            with counted(family) as calls:
                found = given.results()
            assert bool(calls) == (runs == "native")
            assert all(identical(x, expected[name]) for name, x in found.items())


@of_each("recipe", "DRAWN")
def test_a_tensor_seed_is_read_when_the_kernels_run(runs, family, recipe):
    """Calls that were recorded once give, when they run again, what the seed is by then, as those of a CUDA graph do."""
    case = family.made(seed=3, **recipe)
    of_seed = {seed: replace(case, seed=seed).results() for seed in (3, 4)}
    given = case.seeded_by_tensor()
    for seed in (3, 4, 3):
        given.seed.fill_(seed)
        assert all(identical(x, of_seed[seed][name]) for name, x in given.results().items())
    if runs == "native":
        op, recorded = next(given.registered(runs))
        for seed in (4, 3):
            given.seed.fill_(seed)
            _, arguments = next(replace(case, seed=seed).registered(runs))
            assert identical(op(*recorded)[0], op(*arguments)[0])


@of_each("recipe", "DRAWN")
def test_a_seed_changed_before_backward_is_noticed(native, family, recipe):
    case = family.made(seed=3, **recipe).seeded_by_tensor()
    found = case.differentiable({name: x.clone().requires_grad_() for name, x in case.floats().items()})
    case.seed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(x.sum() for x in found).backward()


@of_family
def test_the_backend_that_is_named_is_the_one_that_runs(native, monkeypatch, family):
    case = family.made(**family.SMALL[0])
    for name, expected in (("native", 1), ("reference", 0), ("", 1)):
        monkeypatch.setenv("CASE_FAST_BACKEND", name)
        with counted(family) as calls:
            case.results()
        assert [calls[function] for function in family.native_calls()] == [expected] * len(family.native_calls()), name
        assert backend.backend_name(family.family) == ("native" if expected else "reference")


@of_each("recipe", "SMALL")
def test_the_reference_is_the_equation(on_reference, family, recipe):
    case = family.made(**recipe)
    expected = case.call(case.plain)
    assert all(identical(x, expected[name]) for name, x in case.call().items())


@of_family
def test_a_backend_that_cannot_serve_is_refused(monkeypatch, family):
    monkeypatch.setenv("CASE_FAST_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match=f"CASE_FAST_BACKEND=triton: {family.family} on cpu cannot run there: "):
        family.made(**family.SMALL[0]).call()


@pytest.mark.parametrize("family, status, said", [
    pytest.param(family, *row, id=f"{name}-{row[0]}")
    for name, family in FAMILIES.items() for row in [*family.STATUSES, (4, name), (5, name)]
])
def test_a_status_of_the_kernel_is_never_passed_over(native, monkeypatch, family, status, said):
    error = {4: RuntimeError, 5: MemoryError}.get(status, IndexError)
    op, arguments = next(family.made(**family.SMALL[0]).registered("native"))
    stand_in = {f"{family.family}_saved": lambda *a: 0, f"{family.family}_forward": lambda *a: status}
    monkeypatch.setattr(backend, "native", types.SimpleNamespace(**stand_in))
    with pytest.raises(error) as caught:
        op(*arguments)
    assert said in str(caught.value)


# ---- arguments


@of_each("said, change, error", "WRONG")
def test_a_wrong_argument_is_named_before_any_kernel_runs(runs, family, said, change, error):
    """But for what an index holds, which the kernels check themselves."""
    good = family.BASE.call()
    with counted(family) as calls, pytest.raises(error) as caught:
        family.public(**(family.BASE.arguments() | change))
    assert str(caught.value).startswith(said)
    assert not calls or (runs, error) == ("native", IndexError)
    assert all(identical(x, good[name]) for name, x in family.BASE.call().items())


@of_each("recipe", "SMALL")
def test_any_of_the_inputs_may_want_a_gradient(family, recipe):
    """Each subset of up to five, of more each alone, none and all."""
    case = family.made(dtype=torch.float64, **recipe)
    expected, floats = case.results(), case.floats()
    subsets = itertools.product([False, True], repeat=len(floats))
    if len(floats) > 5:
        subsets = [[place in chosen for place in range(len(floats))] for chosen in
                   [(), range(len(floats)), *((place,) for place in range(len(floats)))]]
    for wanted in subsets:
        leaves = {name: x.clone().requires_grad_(w) for (name, x), w in zip(floats.items(), wanted, strict=True)}
        found = case.having(leaves).call()
        for name, x in found.items():
            assert torch.equal(x, expected[name]) and x.requires_grad == (any(wanted) and name in case.GRADIENTS)
        if any(wanted):
            torch.autograd.backward([found[name] for name in case.GRADIENTS], list(case.gradients().values()))
        for (name, leaf), w in zip(leaves.items(), wanted, strict=True):
            assert torch.equal(leaf.grad, expected[f"grad_{name}"]) if w else leaf.grad is None


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if not family.LINEAR], ids=lambda x: x.family)
def test_an_input_changed_before_backward_is_noticed(native, family):
    case = family.made(**family.SMALL[0])
    name, x = first_of(case)
    doubled = x.clone().requires_grad_() * 2
    found = case.differentiable({**case.floats(), name: doubled})
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|has been modified inplace"):  # the latter: of a view
        sum(x.sum() for x in found).backward()


@of_family
def test_backward_may_run_twice_and_of_expanded_gradients(runs, family):
    case = family.made(dtype=torch.float64, **family.SMALL[0])
    name, x = first_of(case)
    leaf = x.clone().requires_grad_()
    total = sum(x.sum() for x in case.differentiable({**case.floats(), name: leaf}))
    first, again = (torch.autograd.grad(total, leaf, retain_graph=True)[0] for _ in range(2))
    ones = replace(case, **{case.GRADIENTS[name]: torch.ones_like(x) for name, x in case.gradients().items()})
    assert torch.equal(first, again) and torch.equal(first, ones.results()[f"grad_{name}"])


@of_family
def test_second_derivatives_are_refused_but_on_the_reference_and_of_what_is_linear(runs, family):
    case = family.made(dtype=torch.float64, **family.SMALL[0])
    name, x = first_of(case)
    leaf = x.clone().requires_grad_()
    total = sum(x.square().sum() for x in case.differentiable({**case.floats(), name: leaf}))
    (first,) = torch.autograd.grad(total, leaf, create_graph=True)
    assert first.requires_grad
    if runs == "native" and not family.LINEAR:
        said = f"{family.family} has no second derivative; with CASE_FAST_BACKEND=reference it has"
        with pytest.raises(NotImplementedError, match=said):
            first.square().sum().backward()
    else:
        first.square().sum().backward()
        assert leaf.grad.isfinite().all()


# ---- dtypes


@of_each("recipe", "SMALL")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_computed_in_float32_on_cpu(runs, family, recipe, dtype):
    case = family.made(dtype=dtype, **recipe)
    exact = case.to(torch.float32).results()
    for name, x in case.results().items():
        assert identical(x, exact[name].to(case.kind(name))), name


@of_each("recipe", "SMALL")
def test_autocast_computes_in_float32_on_cpu(runs, family, recipe):
    """Whichever inputs are in half precision; each gradient is in the dtype of its input."""
    case = family.made(**recipe)
    floats = case.floats()
    for halved in ((), list(floats)[1:2], list(floats)[1::2], list(floats)):
        given = case.having({name: x.bfloat16() if name in halved else x for name, x in floats.items()})
        expected = case.having({name: x.float() for name, x in given.floats().items()}).results()
        found = given.results(autocast=True)
        assert all(identical(found[name], expected[name]) for name in found if not name.startswith("grad_"))
        for name, x in given.floats().items():
            gradient, exact = found[f"grad_{name}"], expected[f"grad_{name}"]
            assert gradient.dtype == x.dtype
            assert torch.equal(gradient, exact) if x.dtype == torch.float32 else close(gradient.float(), exact, 1e-2)


@of_family
def test_under_autocast_what_a_layer_gives_in_half_precision_is_taken(runs, family):
    case = family.made(**family.SMALL[0])
    name, x = first_of(case)
    linear = torch.nn.Linear(x.shape[-1], x.shape[-1], bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        projected = linear(x)
        found = case.differentiable({**case.floats(), name: projected})
    assert projected.dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in found)
    sum(x.sum() for x in found).backward()
    assert linear.weight.grad.dtype == torch.float32 and linear.weight.grad.abs().sum() > 0


# ---- torch.compile


def among_others(family):
    """The op between others, called as it."""
    name, _ = first_of(family.BASE)

    def around(**arguments):
        found = family.op(**(arguments | {name: arguments[name] * 1.5}))
        first, *rest = found if isinstance(found, tuple) else (found,)
        return first.sin(), *rest

    return around


@of_each("runs, compiler, dynamic, calls", "COMPILED")
def test_compiles_without_graph_breaks(request, monkeypatch, family, runs, compiler, dynamic, calls):
    if runs == "native":
        request.getfixturevalue("native")
    monkeypatch.setenv("CASE_FAST_BACKEND", runs)
    torch._dynamo.reset()
    around = among_others(family)
    compiled = torch.compile(around, fullgraph=True, dynamic=dynamic, backend=compiler)
    for place, recipe in enumerate(calls):
        case = family.made(number=place, **recipe)
        expected = case.results(around)
        with counted(family) as ran:
            found, without_gradient = case.results(compiled), case.call(compiled)
        assert ran[f"{family.family}_forward"] == 2 * (runs == "native")
        assert all(close(x, expected[name], 1e-5) for name, x in found.items())
        assert all(close(x, expected[name], 1e-5) for name, x in without_gradient.items())


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.DRAWN], ids=lambda family: family.family)
def test_a_new_seed_does_not_compile_again(native, family):
    torch._dynamo.reset()
    compilations, around = [], among_others(family)

    def compiler(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(around, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    cases = [family.made(seed=seed, **family.DRAWN[0]) for seed in (3, 4, 5, 2**40, 2**62)]
    for case in cases:
        expected = case.call(around)
        assert all(close(x, expected[name], 1e-6) for name, x in case.call(compiled).items())
    assert 1 <= len(compilations) <= 2
    compilations.clear()
    for case in cases:
        expected = case.results(around)
        assert all(close(x, expected[name], 1e-5) for name, x in case.seeded_by_tensor().results(compiled).items())
    assert len(compilations) == 2  # forward and backward


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.STATUSES], ids=lambda family: family.family)
def test_compiled_code_calls_the_kernel_and_raises_its_errors(native, family):
    torch._dynamo.reset()
    compiled = torch.compile(family.op, fullgraph=True)
    takes_indices = bool(family.STATUSES)
    case = family.damaged(3, generator(4), "cpu").case if takes_indices else family.made(**family.SMALL[0])
    expected = case.call()
    with counted(family) as calls:
        found = case.call(compiled)
    assert calls[f"{family.family}_forward"] == 1 and all(torch.equal(x, expected[key]) for key, x in found.items())
    if not takes_indices:
        return
    _, name, broken, _ = family.damaged(3, generator(4), "cpu")
    with pytest.raises(IndexError) as expected:
        broken.call()
    with pytest.raises(IndexError) as caught:
        broken.call(compiled)
    assert str(caught.value) == str(expected.value) and str(caught.value).startswith(f"{name} ")
