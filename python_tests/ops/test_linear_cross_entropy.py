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
def native(native):
    assert hasattr(native, f"{FAMILY}_forward") and hasattr(native, "top_words")
    return native


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


@pytest.mark.parametrize(
    "recipe",
    [
        {"rows": 60, "words": 700, "dim": 150, "magnitude": 3.0},
        {"rows": 20, "words": 700, "dim": 150, "magnitude": 3.0, "keep_bytes": RECOMPUTE},
        {"rows": 600, "words": 40, "dim": 16, "most": 3, "keep_bytes": RECOMPUTE},
    ],
)
def test_on_average_hardly_less_exact_than_plain_torch(recipe):
    assert max(checks.mean_errors(recipe, 20).values()) < 1.5


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
    together = best(case, 4)
    for row in (0, 1, 95, 96, 959, 960, 999):
        alone = top_words(case.hidden[row : row + 1], case.weight, case.bias, 4)
        assert identical(together["log_probability"][row], alone[0][0]) and torch.equal(together["word"][row], alone[1][0])


def test_of_one_word_the_loss_is_exactly_zero(runs):
    for keep_bytes in (KEEP, RECOMPUTE):
        found = results(make_case(30, 1, keep_bytes=keep_bytes))
        assert not found["nll"].any() and not found["prediction"].any()
        assert not any(found[f"grad_{name}"].any() for name in FLOATS)


@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e12])
@pytest.mark.parametrize("rows, still", [(10, 0.0), (60, 0.0), (60, 0.9)])
@pytest.mark.parametrize("keep_bytes", [KEEP, RECOMPUTE])
def test_gradients_of_huge_scores_stay_of_the_size_of_grad_nll(native, magnitude, rows, still, keep_bytes):
    """Scores computed again by another kernel than before would differ by more than 1, and their exponentials overflow."""
    case = make_case(rows, 400, 300, 3, magnitude=magnitude, still=still, keep_bytes=keep_bytes)
    found = results(case)
    assert found["nll"].isfinite().all() and (found["nll"] >= 0).all()
    most = 2 * case.grad_nll.abs().sum()
    assert found["grad_bias"].abs().max() <= most and found["grad_hidden"].abs().max() <= most * case.weight.abs().max()


def test_rows_without_a_gradient_take_no_part(native):
    """What they cost is not paid, and what they hold is not read: NaN there stays there."""
    case = make_case(60, 300, 20)
    still = torch.arange(60) % 3 > 0
    hidden, gradient = case.hidden.clone(), case.grad_nll.masked_fill(still, 0)
    hidden[still] = math.nan
    found = results(replace(case, hidden=hidden, grad_nll=gradient))
    alone = results(replace(case, hidden=case.hidden[~still], target=case.target[~still], grad_nll=gradient[~still]))
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


def test_target_and_cu_target_may_be_of_two_widths(runs):
    case = make_case(9, 20, most=3)
    expected = results(case)
    for target, cu_target in ((torch.int32, torch.int64), (torch.int64, torch.int32), (torch.int32, torch.int32)):
        found = results(replace(case, target=case.target.to(target), cu_target=case.cu_target.to(cu_target)))
        assert all(identical(x, expected[name]) for name, x in found.items())


@pytest.mark.parametrize("keep_bytes", [KEEP, RECOMPUTE])
def test_every_subset_of_inputs_may_want_a_gradient(keep_bytes):
    case = make_case(30, 20, dtype=torch.float64, keep_bytes=keep_bytes)
    all_of_them = results(case)
    for wanted in itertools.product([False, True], repeat=3):
        leaves = {name: x.clone().requires_grad_(w) for (name, x), w in zip(case.floats().items(), wanted, strict=True)}
        nll, _ = linear_cross_entropy(**(case.arguments() | leaves))
        assert nll.requires_grad == any(wanted) and torch.equal(nll, all_of_them["nll"])
        if any(wanted):
            nll.backward(case.grad_nll)
        for (name, leaf), w in zip(leaves.items(), wanted, strict=True):
            assert torch.equal(leaf.grad, all_of_them[f"grad_{name}"]) if w else leaf.grad is None


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_on_cpu(runs, dtype):
    case = make_case(20, 40, dtype=dtype)
    found, exact = results(case), results(case.to(torch.float32))
    for name, x in found.items():
        expected = {"nll": torch.float32, "prediction": torch.int64}.get(name, dtype)
        assert x.dtype == expected and identical(x, exact[name].to(expected))
    value, word = best(case, 3).values()
    assert value.dtype == torch.float32 and torch.equal(word, best(case.to(torch.float32), 3)["word"])


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


@pytest.mark.parametrize("most", [None, 3])
def test_compiles_for_any_number_of_rows(runs, most):
    """One graph of symbolic sizes, scores kept and not."""
    torch._dynamo.reset()
    backend_of_it = "aot_eager" if runs == "native" else "eager"
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True, backend=backend_of_it)
    for place, (rows, words) in enumerate([(9, 50), (12, 20), (30, 70)]):
        case = make_case(rows, words, number=place, most=most, keep_bytes=(KEEP, RECOMPUTE)[place % 2])
        expected, found = results(case), results(case, compiled)
        assert all(close(x, expected[name], 1e-5) for name, x in found.items())


@pytest.mark.slow
def test_compiled_code_calls_the_kernel_and_raises_its_errors(native):
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    arguments = make_case(9, 4).arguments()
    with counted() as calls:
        nll, _ = compiled(**arguments)
    assert calls[f"{FAMILY}_forward"] == 1 and close(nll, linear_cross_entropy(**arguments)[0], 1e-6)
    with pytest.raises(IndexError, match="^target holds 4 at place 0"):
        compiled(**(arguments | {"target": torch.full_like(arguments["target"], 4)}))


def test_backward_may_run_twice_and_of_expanded_gradients(runs):
    case = make_case(9, 20, dtype=torch.float64)
    hidden = case.hidden.clone().requires_grad_()
    nll, _ = linear_cross_entropy(**(case.arguments() | {"hidden": hidden}))
    first, again = (torch.autograd.grad(nll.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first, results(replace(case, grad_nll=torch.ones_like(case.grad_nll)))["grad_hidden"])


def test_an_input_changed_before_backward_is_noticed(native):
    case = make_case(6, 20)
    doubled = case.hidden.requires_grad_() * 2
    nll, _ = linear_cross_entropy(**(case.arguments() | {"hidden": doubled}))
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nll.sum().backward()


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
            "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(good | change))
    assert math.isclose(float(linear_cross_entropy(**good)[0][0]), math.log(6), rel_tol=1e-6)


@pytest.mark.parametrize("k, error", [(0, ValueError), (7, ValueError), (True, TypeError), (1.0, TypeError)])
def test_a_bad_number_of_words_is_named(runs, k, error):
    with pytest.raises(error, match="k must be"):
        top_words(torch.zeros(4, 5), torch.zeros(6, 5), torch.zeros(6), k)


BASE = make_case(6, 20)
OF_BOTH = [  # what the message begins with, changed arguments, error; of linear_cross_entropy and of top_words
    ("hidden", {"hidden": BASE.hidden[0]}, ValueError),
    ("hidden", {"hidden": BASE.hidden.to(torch.float8_e4m3fn)}, TypeError),
    ("weight", {"weight": BASE.weight[0]}, ValueError),
    ("weight", {"weight": BASE.weight[:, 1:]}, ValueError),
    ("weight", {"weight": BASE.weight.double()}, TypeError),
    ("weight", {"weight": BASE.weight.to("meta")}, ValueError),
    ("weight", {"weight": BASE.weight[:0], "bias": BASE.bias[:0]}, ValueError),
    ("bias", {"bias": BASE.bias[1:]}, ValueError),
    ("bias", {"bias": BASE.bias[:, None]}, ValueError),
    ("bias", {"bias": BASE.bias.half()}, TypeError),
]
OF_TARGETS = [
    ("target", {"target": BASE.target[:, None]}, ValueError),
    ("target", {"target": BASE.target.short()}, TypeError),
    ("target", {"target": BASE.target.to("meta")}, ValueError),
    ("target", {"target": (BASE.target - 20).int()}, IndexError),
    ("cu_target", {"cu_target": torch.arange(7)[:, None]}, ValueError),
    ("cu_target", {"cu_target": torch.arange(7.0)}, TypeError),
    ("cu_target", {"cu_target": torch.arange(7, device="meta")}, ValueError),
    ("keep_bytes", {"keep_bytes": True}, TypeError),
]


@pytest.mark.parametrize("name, change, error", OF_BOTH + OF_TARGETS)
def test_every_other_bad_argument_is_named(runs, name, change, error):
    with pytest.raises(error, match=f"^{name} "):
        linear_cross_entropy(**(BASE.arguments() | change))


@pytest.mark.parametrize("name, change, error", OF_BOTH)
def test_a_bad_argument_of_top_words_is_named(runs, name, change, error):
    with pytest.raises(error, match=f"^{name} "):
        top_words(**(BASE.floats() | {"k": 2} | change))
