"""The public op packed_attention: a share of its scorecard, its arguments and errors, and how it stands in torch."""

from __future__ import annotations

import itertools
import types
from dataclasses import replace

import packed_attention_checks as checks
import pytest
import torch
from attention_checks import kernels, mean_errors, results
from helpers import close
from op_checks import counted, identical
from packed_attention_checks import FAMILY, FLOATS, INDEX, make_case

from case_fast import equations, ops
from case_fast.errors import ConfigError
from case_fast.ops import backend, packed_attention

SHARE = {1: 5, 2: len(checks.SHAPES), 3: 250, 4: 250, 5: 100, 6: 1, 11: 1}  # cases of each row; all of them: scorecard.py


@pytest.mark.parametrize("row", SHARE)
def test_row_of_the_scorecard(native, row):
    check, full = checks.CHECKS[row]
    assert SHARE[row] <= full
    with counted(FAMILY) as calls:
        assert check(SHARE[row], "cpu") >= SHARE[row]
    assert calls[f"{FAMILY}_forward"] >= SHARE[row], "the native kernel did not run"
    if row != 4:
        assert calls[f"{FAMILY}_backward"] > 0


@pytest.mark.parametrize("row", [2, 3, 4, 5])
def test_row_of_the_scorecard_on_the_reference(on_reference, row):
    size = 6 if row == 2 else 25
    if not backend.native_report()["available"]:
        assert checks.CHECKS[row][0](size, "cpu")
        return
    with counted(FAMILY) as calls:
        checks.CHECKS[row][0](size, "cpu")
    assert not calls


@pytest.mark.parametrize(
    "recipe",
    [
        {"rows": [80, 30, 55], "dim": 150, "magnitude": 2.0},
        {"rows": [30, 17], "dim": 16, "causal": True, "magnitude": 3.0},
        {"rows": [1] * 16, "keys": [100] * 16, "dim": 150},
    ],
)
def test_on_average_hardly_less_exact_than_plain_torch(recipe):
    """Output and gradients; weights recomputed from one rounded number a row cost up to twice where scores are in the tens."""
    found = mean_errors(lambda number: make_case(number=number, **recipe), 20)
    assert found["out"] < 1.3 and max(found.values()) < (2.0 if recipe.get("magnitude") == 3.0 else 1.3)


@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e12])
def test_gradients_of_huge_scores_stay_of_the_size_of_grad_out(native, magnitude):
    """The softmax is saturated; what is recomputed in backward is off by the rounding of the scores, and no more."""
    case = make_case([9, 5], [7, 20], dim=8, number=3, magnitude=magnitude)
    case = replace(case, grad_out=case.grad_out / magnitude)
    found, exact = results(case), case.value.double() / magnitude
    assert found["out"].double().div(magnitude).abs().max() <= exact.abs().max() * 1.0001
    assert found["value"].abs().max() <= case.grad_out.abs().sum(0).max()
    assert all(x.isfinite().all() for x in found.values())


def test_causal_attention_aligns_the_ends():
    value = torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1)
    query = torch.zeros(5, 1, 1)
    found = packed_attention(query[:2], value, value, torch.tensor([0, 2]), torch.tensor([0, 3]), causal=True, scale=0.0)
    assert found.flatten().tolist() == [1.5, 3.0]
    found = packed_attention(query, value, value, torch.tensor([0, 5]), torch.tensor([0, 3]), causal=True, scale=0.0)
    assert found.flatten().tolist() == [0.0, 0.0, 1.0, 1.5, 3.0]


# ---- which backend runs


def test_backends_drop_the_same_weights(native, monkeypatch):
    for seed in (0, 5, 2**32 + 5, 2**63 - 1):
        case = make_case([30, 7, 41], [12, 50, 3], dtype=torch.float64, dropout_p=0.4, seed=seed)
        found = {}
        for name in ("native", "reference"):
            monkeypatch.setenv("CASE_FAST_BACKEND", name)
            found[name] = results(case)
        assert all(close(x, found["reference"][name], 1e-12) for name, x in found["native"].items())
    other = results(replace(case, seed=1))
    assert not torch.equal(other["out"], found["reference"]["out"])


def test_the_backend_that_is_named_is_the_one_that_runs(native, monkeypatch):
    case = make_case([9, 3])
    for name, expected in (("native", 1), ("reference", 0), ("", 1)):
        monkeypatch.setenv("CASE_FAST_BACKEND", name)
        with counted(FAMILY) as calls:
            results(case)
        assert calls[f"{FAMILY}_forward"] == calls[f"{FAMILY}_backward"] == expected, name
        assert (backend.backend_name(FAMILY) == "native") == bool(expected)


def test_a_backend_that_cannot_serve_is_refused(monkeypatch):
    monkeypatch.setenv("CASE_FAST_BACKEND", "triton")
    with pytest.raises(ConfigError, match="CASE_FAST_BACKEND=triton: packed_attention on cpu cannot run there: "):
        packed_attention(**make_case([3]).arguments())


@pytest.mark.parametrize("status, error", [(7, IndexError), (4, RuntimeError), (5, MemoryError)])
def test_a_status_of_the_kernel_is_never_passed_over(native, monkeypatch, status, error):
    monkeypatch.setattr(backend, "native", types.SimpleNamespace(packed_attention_forward=lambda *a: status))
    case = make_case([3, 5])
    with pytest.raises(error, match="packed_attention|cu_query"):
        kernels(FAMILY)._forward_op("native", *[getattr(case, name) for name in (*FLOATS, *INDEX)], False, 1.0, 0.0, 0)


def test_the_reference_is_the_equation(on_reference):
    case = make_case([6, 2], [3, 9])
    assert identical(packed_attention(**case.arguments()), equations.packed_attention(**case.arguments()))


# ---- arguments

BASE = make_case([2, 4], [3, 5, 1], share=True, room=True)

WRONG = [  # what the message begins with, changed arguments, error
    ("query", {"query": BASE.query[0]}, ValueError),
    ("query", {"query": BASE.query.int()}, TypeError),
    ("query", {name: getattr(BASE, name)[:, :, :0] for name in FLOATS}, ValueError),
    ("key", {"key": BASE.key[:, :1]}, ValueError),
    ("key", {"key": BASE.key.double()}, TypeError),
    ("key", {"key": BASE.key.to("meta")}, ValueError),
    ("value", {"value": BASE.value[1:]}, ValueError),
    ("value", {"value": BASE.value.half()}, TypeError),
    ("cu_query", {"cu_query": BASE.cu_query.float()}, TypeError),
    ("cu_query", {"cu_query": BASE.cu_query[:0]}, ValueError),
    ("cu_query", {"cu_query": BASE.cu_query[:, None]}, ValueError),
    ("cu_query", {"cu_query": BASE.cu_query.to("meta")}, ValueError),
    ("cu_query starts", {"cu_query": BASE.cu_query + 1}, IndexError),
    ("cu_query falls", {"cu_query": torch.tensor([0, 7, 6])}, IndexError),
    ("cu_query ends", {"query": BASE.query[1:]}, IndexError),
    ("cu_key must", {"cu_key": BASE.cu_key.bool()}, TypeError),
    ("cu_key must", {"key_of": None, "key_length": None}, ValueError),
    ("cu_key ends", {"cu_key": torch.tensor([0, 3, 8, 8])}, IndexError),
    ("cu_key falls", {"cu_key": torch.tensor([0, 3, 1, 9])}, IndexError),
    ("key_of", {"key_of": BASE.key_of[1:]}, ValueError),
    ("key_of", {"key_of": BASE.key_of.short()}, TypeError),
    ("key_of holds", {"key_of": BASE.key_of + 3}, IndexError),
    ("key_of names", {"cu_key": BASE.cu_key[:1], "key_length": None}, IndexError),
    ("key_length", {"key_length": BASE.key_length[1:]}, ValueError),
    ("key_length holds", {"key_length": BASE.key_length + 6}, IndexError),
    ("key_length holds", {"key_length": BASE.key_length - 6}, IndexError),
    ("scale", {"scale": -0.1}, ValueError),
    ("scale", {"scale": float("nan")}, ValueError),
    ("dropout_p", {"dropout_p": 1.0}, ValueError),
    ("dropout_p", {"dropout_p": float("nan")}, ValueError),
    ("seed", {"seed": -1}, ValueError),
    ("seed", {"seed": 2**63}, ValueError),
]


@pytest.mark.parametrize("name, change, error", WRONG)
def test_a_wrong_argument_is_named_before_any_kernel_runs(runs, name, change, error):
    with pytest.raises(error) as caught:
        packed_attention(**(BASE.arguments() | change))
    assert str(caught.value).startswith(name)


def test_every_subset_of_inputs_may_want_a_gradient():
    case = make_case([3, 4], [5, 2], dtype=torch.float64)
    all_of_them = results(case)
    for wanted in itertools.product([False, True], repeat=3):
        leaves = {name: x.clone().requires_grad_(w) for (name, x), w in zip(case.floats().items(), wanted, strict=True)}
        out = case.call(leaves)
        assert out.requires_grad == any(wanted) and torch.equal(out, all_of_them["out"])
        if any(wanted):
            out.backward(case.grad_out)
        for (name, leaf), w in zip(leaves.items(), wanted, strict=True):
            assert torch.equal(leaf.grad, all_of_them[name]) if w else leaf.grad is None


def test_one_tensor_may_be_query_key_and_value(runs):
    x = make_case([3, 4], dtype=torch.float64).query
    cu = torch.tensor([0, 3, 7])
    assert torch.autograd.gradcheck(lambda x: packed_attention(x, x, x, cu, cu, causal=True), x.requires_grad_())


def test_rows_apart_are_read_in_place(native):
    """Queries, keys and values that lie side by side, as one projection gives them."""
    side_by_side = torch.randn(7, 3, 2, 5)
    query, key, value = side_by_side.unbind(1)
    module = kernels(FAMILY)
    assert all(module.rows_apart(x) is x and module.row_stride(x) == 30 for x in (query, key, value))
    cu = torch.tensor([0, 3, 7])
    found = packed_attention(query, key, value, cu, cu)
    assert identical(found, packed_attention(query.contiguous(), key.contiguous(), value.contiguous(), cu, cu))


def test_only_rows_and_one_number_a_row_and_head_are_kept(native):
    case = make_case([50, 20], [200, 300], heads=3, dim=40)
    leaves = {name: x.requires_grad_() for name, x in case.floats().items()}
    out = case.call(leaves)
    own = {x.data_ptr() for x in case.arguments().values() if isinstance(x, torch.Tensor)} | {out.data_ptr()}
    (lse,) = [x for x in out.grad_fn.saved_tensors if x is not None and x.data_ptr() not in own]
    assert lse.shape == (70, 3)


def test_second_derivatives_are_refused_but_on_the_reference(runs):
    case = make_case([2, 2], dtype=torch.float64)
    query = case.query.clone().requires_grad_()
    (first,) = torch.autograd.grad(case.call({"query": query}).square().sum(), query, create_graph=True)
    if runs == "native":
        with pytest.raises(NotImplementedError, match="packed_attention has no second derivative"):
            first.sum().backward()
    else:
        first.sum().backward()
        assert query.grad.isfinite().all()


# ---- dtypes, torch.compile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_on_cpu(dtype):
    case = make_case([20, 7], dtype=dtype)
    found, exact = results(case), results(case.to(torch.float32))
    for name, x in found.items():
        assert x.dtype == dtype and identical(x, exact[name].to(dtype))


def under_autocast(case):
    """A case whose call is under autocast, and whose backward is not, as torch wants it."""

    def call(leaves, plain):
        with torch.autocast("cpu", torch.bfloat16):
            return case.call(leaves)

    return types.SimpleNamespace(grad_out=case.grad_out, floats=case.floats, call=call)


def test_autocast_computes_in_float32_on_cpu(runs):
    case = make_case([20, 7])
    expected = results(case)
    assert all(torch.equal(x, expected[name]) for name, x in results(under_autocast(case)).items())
    mixed = results(under_autocast(replace(case, key=case.key.bfloat16())))
    assert (mixed["out"].dtype, mixed["key"].dtype, mixed["query"].dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert close(mixed["out"], expected["out"], 0.05)


def around(query, key, value, **more):
    """The op among others."""
    return packed_attention(query * 1.5, key, value, **more).sin()


class Through:
    """A case whose call goes through another function."""

    def __init__(self, case, function):
        self.grad_out, self.floats = case.grad_out, case.floats
        self.call = lambda leaves, plain: function(**(case.arguments() | leaves))


def test_compiles_without_graph_breaks(runs):
    torch._dynamo.reset()
    compiled = torch.compile(around, fullgraph=True, dynamic=True, backend="aot_eager")
    for place, (rows, keys) in enumerate([([3, 4], [5, 6]), ([9, 1], [2, 2]), ([30, 20, 11], [1, 0, 40])]):
        case = make_case(rows, keys, number=place, dropout_p=0.1, seed=3 + place)
        expected, found = (results(Through(case, f)) for f in (around, compiled))
        assert all(close(x, expected[name], 1e-5) for name, x in found.items())


def test_compiled_code_calls_the_kernel_and_raises_its_errors(native):
    torch._dynamo.reset()
    compiled = torch.compile(packed_attention, fullgraph=True)
    x, cu = make_case([3, 4]).query, torch.tensor([0, 3, 7])
    with counted(FAMILY) as calls:
        out = compiled(x, x, x, cu, cu)
    assert calls[f"{FAMILY}_forward"] == 1 and torch.equal(out, packed_attention(x, x, x, cu, cu))
    with pytest.raises(IndexError, match="^cu_query falls from 9 to 7 at place 2"):
        compiled(x, x, x, torch.tensor([0, 9, 7]), cu)


def test_ops_names_its_public_functions():
    assert {"packed_attention", "cross_attention", "Source"} <= set(ops.__all__)
