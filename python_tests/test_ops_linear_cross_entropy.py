"""linear_cross_entropy and top_words as users call them: a share of their scorecard, what they mean, arguments and errors."""

from __future__ import annotations

import itertools
import math
import types
from contextlib import contextmanager
from dataclasses import replace

import linear_cross_entropy_checks as checks
import op_checks
import pytest
import torch
from helpers import close
from linear_cross_entropy_checks import FAMILY, FLOATS, KEEP, KERNELS, RECOMPUTE, best, make_case, of_equations, results
from op_checks import identical
from torch.nn import functional as F

from case_fast import equations
from case_fast.errors import ConfigError
from case_fast.ops import backend, linear_cross_entropy, top_words

SHARE = {1: 11, 2: 2 * len(checks.SHAPES), 3: 250, 4: 250, 5: 150, 6: 1, 11: 1}  # cases of each row; all: scorecard.py


@contextmanager
def counted():
    """How often each native function of the family is called within."""
    with op_checks.counted(FAMILY) as calls, op_checks.counted("top") as best_of:
        yield calls
    calls.update(best_of)


@pytest.fixture
def native():
    found = pytest.importorskip("case_fast._native", reason="case_fast was installed with CASE_FAST_NATIVE=0")
    assert hasattr(found, f"{FAMILY}_forward") and hasattr(found, "top_words")
    return found


@pytest.fixture
def on_reference(monkeypatch):
    monkeypatch.setenv("CASE_FAST_BACKEND", "reference")


@pytest.fixture(params=["native", "reference"])
def runs(request, monkeypatch) -> str:
    if request.param == "native":
        request.getfixturevalue("native")
    monkeypatch.setenv("CASE_FAST_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("row", SHARE)
def test_row_of_the_scorecard(native, row):
    check, full = checks.CHECKS[row]
    assert SHARE[row] <= full
    with counted() as calls:
        assert check(SHARE[row], "cpu") >= SHARE[row]
    assert calls[f"{FAMILY}_forward"] >= SHARE[row], "the native kernel did not run"
    assert row == 4 or calls[f"{FAMILY}_backward"] > 0
    assert row in (2, 4) or calls["top_words"] > 0


@pytest.mark.parametrize("row", [2, 3, 4, 5])
def test_row_of_the_scorecard_on_the_reference(on_reference, row):
    size = 8 if row == 2 else 25
    if not backend.native_report()["available"]:
        assert checks.CHECKS[row][0](size, "cpu")
        return
    with counted() as calls:
        checks.CHECKS[row][0](size, "cpu")
    assert not calls


# ---- what the op means


def test_the_loss_and_the_best_words_are_torchs(runs):
    case = make_case(13, 41, dim=7, dtype=torch.float64)
    scores = F.linear(case.hidden, case.weight, case.bias)
    found = results(case)
    assert close(found["nll"], F.cross_entropy(scores, case.target, reduction="none"), 1e-12)
    assert torch.equal(found["prediction"], scores.argmax(1))
    value, word = scores.log_softmax(1).topk(5, dim=1)
    top = best(case, 5)
    assert close(top["log_probability"], value, 1e-12) and torch.equal(top["word"], word)


def test_a_bag_of_words_is_many_targets_on_one_row(runs):
    """Eq. 8 by cu_target, against a sum over the words of each row."""
    case = make_case(5, 12, most=6, number=3, dtype=torch.float64)
    log_p = F.linear(case.hidden, case.weight, case.bias).log_softmax(1)
    plain = [-log_p[row, y] for row in range(5) for y in case.target[case.cu_target[row] : case.cu_target[row + 1]]]
    assert close(results(case)["nll"], torch.stack(plain), 1e-12)


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


def test_the_lowest_of_equal_words_comes_first(runs):
    for rows in (3, 40):  # few, and many
        hidden, weight, bias = torch.ones(rows, 4), torch.ones(500, 4), torch.zeros(500)
        bias[[7, 300, 499]] = 2.0
        assert linear_cross_entropy(hidden, weight, bias, torch.zeros(rows, dtype=torch.int64))[1].tolist() == [7] * rows
        assert top_words(hidden, weight, bias, 4)[1].tolist() == [[7, 300, 499, 0]] * rows


def test_a_bias_of_minus_infinity_forbids_a_word(runs):
    case = make_case(30, 60, dim=9, forbidden=0.5, dtype=torch.float64)
    barred = case.bias == -torch.inf
    allowed = (~barred).nonzero().flatten()
    new_place = torch.cumsum(~barred, 0) - 1
    found, plain = results(case), make_case(30, 60, dim=9, dtype=torch.float64)
    plain = replace(case, weight=case.weight[allowed], bias=case.bias[allowed], target=new_place[case.target])
    without = results(plain)
    assert close(found["nll"], without["nll"], 1e-12) and close(found["grad_hidden"], without["grad_hidden"], 1e-12)
    assert not found["grad_weight"][barred].any() and not found["grad_bias"][barred].any()
    assert torch.equal(found["prediction"], allowed[without["prediction"]])
    assert best(case, 60)["log_probability"].isneginf().sum(1).tolist() == [int(barred.sum())] * 30


# ---- what is kept, and what runs


def test_keep_bytes_is_the_most_that_is_kept(native):
    rows, words = 30, 17
    kept = []
    original = KERNELS._forward_op

    def noted(*arguments):
        kept.append(arguments[-1])
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KERNELS, "_forward_op", noted)
        for dtype, keep_bytes in itertools.product((torch.float32, torch.float64), (0, 4 * rows * words - 1, 4 * rows * words,
                                                                                   8 * rows * words)):  # fmt: skip
            results(make_case(rows, words, dtype=dtype, keep_bytes=keep_bytes))
    assert kept == [False, False, True, True] + [False, False, False, True]


@pytest.mark.parametrize("rows", [20, 300])
def test_kept_and_recomputed_scores_give_the_same(native, rows):
    case = make_case(rows, 700, dim=30, most=2, still=0.3, number=rows)
    kept, computed = (results(replace(case, keep_bytes=keep_bytes)) for keep_bytes in (KEEP, RECOMPUTE))
    assert all(identical(kept[name], computed[name]) for name in kept)


def test_without_gradient_nothing_is_kept_and_backward_does_not_run(native):
    case = make_case(9, 5)
    with counted() as calls:
        nll, _ = linear_cross_entropy(**case.arguments())
    assert calls[f"{FAMILY}_forward"] == 1 and not nll.requires_grad


def test_the_backend_that_is_named_is_the_one_that_runs(native, monkeypatch):
    case = make_case(9, 5)
    for name, expected in (("native", 1), ("reference", 0), ("", 1)):
        monkeypatch.setenv("CASE_FAST_BACKEND", name)
        with counted() as calls:
            results(case)
            best(case, 2)
        assert calls[f"{FAMILY}_forward"] == calls[f"{FAMILY}_backward"] == calls["top_words"] == expected, name


def test_a_backend_that_cannot_serve_is_refused(monkeypatch):
    monkeypatch.setenv("CASE_FAST_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="CASE_FAST_BACKEND=triton: linear_cross_entropy on cpu cannot run there: "):
        linear_cross_entropy(**make_case(3, 4).arguments())


@pytest.mark.parametrize("status, error", [(11, IndexError), (4, RuntimeError), (5, MemoryError)])
def test_a_status_of_the_kernel_is_never_passed_over(native, monkeypatch, status, error):
    monkeypatch.setattr(backend, "native", types.SimpleNamespace(linear_cross_entropy_forward=lambda *a: status))
    case = make_case(3, 5)
    with pytest.raises(error, match="linear_cross_entropy|target names what does not exist"):
        KERNELS._forward_op("native", *case.floats().values(), case.target, None, False)


def test_the_reference_is_the_equation(on_reference):
    case = make_case(6, 9, most=2)
    for ours, plain in zip(linear_cross_entropy(**case.arguments()), of_equations(**case.arguments()), strict=True):
        assert identical(ours, plain)
    for ours, plain in zip(top_words(**case.floats(), k=3), equations.top_words(**case.floats(), k=3), strict=True):
        assert identical(ours, plain)


# ---- in torch


def test_under_autocast_the_cpu_computes_in_float32(runs):
    case = make_case(12, 30, dim=8)
    half = replace(case, **{name: x.bfloat16() for name, x in case.floats().items()})
    rounded = results(half.to(torch.float32))
    for given, expected in ((case, results(case)), (half, rounded)):
        found = results(given, autocast=True)
        assert found["nll"].dtype == torch.float32 and identical(found["nll"], expected["nll"])
        for name in FLOATS:
            grad = found[f"grad_{name}"]
            assert grad.dtype == getattr(given, name).dtype and close(grad.float(), expected[f"grad_{name}"], 1e-2)


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
    eager = results(case)
    assert torch.equal(prediction, eager["prediction"]) and torch.equal(top[1], best(case, 3)["word"])
    assert all(close(grad, eager[f"grad_{name}"], 1e-5) for grad, name in zip(grads, FLOATS, strict=True))


def test_no_second_derivative(native):
    leaf = make_case(4, 6).hidden.requires_grad_()
    nll, _ = linear_cross_entropy(leaf, torch.ones(6, 5), torch.zeros(6), torch.zeros(4, dtype=torch.int64))
    (grad,) = torch.autograd.grad(nll.sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy has no second derivative"):
        grad.sum().backward()


# ---- errors: each names the argument, before any kernel runs


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, "hidden must be float32"),
        ({"hidden": torch.zeros(4)}, ValueError, r"hidden must be \(T, d\)"),
        ({"hidden": torch.zeros(4, 0)}, ValueError, r"hidden must be \(T, d\) with d above 0"),
        ({"weight": torch.zeros(6, 5, dtype=torch.float64)}, TypeError, "weight must be torch.float32 as hidden"),
        ({"weight": torch.zeros(6, 4)}, ValueError, r"weight must be \(V, 5\) as hidden"),
        ({"weight": torch.zeros(0, 5)}, ValueError, "weight must have from 1"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \(V,\) = \(6,\)"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, "bias must be on cpu"),
        ({"target": torch.zeros(4)}, TypeError, "target must be int32 or int64"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target must be \(T,\) = \(4,\)"),
        ({"target": torch.tensor([0, 1, 6, 0])}, IndexError, r"target holds 6 at place 2; it must be in \[0, 6\)"),
        ({"target": torch.tensor([0, -1, 6, 0])}, IndexError, "target holds -1 at place 1"),
        ({"cu_target": torch.tensor([0, 1, 4])}, ValueError, r"cu_target must be \(T \+ 1,\) = \(5,\)"),
        ({"cu_target": torch.tensor([1, 1, 2, 3, 4])}, IndexError, "cu_target starts at 1"),
        ({"cu_target": torch.tensor([0, 2, 1, 3, 4])}, IndexError, "cu_target falls from 2 to 1 at place 2"),
        ({"cu_target": torch.tensor([0, 1, 2, 3, 3])}, IndexError, "cu_target ends at 3"),
        ({"keep_bytes": -1}, ValueError, "keep_bytes must be at least 0"),
        ({"keep_bytes": 1.5}, TypeError, "keep_bytes must be a whole number"),
    ],
)
def test_a_bad_argument_is_named(runs, change, error, message):
    good = {"hidden": torch.zeros(4, 5), "weight": torch.zeros(6, 5), "bias": torch.zeros(6),
            "target": torch.zeros(4, dtype=torch.int64)}  # fmt: skip
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(good | change))
    assert math.isclose(float(linear_cross_entropy(**good)[0][0]), math.log(6), rel_tol=1e-6)


@pytest.mark.parametrize("k, error", [(0, ValueError), (7, ValueError), (True, TypeError), (1.0, TypeError)])
def test_a_bad_number_of_words_is_named(runs, k, error):
    with pytest.raises(error, match="k must be"):
        top_words(torch.zeros(4, 5), torch.zeros(6, 5), torch.zeros(6), k)
