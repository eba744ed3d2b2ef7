"""The public op graph_attention: a share of its scorecard, its arguments and errors, and how it stands in torch."""

from __future__ import annotations

import itertools
import types
from dataclasses import replace

import graph_attention_checks as checks
import pytest
import torch
from graph_attention_checks import FLOATS, KERNELS, counted, identical, make_case, results
from helpers import close
from torch._dynamo.backends.common import aot_autograd

from case_fast import equations, ops
from case_fast.errors import ConfigError
from case_fast.ops import backend, graph_attention

SHARE = {1: 8, 2: len(checks.SHAPES), 3: 250, 4: 250, 5: 100, 6: 1, 11: 1}  # cases of each row; all of them: scorecard.py


@pytest.mark.parametrize("row", SHARE)
def test_row_of_the_scorecard(native, row):
    check, full = checks.CHECKS[row]
    assert SHARE[row] <= full
    with counted() as calls:
        assert check(SHARE[row], "cpu") >= SHARE[row]
    assert calls["graph_attention_forward"] >= SHARE[row], "the native kernel did not run"
    if row not in (4,):
        assert calls["graph_attention_backward"] > 0


@pytest.mark.parametrize("row", [2, 3, 4, 5])
def test_row_of_the_scorecard_on_the_reference(on_reference, row):
    if backend.native_report()["available"]:
        with counted() as calls:
            checks.CHECKS[row][0](25, "cpu")
        assert not calls
    else:
        checks.CHECKS[row][0](25, "cpu")


@pytest.mark.parametrize(
    "recipe",
    [
        {"vertices": 32, "edges": 100, "dim": 150, "magnitude": 3.0},
        {"vertices": 32, "edges": 100, "dim": 16, "magnitude": 5.0, "relations": None},
        {"vertices": 8, "edges": 600, "dim": 40, "magnitude": 2.0},
    ],
)
def test_on_average_no_less_exact_than_plain_torch(recipe):
    assert max(checks.mean_errors(recipe, 30).values()) < 1.3


def test_zero_scale_is_the_mean_of_the_neighbours():
    value = torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1)
    indptr, indices = torch.tensor([0, 3, 3, 4]), torch.tensor([0, 1, 2, 1])
    query = torch.full_like(value, 7.0)
    assert graph_attention(query, query, value, indptr, indices, scale=0.0).flatten().tolist() == [3.0, 0.0, 2.0]


# ---- which backend runs


def test_backends_drop_the_same_weights(native, monkeypatch):
    for seed in (0, 5, 2**32 + 5, 2**63 - 1):
        case = make_case(30, 200, dtype=torch.float64, dropout_p=0.4, seed=seed)
        found = {}
        for name in ("native", "reference"):
            monkeypatch.setenv("CASE_FAST_BACKEND", name)
            found[name] = results(case)
        assert all(close(x, found["reference"][name], 1e-12) for name, x in found["native"].items())
    other = results(replace(case, seed=1))
    assert not torch.equal(other["out"], found["reference"]["out"])


def test_the_backend_that_is_named_is_the_one_that_runs(native, monkeypatch):
    case = make_case(9, 30)
    for name, expected in (("native", 1), ("reference", 0), ("", 1)):
        monkeypatch.setenv("CASE_FAST_BACKEND", name)
        with counted() as calls:
            results(case)
        assert calls["graph_attention_forward"] == calls["graph_attention_backward"] == expected, name
        assert (backend.backend_name() == "native") == bool(expected)


def test_a_backend_that_cannot_serve_is_refused(monkeypatch):
    monkeypatch.setenv("CASE_FAST_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="CASE_FAST_BACKEND=triton: graph_attention on cpu cannot run there: "):
        graph_attention(**make_case(3, 5).arguments())


@pytest.mark.parametrize("status, error", [(1, IndexError), (4, RuntimeError), (5, MemoryError)])
def test_a_status_of_the_kernel_is_never_passed_over(native, monkeypatch, status, error):
    monkeypatch.setattr(backend, "native", types.SimpleNamespace(graph_attention_forward=lambda *a: status))
    with pytest.raises(error, match="graph_attention|indptr"):
        KERNELS._forward_op("native", *list(make_case(3, 5).arguments().values())[:8], 1.0, 0.0, 0)


# ---- arguments

BASE = make_case(6, 20)


def column(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze(1)


WRONG = [  # argument that the message begins with, changed arguments, error
    ("query", {"query": BASE.query[0]}, ValueError),
    ("query", {"query": BASE.query.int()}, TypeError),
    ("query", {name: getattr(BASE, name)[:, :, :0] for name in FLOATS}, ValueError),
    ("query", {name: getattr(BASE, name)[:, :0] for name in FLOATS}, ValueError),
    ("query", {"query": BASE.query.to(torch.float8_e4m3fn)}, TypeError),
    ("key", {"key": BASE.key[:5]}, ValueError),
    ("key", {"key": BASE.key.double()}, TypeError),
    ("key", {"key": BASE.key.to("meta")}, ValueError),
    ("value", {"value": BASE.value[:, :1]}, ValueError),
    ("value", {"value": BASE.value.half()}, TypeError),
    ("indptr", {"indptr": BASE.indptr[:-1]}, ValueError),
    ("indptr", {"indptr": BASE.indptr.float()}, TypeError),
    ("indptr", {"indptr": BASE.indptr.to("meta")}, ValueError),
    ("indptr", {"indptr": column(BASE.indptr)}, ValueError),
    ("indptr", {"indptr": BASE.indptr + 1}, IndexError),
    ("indptr", {"indptr": BASE.indptr.flip(0)}, IndexError),
    ("indptr", {"indices": BASE.indices[:-1], "relation": BASE.relation[:-1]}, IndexError),
    ("indices", {"indices": BASE.indices.bool()}, TypeError),
    ("indices", {"indices": BASE.indices.short()}, TypeError),
    ("indices", {"indices": column(BASE.indices)}, ValueError),
    ("indices", {"indices": BASE.indices + 6}, IndexError),
    ("relation must", {"relation": BASE.relation[1:]}, ValueError),
    ("relation must", {"relation": BASE.relation.double()}, TypeError),
    ("relation holds", {"relation": BASE.relation + 3}, IndexError),
    ("relation needs relation_query", {"relation_query": None}, ValueError),
    ("relation needs relation_key", {"relation_key": None}, ValueError),
    ("relation names", {"relation_query": BASE.relation_query[:0], "relation_key": BASE.relation_key[:0]}, IndexError),
    ("relation_query is given without relation", {"relation": None}, ValueError),
    ("relation_key is given without relation", {"relation": None, "relation_query": None}, ValueError),
    ("relation_query", {"relation_query": BASE.relation_query[:, :, 1:]}, ValueError),
    ("relation_query", {"relation_query": BASE.relation_query.double()}, TypeError),
    ("relation_key", {"relation_key": BASE.relation_key[1:]}, ValueError),
    ("scale", {"scale": -0.1}, ValueError),
    ("scale", {"scale": float("nan")}, ValueError),
    ("scale", {"scale": float("inf")}, ValueError),
    ("dropout_p", {"dropout_p": 1.0}, ValueError),
    ("dropout_p", {"dropout_p": -0.1}, ValueError),
    ("dropout_p", {"dropout_p": float("nan")}, ValueError),
    ("seed", {"seed": -1}, ValueError),
    ("seed", {"seed": 2**63}, ValueError),
]


@pytest.mark.parametrize("runs", ["native", "reference"])
@pytest.mark.parametrize("name, change, error", WRONG)
def test_a_wrong_argument_is_named_before_any_kernel_runs(request, monkeypatch, runs, name, change, error):
    if runs == "native":
        request.getfixturevalue("native")
    monkeypatch.setenv("CASE_FAST_BACKEND", runs)
    with pytest.raises(error) as caught:
        graph_attention(**(BASE.arguments() | change))
    assert str(caught.value).startswith(name)


def test_the_message_of_a_wrong_index_says_where_it_is():
    indices = BASE.indices.clone()
    indices[3] = 99
    with pytest.raises(IndexError, match=r"^indices holds 99 at place 3; it must be in \[0, 6\)$"):
        graph_attention(**(BASE.arguments() | {"indices": indices}))


def test_every_subset_of_inputs_may_want_a_gradient():
    case = make_case(7, 25, dtype=torch.float64)
    all_of_them = results(case)
    for wanted in itertools.product([False, True], repeat=len(FLOATS)):
        leaves = {name: x.clone().requires_grad_(w) for (name, x), w in zip(case.floats().items(), wanted, strict=True)}
        out = graph_attention(**(case.arguments() | leaves))
        assert out.requires_grad == any(wanted) and torch.equal(out, all_of_them["out"])
        if any(wanted):
            out.backward(case.grad_out)
        for (name, leaf), w in zip(leaves.items(), wanted, strict=True):
            assert torch.equal(leaf.grad, all_of_them[name]) if w else leaf.grad is None


def test_inputs_and_weights_are_all_that_is_kept(native):
    case = make_case(50, 200, heads=3, dim=40)
    leaves = {name: x.requires_grad_() for name, x in case.floats().items()}
    saved = graph_attention(**(case.arguments() | leaves)).grad_fn.saved_tensors
    own = {x.data_ptr() for x in case.arguments().values() if isinstance(x, torch.Tensor)}
    (weights,) = [x for x in saved if x.data_ptr() not in own]
    assert weights.shape == (200, 3)


def test_an_input_changed_before_backward_is_noticed():
    query = BASE.query.clone().requires_grad_()
    doubled = query * 2
    out = graph_attention(**(BASE.arguments() | {"query": doubled}))
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivatives_are_refused_but_on_the_reference(native, monkeypatch):
    case = make_case(4, 9, dtype=torch.float64)
    for runs in ("native", "reference"):
        monkeypatch.setenv("CASE_FAST_BACKEND", runs)
        query = case.query.clone().requires_grad_()
        out = graph_attention(**(case.arguments() | {"query": query}))
        (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        assert first.requires_grad
        if runs == "native":
            with pytest.raises(NotImplementedError, match="no second derivative; with CASE_FAST_BACKEND=reference it has"):
                first.sum().backward()
        else:
            first.sum().backward()
            assert query.grad.isfinite().all()


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_on_cpu(dtype):
    case = make_case(20, 70, dtype=dtype)
    found, exact = results(case), results(case.to(torch.float32))
    for name, x in found.items():
        assert x.dtype == dtype and identical(x, exact[name].to(dtype))


@pytest.mark.parametrize("runs", ["native", "reference"])
def test_autocast_computes_in_float32_on_cpu(request, monkeypatch, runs):
    if runs == "native":
        request.getfixturevalue("native")
    monkeypatch.setenv("CASE_FAST_BACKEND", runs)
    case = make_case(20, 70)
    expected = results(case)
    mixed = replace(case, key=case.key.bfloat16(), relation_key=case.relation_key.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(x, expected[name]) for name, x in results(case).items())
        found = results(mixed)
        linear = torch.nn.Linear(5, 5, bias=False)
        projected = graph_attention(linear(case.query), case.key, case.value, case.indptr, case.indices)
    assert found["out"].dtype == projected.dtype == torch.float32
    assert (found["key"].dtype, found["query"].dtype) == (torch.bfloat16, torch.float32)
    assert close(found["out"], expected["out"], 0.05)
    projected.sum().backward()
    assert linear.weight.grad.dtype == torch.float32 and linear.weight.grad.abs().sum() > 0


# ---- torch.compile


def around(query, key, value, indptr, indices, relation, relation_query, relation_key, dropout_p, seed):
    """The op among others."""
    tables = relation, relation_query, relation_key
    return graph_attention(query * 1.5, key, value, indptr, indices, *tables, dropout_p=dropout_p, seed=seed).sin()


@pytest.mark.parametrize(
    "runs, compiler, dynamic, dropout_p",
    [("native", "inductor", None, 0.1), ("native", "aot_eager", True, 0.1), ("reference", "aot_eager", True, 0.0)],
)
def test_compiles_without_graph_breaks(request, monkeypatch, runs, compiler, dynamic, dropout_p):
    if runs == "native":
        request.getfixturevalue("native")
    monkeypatch.setenv("CASE_FAST_BACKEND", runs)
    torch._dynamo.reset()
    compiled = torch.compile(around, fullgraph=True, dynamic=dynamic, backend=compiler)
    for place, (vertices, edges, relations) in enumerate([(9, 31, 4), (12, 20, 4), (30, 100, 5)]):
        case = make_case(vertices, edges, relations=relations, number=place, dropout_p=dropout_p, seed=3 + place)
        expected, found = (results(case, lambda scale, f=f, **given: f(**given)) for f in (around, compiled))
        assert all(close(x, expected[name], 1e-5) for name, x in found.items())
    given = {name: value for name, value in case.arguments().items() if name != "scale"}
    assert close(compiled(**given), expected["out"], 1e-5)


def test_a_new_seed_does_not_compile_again(native):
    torch._dynamo.reset()
    compilations = []

    def compiler(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(around, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    for seed in (3, 4, 5, 2**40, 2**62):
        arguments = make_case(9, 31, dropout_p=0.3, seed=seed).arguments()
        arguments.pop("scale")
        assert close(compiled(**arguments), around(**arguments), 1e-6)
    assert len(compilations) <= 2


def test_compiled_code_calls_the_kernel_and_raises_its_errors(native):
    torch._dynamo.reset()
    compiled = torch.compile(graph_attention, fullgraph=True)
    arguments = make_case(9, 30, relations=None).arguments()
    with counted() as calls:
        out = compiled(**arguments)
    assert calls["graph_attention_forward"] == 1 and torch.equal(out, graph_attention(**arguments))
    with pytest.raises(IndexError, match="^indices holds 9 at place 0"):
        compiled(**(arguments | {"indices": torch.full_like(arguments["indices"], 9)}))
    with pytest.raises(ValueError, match="^key must be"):
        graph_attention(**(arguments | {"key": arguments["key"][1:]}))


def test_the_reference_is_the_equation(on_reference):
    case = make_case(6, 20)
    assert identical(graph_attention(**case.arguments()), equations.graph_attention(**case.arguments()))
    assert ops.backend_name() == "reference"
