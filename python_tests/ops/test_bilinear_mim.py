"""The public op bilinear_mim: a share of its scorecard, its arguments and errors, and how it stands in torch."""

from __future__ import annotations

import itertools
import math
import types
from dataclasses import replace

import bilinear_mim_checks as checks
import pytest
import torch
from bilinear_mim_checks import FLOATS, KERNELS, counted, make_case, results, sides_of_equations
from helpers import close
from op_checks import identical
from torch._dynamo.backends.common import aot_autograd

from case_fast import equations
from case_fast.errors import ConfigError
from case_fast.ops import backend, bilinear_mim, mim_sides

SHARE = {1: 10, 2: 2 * len(checks.SHAPES), 3: 250, 4: 250, 5: 120, 6: 1, 11: 1}  # cases of each row; all: scorecard.py
SCORES = equations.SCORES


@pytest.fixture
def native(native):
    assert hasattr(native, "bilinear_mim_forward")
    return native


@pytest.mark.parametrize("row", SHARE)
def test_row_of_the_scorecard(native, row):
    check, full = checks.CHECKS[row]
    assert SHARE[row] <= full
    with counted() as calls:
        assert check(SHARE[row], "cpu") >= SHARE[row]
    assert calls["bilinear_mim_forward"] >= SHARE[row], "the native kernel did not run"
    if row not in (4,):
        assert calls["bilinear_mim_backward"] > 0


@pytest.mark.parametrize("row", [2, 3, 4, 5])
def test_row_of_the_scorecard_on_the_reference(on_reference, row):
    if backend.native_report()["available"]:
        with counted() as calls:
            checks.CHECKS[row][0](25, "cpu")
        assert not calls
    else:
        checks.CHECKS[row][0](25, "cpu")


@pytest.mark.parametrize("recipe", [
    {"pairs": 64, "rows": 30, "dim": 150, "magnitude": 5.0},
    {"pairs": 200, "dim": 16, "magnitude": 3.0, "score": "dot"},
    {"pairs": 60, "rows": 40, "dim": 40, "magnitude": 4.0, "num_negatives": 20},
])
def test_on_average_no_less_exact_than_plain_torch(recipe):
    assert max(checks.mean_errors(recipe, 30).values()) < 1.5


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


def test_reductions(runs):
    case = make_case(9, 4, dtype=torch.float64)
    side_y, side_x, logit = mim_sides(**case.arguments())
    loss = side_y + side_x
    assert torch.equal(bilinear_mim(**case.arguments(), reduction="none"), loss)
    assert torch.equal(bilinear_mim(**case.arguments(), reduction="sum"), loss.sum())
    assert torch.equal(bilinear_mim(**case.arguments()), loss.sum() / 9)
    assert close(logit, ((case.x @ case.weight) * case.y[case.positive]).sum(-1), 1e-12)
    assert bilinear_mim(**make_case(0, 3).arguments()) == 0


def test_the_default_pairs_row_with_row(runs):
    case = make_case(6)
    named = mim_sides(**(case.arguments() | {"positive": torch.arange(6)}))
    assert all(identical(a, b) for a, b in zip(mim_sides(**case.arguments()), named, strict=True))


def test_the_reference_is_the_equation(on_reference):
    case = make_case(8, 5, num_negatives=3, seed=8)
    expected = sides_of_equations(**case.arguments())
    assert all(identical(a, b) for a, b in zip(mim_sides(**case.arguments()), expected, strict=True))
    assert torch.equal(bilinear_mim(**case.arguments()), equations.bilinear_mim(**case.arguments()))


# ---- which backend runs, and that all draw alike


def test_draws_are_the_same_on_every_backend_and_uniform(runs):
    checks.check_draws(3, "cpu")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pairs, rows, negatives", [(40, None, 7), (33, 70, 3), (60, 5, 90), (300, 7, 2)])
def test_backends_agree_for_any_seed(native, monkeypatch, score, pairs, rows, negatives):
    for seed in (0, 5, 2**32 + 5, 2**63 - 1):
        case = make_case(pairs, rows, score=score, dtype=torch.float64, num_negatives=negatives, seed=seed)
        found = {}
        for name in ("native", "reference"):
            monkeypatch.setenv("CASE_FAST_BACKEND", name)
            found[name] = results(case)
        assert all(close(x, found["reference"][name], 1e-11) for name, x in found["native"].items())
    other = results(replace(case, seed=1))
    assert not torch.equal(other["side_y"], found["reference"]["side_y"])


def test_the_backend_that_is_named_is_the_one_that_runs(native, monkeypatch):
    case = make_case(9)
    for name, expected in (("native", 1), ("reference", 0), ("", 1)):
        monkeypatch.setenv("CASE_FAST_BACKEND", name)
        with counted() as calls:
            results(case)
        assert calls["bilinear_mim_forward"] == calls["bilinear_mim_backward"] == expected, name
        assert (backend.backend_name("bilinear_mim") == "native") == bool(expected)


def test_a_backend_that_cannot_serve_is_refused(monkeypatch):
    monkeypatch.setenv("CASE_FAST_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="CASE_FAST_BACKEND=triton: bilinear_mim on cpu cannot run there: "):
        mim_sides(**make_case(3).arguments())


@pytest.mark.parametrize("status, error", [(4, RuntimeError), (5, MemoryError)])
def test_a_status_of_the_kernel_is_never_passed_over(native, monkeypatch, status, error):
    case = make_case(3)
    broken = types.SimpleNamespace(bilinear_mim_saved=lambda *a: 0, bilinear_mim_forward=lambda *a: status)
    monkeypatch.setattr(backend, "native", broken)
    with pytest.raises(error, match="bilinear_mim"):
        KERNELS._forward_op("native", case.x, case.y, case.weight, None, None, 0, case.score, True)


# ---- arguments

BASE = make_case(6, 4)
DOT = {"score": "dot", "weight": None}

WRONG = [  # argument that the message begins with, changed arguments, error
    ("x", {"x": BASE.x[0]}, ValueError),
    ("x", {"x": BASE.x.int()}, TypeError),
    ("x", {"x": BASE.x.to(torch.float8_e4m3fn)}, TypeError),
    ("x", {"x": BASE.x[:, :0], "y": BASE.y[:, :0], "weight": BASE.weight[:0, :0]}, ValueError),
    ("y", {"y": BASE.y[:, 1:]}, ValueError),
    ("y", {"y": BASE.y[0]}, ValueError),
    ("y", {"y": BASE.y.double()}, TypeError),
    ("y", {"y": BASE.y.to("meta")}, ValueError),
    ("weight", {"weight": BASE.weight[1:]}, ValueError),
    ("weight", {"weight": BASE.weight[:, 1:]}, ValueError),
    ("weight", {"weight": BASE.weight.double()}, TypeError),
    ("weight", {"weight": BASE.weight.to("meta")}, ValueError),
    ("weight", {"weight": None}, ValueError),
    ("weight", {"score": "dot"}, ValueError),
    ("score", {"score": "cosine"}, ValueError),
    ("positive", {"positive": None}, ValueError),
    ("positive", {"positive": BASE.positive[1:]}, ValueError),
    ("positive", {"positive": BASE.positive.unsqueeze(1)}, ValueError),
    ("positive", {"positive": BASE.positive.float()}, TypeError),
    ("positive", {"positive": BASE.positive.short()}, TypeError),
    ("positive", {"positive": BASE.positive.to("meta")}, ValueError),
    ("positive", {"positive": BASE.positive + 4}, IndexError),
    ("positive", {"positive": BASE.positive - 4, **DOT}, IndexError),
    ("positive", {"y": BASE.y[:0]}, IndexError),
    ("num_negatives", {"num_negatives": 0}, ValueError),
    ("num_negatives", {"num_negatives": -1}, ValueError),
    ("num_negatives", {"num_negatives": 2**31}, ValueError),
    ("num_negatives", {"num_negatives": 2.0}, TypeError),
    ("num_negatives", {"num_negatives": True}, TypeError),
    ("seed", {"seed": -1}, ValueError),
    ("seed", {"seed": 2**63}, ValueError),
    ("seed", {"seed": 0.5}, TypeError),
    ("reduction", {"reduction": "max"}, ValueError),
]


@pytest.mark.parametrize("name, change, error", WRONG)
def test_a_wrong_argument_is_named_before_any_kernel_runs(runs, name, change, error):
    with pytest.raises(error) as caught:
        bilinear_mim(**(BASE.arguments() | change))
    assert str(caught.value).startswith(f"{name} ")


def test_the_message_of_a_wrong_index_says_where_it_is(runs):
    positive = BASE.positive.clone()
    positive[3] = 99
    with pytest.raises(IndexError, match=r"^positive holds 99 at place 3; it must be in \[0, 4\)$"):
        bilinear_mim(**(BASE.arguments() | {"positive": positive}))


@pytest.mark.parametrize("score", SCORES)
def test_every_subset_of_inputs_may_want_a_gradient(score):
    case = make_case(7, 5, score=score, dtype=torch.float64, num_negatives=4)
    all_of_them = results(case)
    for wanted in itertools.product([False, True], repeat=len(case.floats())):
        leaves = {name: x.clone().requires_grad_(w) for (name, x), w in zip(case.floats().items(), wanted, strict=True)}
        side_y, side_x, _ = mim_sides(**(case.arguments() | leaves))
        assert side_y.requires_grad == side_x.requires_grad == any(wanted)
        assert torch.equal(side_y, all_of_them["side_y"]) and torch.equal(side_x, all_of_them["side_x"])
        if any(wanted):
            torch.autograd.backward((side_y, side_x), (case.grad_y, case.grad_x))
        for (name, leaf), w in zip(leaves.items(), wanted, strict=True):
            assert torch.equal(leaf.grad, all_of_them[f"grad_{name}"]) if w else leaf.grad is None


def test_one_side_may_be_used_alone():
    case = make_case(7, 5, dtype=torch.float64)
    for name in ("grad_y", "grad_x"):
        alone = replace(case, **{name: torch.zeros_like(case.grad_y)})
        assert all(close(x, results(alone, sides_of_equations)[key], 1e-12) for key, x in results(alone).items())
    x = case.x.clone().requires_grad_()
    (found,) = torch.autograd.grad(mim_sides(**(case.arguments() | {"x": x}))[1], x, case.grad_x)
    assert torch.equal(found, results(replace(case, grad_y=torch.zeros_like(case.grad_y)))["grad_x"])


def test_no_matrix_of_scores_is_kept(native):
    case = make_case(300, 200, dim=7)
    leaves = {name: x.requires_grad_() for name, x in case.floats().items()}
    saved = mim_sides(**(case.arguments() | leaves))[0].grad_fn.saved_tensors
    own = {x.data_ptr() for x in case.arguments().values() if isinstance(x, torch.Tensor)}
    kept = [x for x in saved if x.data_ptr() not in own]
    assert kept and sum(x.numel() for x in kept) <= 2 * 500 * 7


def test_an_input_changed_before_backward_is_noticed(native):
    x = BASE.x.clone().requires_grad_()
    doubled = x * 2
    loss = bilinear_mim(**(BASE.arguments() | {"x": doubled}))
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_refused_but_on_the_reference(runs):
    case = make_case(4, dtype=torch.float64)
    x = case.x.clone().requires_grad_()
    (first,) = torch.autograd.grad(bilinear_mim(**(case.arguments() | {"x": x})), x, create_graph=True)
    assert first.requires_grad
    if runs == "native":
        with pytest.raises(NotImplementedError, match="bilinear_mim has no second derivative; with CASE_FAST_BACKEND=reference"):
            first.sum().backward()
    else:
        first.square().sum().backward()
        assert x.grad.isfinite().all()


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES)
def test_half_precision_is_computed_in_float32_on_cpu(runs, dtype, score):
    case = make_case(20, 11, dtype=dtype, score=score)
    found, exact = results(case), results(case.to(torch.float32))
    for name, x in found.items():
        expected = dtype if name.startswith("grad_") else torch.float32
        assert x.dtype == expected and identical(x, exact[name].to(expected))


def test_autocast_computes_in_float32_on_cpu(runs):
    case = make_case(20, 11)
    expected = results(case)
    mixed = replace(case, y=case.y.bfloat16())
    assert all(torch.equal(x, expected[name]) for name, x in results(case, autocast=True).items())
    found = results(mixed, autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        linear = torch.nn.Linear(5, 5, bias=False)
        loss = bilinear_mim(linear(case.x), case.y, case.weight, case.positive)
    assert found["side_y"].dtype == loss.dtype == torch.float32
    assert (found["grad_y"].dtype, found["grad_x"].dtype) == (torch.bfloat16, torch.float32)
    assert close(found["side_y"], expected["side_y"], 0.05)
    loss.backward()
    assert linear.weight.grad.dtype == torch.float32 and linear.weight.grad.abs().sum() > 0


# ---- torch.compile


def around(x, y, weight, positive, num_negatives, seed, score):
    """The op among others."""
    side_y, side_x, logit = mim_sides(x * 1.5, y, weight, positive, num_negatives, seed, score)
    return side_y.sin(), side_x * 2, logit


@pytest.mark.parametrize("runs, compiler, dynamic, negatives, score", [
    ("native", "inductor", None, None, "bilinear_sigmoid"), ("native", "aot_eager", True, None, "bilinear_sigmoid"),
    ("native", "aot_eager", True, 3, "dot"), ("native", "aot_eager", None, 3, "bilinear_sigmoid"),
    ("reference", "eager", True, None, "bilinear_sigmoid"), ("reference", "eager", True, 3, "dot"),
], indirect=["runs"])
def test_compiles_without_graph_breaks(runs, compiler, dynamic, negatives, score):
    torch._dynamo.reset()
    compiled = torch.compile(around, fullgraph=True, dynamic=dynamic, backend=compiler)
    for place, (pairs, rows) in enumerate([(9, 5), (12, 20), (30, 7)]):
        case = make_case(pairs, rows, score=score, number=place, num_negatives=negatives, seed=3 + place)
        expected, found = results(case, around), results(case, compiled)
        assert all(close(x, expected[name], 1e-5) for name, x in found.items())
    assert close(compiled(**case.arguments())[0], expected["side_y"], 1e-5)


def test_the_size_that_a_compiler_is_told_is_the_kernel_s(native):
    for pairs, rows, dim, negatives, score in itertools.product((0, 1, 9), (0, 1, 20), (1, 30), (None, 1, 15, 16), SCORES):
        x, y = torch.empty(pairs, dim), torch.empty(rows, dim)
        expected = native.bilinear_mim_saved(KERNELS._problem(x, y, None, negatives, 0, score))
        assert KERNELS._saved_elements(pairs, rows, dim, negatives, score) == expected


def test_a_new_seed_does_not_compile_again(native):
    torch._dynamo.reset()
    compilations = []

    def compiler(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(around, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    for seed in (3, 4, 5, 2**40, 2**62):
        case = make_case(9, 5, num_negatives=2, seed=seed)
        assert close(compiled(**case.arguments())[0], around(**case.arguments())[0], 1e-6)
    assert len(compilations) <= 2


def test_compiled_code_calls_the_kernel_and_raises_its_errors(native):
    torch._dynamo.reset()
    compiled = torch.compile(bilinear_mim, fullgraph=True)
    arguments = make_case(9, 4).arguments()
    with counted() as calls:
        loss = compiled(**arguments)
    assert calls["bilinear_mim_forward"] == 1 and close(loss, bilinear_mim(**arguments), 1e-6)
    with pytest.raises(IndexError, match="^positive holds 4 at place 0"):
        compiled(**(arguments | {"positive": torch.full_like(arguments["positive"], 4)}))


def test_floats_are_named_alike_everywhere():
    assert FLOATS == tuple(BASE.floats())
