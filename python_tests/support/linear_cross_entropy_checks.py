"""Checks of case_fast.ops.linear_cross_entropy and top_words, each of any size: the tests run a share of them, the scorecard all.

A check takes the number of cases and a device, returns how many cases it looked at, and raises AssertionError on a failure.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import op_checks
import torch
from helpers import generator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_checks import digest, identical, strided
from torch import Tensor

from case_fast import equations, ops

FAMILY = "linear_cross_entropy"
KERNELS = sys.modules["case_fast.ops.linear_cross_entropy"]  # the module; `ops.linear_cross_entropy` is the function
FLOATS = ("hidden", "weight", "bias")
KEEP, RECOMPUTE = 1 << 40, 0  # keep_bytes


@dataclass(frozen=True)
class Case:
    """One call's arguments, and the gradient of its losses."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    cu_target: Tensor | None
    grad_nll: Tensor
    keep_bytes: int = KEEP

    def arguments(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "grad_nll"}

    def floats(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in FLOATS}

    def to(self, dtype: torch.dtype) -> Case:
        full = torch.float64 if dtype == torch.float64 else torch.float32
        return replace(self, grad_nll=self.grad_nll.to(full), **{name: x.to(dtype) for name, x in self.floats().items()})


def make_case(rows: int, words: int, dim: int = 5, number: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu",
              magnitude: float = 1.0, layout: int = 0, long: int = 3, most: int | None = None, still: float = 0.0,
              forbidden: float = 0.0, **more: object) -> Case:
    """Random arguments, the `number`-th; scores have about the size of ``magnitude``.

    layout: strides other than contiguous. long: bits that say whether target and cu_target are int64. most: rows have from 0
    to so many targets; None: one each. still: a share of rows whose gradient is 0. forbidden: a share of words with a bias of
    -inf, never a target."""
    g = generator(number)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    def chosen(share: float, count: int) -> Tensor:
        return torch.rand(count, generator=g, dtype=torch.float64) < share

    hidden, weight, bias = normal(rows, dim), normal(words, dim, scale=magnitude * dim**-0.5), normal(words, scale=magnitude)
    cu_target, row_of = None, torch.arange(rows)
    if most is not None:
        cu_target = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(most + 1, (rows,), generator=g).cumsum(0)])
        row_of = equations.segment_ids(cu_target, int(cu_target[-1]))
    target = torch.randint(words, (row_of.numel(),), generator=g)
    barred = chosen(forbidden, words)
    barred[0] = False
    barred[target] = False
    bias[barred] = -torch.inf
    grad_nll = normal(target.numel())
    grad_nll[chosen(still, rows)[row_of]] = 0
    full = torch.float64 if dtype == torch.float64 else torch.float32
    floats = [strided(x.to(dtype), layout and layout + place).to(device) for place, x in enumerate((hidden, weight, bias))]
    grad_nll = strided(grad_nll.to(full), layout).to(device)
    target = strided(target if long & 1 else target.int(), layout).to(device)
    if cu_target is not None:
        cu_target = strided(cu_target if long & 2 else cu_target.int(), layout).to(device)
    return Case(*floats, target, cu_target, grad_nll, **more)


def contiguous(arguments: dict) -> dict:
    """torch 2.13's product in bfloat16 reads what lies between the rows of a strided (n, 1), and NaN there makes it NaN."""
    return {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def of_equations(keep_bytes: int = 0, **arguments: object) -> tuple[Tensor, Tensor]:
    """equations.linear_cross_entropy, which always keeps the scores."""
    return equations.linear_cross_entropy(**contiguous(arguments))


def best_of_equations(**arguments: object) -> tuple[Tensor, Tensor]:
    return equations.top_words(**contiguous(arguments))


def results(case: Case, function: Callable[..., tuple] = ops.linear_cross_entropy, autocast: bool = False) -> dict[str, Tensor]:
    """nll, prediction, and the gradient of every floating-point input; the forward pass under autocast, or not."""
    leaves = {name: x.detach().requires_grad_() for name, x in case.floats().items()}
    with torch.autocast(case.hidden.device.type, torch.bfloat16, enabled=autocast):
        nll, prediction = function(**(case.arguments() | leaves))
    assert not prediction.requires_grad
    found = torch.autograd.grad(nll, list(leaves.values()), case.grad_nll)
    return {"nll": nll.detach(), "prediction": prediction} | dict(zip((f"grad_{name}" for name in leaves), found, strict=True))


def best(case: Case, k: int, function: Callable[..., tuple] = ops.top_words) -> dict[str, Tensor]:
    return dict(zip(("log_probability", "word"), function(**case.floats(), k=k), strict=True))


# ------------------------------------------------------------------------------------------------------------ the checks


def check_opcheck(size: int, device: str) -> int:
    """Row 1: torch.library.opcheck of the three registered ops."""
    runs = ops.backend_name(FAMILY, device)
    assert runs != "reference", "the registered ops call kernels, and there is none here"
    made = [
        make_case(7, 11, device=device),
        make_case(7, 11, device=device, most=3),
        make_case(9, 5, device=device, most=2, long=0, still=0.5, keep_bytes=RECOMPUTE),
        make_case(30, 200, dim=33, device=device, forbidden=0.3),
        make_case(30, 200, dim=33, device=device, keep_bytes=RECOMPUTE),
        make_case(6, 13, dim=3, dtype=torch.float64, device=device),
        make_case(0, 4, device=device),
        make_case(3, 1, device=device, most=0),
        *(make_case(30, 13, device=device, layout=layout, most=2) for layout in (1, 2, 3)),
    ]
    for case in made[:size]:
        tensors = (*case.floats().values(), case.target, case.cu_target)
        keep = case.keep_bytes == KEEP
        torch.library.opcheck(KERNELS._forward_op, (runs, *tensors, keep))
        _, _, state, kept = KERNELS._forward_op(runs, *tensors, keep)
        for wanted in ([True, True, True], [True, False, False], [False, True, True]):
            torch.library.opcheck(KERNELS._backward_op, (runs, case.grad_nll, *tensors, state, kept, wanted))
        torch.library.opcheck(KERNELS._top_op, (runs, *case.floats().values(), min(3, case.weight.shape[0])))
    return 5 * len(made[:size])


SHAPES = [  # rows, words, dim, the rest
    (1, 1, 1, {}), (1, 7, 3, {}), (2, 2, 1, {}), (3, 5, 2, {}), (5, 3, 4, {}), (7, 11, 3, {}), (11, 7, 1, {}), (13, 17, 2, {}),
    (3, 193, 2, {}), (2, 9, 17, {}), (1, 5, 33, {}), (0, 4, 2, {}), (26, 5, 2, {}), (29, 3, 3, {}), (25, 13, 1, {}),
    (4, 6, 2, {"most": 3}), (6, 1, 2, {"most": 2}), (5, 9, 3, {"most": 1}), (3, 2, 2, {"most": 6}), (0, 3, 2, {"most": 2}),
    (3, 4, 2, {"most": 0}), (9, 8, 2, {"most": 2, "still": 0.5}), (7, 12, 2, {"still": 0.5}), (5, 20, 3, {"forbidden": 0.5}),
    (31, 6, 2, {"most": 2, "still": 0.4}), (28, 7, 2, {"most": 2, "forbidden": 0.3}),
]


def check_gradcheck(size: int, device: str) -> int:
    """Row 2: analytic against numerical gradients of hidden, weight and bias in float64, scores kept and computed again."""
    for place, (rows, words, dim, more) in enumerate(SHAPES[: (size + 1) // 2]):
        for keep_bytes in (KEEP, RECOMPUTE):
            case = make_case(rows, words, dim, place, torch.float64, device, 1.5, keep_bytes=keep_bytes, **more)
            gradient = (case.grad_nll != 0).double()  # 0 where a row is to take no part
            barred = case.bias == -torch.inf  # its gradient is 0, and no finite step shows it
            leaves = [case.hidden, case.weight, case.bias.masked_fill(barred, 0)]

            def call(hidden: Tensor, weight: Tensor, bias: Tensor, case: Case = case, gradient: Tensor = gradient,
                     barred: Tensor = barred) -> Tensor:
                changed = {"hidden": hidden, "weight": weight, "bias": bias.masked_fill(barred, -torch.inf)}
                return gradient * ops.linear_cross_entropy(**(case.arguments() | changed))[0]

            leaves = [x.detach().requires_grad_() for x in leaves]
            if case.target.numel():
                assert torch.autograd.gradcheck(call, leaves)
            found = torch.autograd.grad(call(*leaves).sum(), leaves)
            assert all(x.shape == leaf.shape and x.isfinite().all() for x, leaf in zip(found, leaves, strict=True))
            if not case.target.numel():
                assert not any(x.any() for x in found)
    return 2 * len(SHAPES[: (size + 1) // 2])


def within(name: str, ours: Tensor, plain: Tensor, true: Tensor, dtype: torch.dtype) -> float:
    """The house's rule; returns the share of the allowed error."""
    assert ours.shape == true.shape, name
    if not true.numel():
        return 0.0
    floor = 1e-11 if dtype == torch.float64 else 1e-5
    # an infinity less itself is NaN
    error, theirs = ((x.double() - true).masked_fill(x == true, 0).abs().max().item() for x in (ours, plain))
    if dtype == torch.float64:
        theirs = floor * true.masked_fill(true.isinf(), 0).abs().max().item()
    assert error <= 2 * theirs + floor, f"{name}: error {error:.3g}, plain torch's {theirs:.3g}"
    return error / (2 * theirs + floor)


def close_to_truth(case: Case) -> float:
    """The house's rule for nll and gradients, and a prediction that no other word is above but by rounding; returns the largest
    share of the allowed error."""
    dtype = case.hidden.dtype
    full = torch.float64 if dtype == torch.float64 else torch.float32
    found, plain, truth = results(case), results(case, of_equations), results(case.to(torch.float64), of_equations)
    worst = 0.0
    for name, true in truth.items():
        if name == "prediction":
            continue
        assert found[name].dtype == (dtype if name.startswith("grad_") else full), name
        worst = max(worst, within(name, found[name], plain[name], true, dtype))
    score = exact_scores(case)
    predicted = found["prediction"]
    assert predicted.dtype == torch.int64 and predicted.shape == score.shape[:1]
    top = score.amax(1) if predicted.numel() else score.new_empty(0)
    of_ours, of_plain = (score.gather(1, x["prediction"].unsqueeze(1)).squeeze(1) for x in (found, plain))
    return max(worst, within("prediction", of_ours, of_plain, top, dtype))


def exact_scores(case: Case) -> Tensor:
    hidden, weight, bias = (x.double() for x in case.floats().values())
    return torch.nn.functional.linear(hidden, weight, bias)


def best_close_to_truth(case: Case, k: int) -> float:
    """The house's rule for log-probabilities; the words are k others, in order, and as probable as the k most probable."""
    dtype = case.hidden.dtype
    found, plain = best(case, k), best(case, k, best_of_equations)
    log_probability = exact_scores(case).log_softmax(1)
    true = equations.greatest(log_probability, k)[0]
    value, word = found["log_probability"], found["word"]
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and word.dtype == torch.int64
    assert not value.requires_grad and (value[:, 1:] <= value[:, :-1]).all()
    assert (word.sort(1).values.diff(dim=1) > 0).all()
    of_ours, of_plain = (log_probability.gather(1, x["word"]) for x in (found, plain))
    return max(within("log_probability", value, plain["log_probability"], true, dtype),
               within("word", of_ours, of_plain, true, dtype))


def mean_errors(recipe: dict, number: int) -> dict[str, float]:
    """Root mean square error over `number` cases, of nll and gradients, over plain torch's."""
    ours, theirs = Counter(), Counter()
    for place in range(number):
        case = make_case(**recipe, number=place)
        found, plain = results(case), results(case, of_equations)
        for name, true in results(case.to(torch.float64), of_equations).items():
            if name != "prediction":
                ours[name] += (found[name].double() - true).square().mean().item()
                theirs[name] += (plain[name].double() - true).square().mean().item()
    return {name: (ours[name] / theirs[name]) ** 0.5 for name in ours}


@st.composite
def recipes(draw: Callable, device: str = "cpu") -> dict:
    """Arguments of `make_case`, and k. Few rows and many, and more than the kernels take at once (480 backward, 960 of top_words,
    4080 forward); words below, at and above their blocks of 192. Scores are of order 1, as in graph_attention_checks."""
    kinds = [torch.float32] * 4 + [torch.float64, torch.bfloat16] + [torch.float16] * (device != "cpu")
    rows = draw(st.one_of(st.integers(0, 24), st.integers(0, 64), st.integers(0, 64), st.sampled_from([97, 241, 521])))
    words = draw(st.one_of(st.integers(1, 60), st.integers(1, 400), st.sampled_from([191, 192, 193, 383, 577, 1009])))
    dim = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 150, 300])))
    if draw(st.integers(0, 49)) == 0:
        rows, words, dim = draw(st.sampled_from([1009, 4099])), 1 + words % 40, 1 + dim % 8
    choices = {
        "number": st.integers(0, 2**31),
        "dtype": st.sampled_from(kinds),
        "magnitude": st.sampled_from([0.1, 0.5, 1.0]),
        "layout": st.integers(0, 3),
        "long": st.integers(0, 3),
        "most": st.one_of(st.none(), st.integers(0, 5)),
        "still": st.sampled_from([0.0, 0.0, 0.3, 0.9]),
        "forbidden": st.sampled_from([0.0, 0.0, 0.2, 0.9]),
        "keep_bytes": st.sampled_from([KEEP, RECOMPUTE]),
        "k": st.integers(1, min(words, 40)),
    }
    found = {"rows": rows, "words": words, "dim": dim, "device": device}
    return found | {name: draw(choice) for name, choice in choices.items()}


def check_fuzz(size: int, device: str) -> int:
    """Row 3: losses, predictions and all gradients, and the most probable words, against float64, on whatever hypothesis thinks
    of."""
    seen = 0

    @settings(max_examples=size, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(recipes(device))
    def compare(recipe: dict) -> None:
        nonlocal seen
        seen += 1
        k = recipe.pop("k")
        case = make_case(**recipe)
        close_to_truth(case)
        best_close_to_truth(case, k)

    compare()
    return seen


def check_bad_indices(size: int, device: str) -> int:
    """Row 4: an entry of target or cu_target that cannot be is an IndexError that names it, before anything is computed; the next
    good call gives the same bits as ever."""
    g = generator(4)
    for number in range(size):
        words = 1 + number % 40
        case = make_case(1 + number % 50, words, 1 + number % 9, number, device=device, long=number % 3 and 3,
                         most=(None, 3, 2)[number % 3], keep_bytes=(KEEP, RECOMPUTE)[number % 2])
        expected = ops.linear_cross_entropy(**case.arguments())
        name = "cu_target" if case.cu_target is not None and (number % 2 or not case.target.numel()) else "target"
        index = getattr(case, name).clone()
        place = int(torch.randint(index.numel(), (), generator=g))
        good, limit = int(index[place]), words if name == "target" else case.target.numel() + 1
        wrong = [-1, limit, limit + 1, -limit, 2**31 - 1, -(2**31)]
        if index.dtype == torch.int64:  # 2^32 + i would be i in 32 bits
            wrong += [-(2**63), 2**63 - 1, 2**31, 2**32, 2**40, 2**32 + good, good - 2**32]
        bad = wrong[int(torch.randint(len(wrong), (), generator=g))]
        index[place] = bad
        broken = case.arguments() | {name: index, "validate": True}
        if number % 5 == 0:
            broken |= {leaf: x.clone().requires_grad_() for leaf, x in case.floats().items()}
        try:
            ops.linear_cross_entropy(**broken)
        except IndexError as error:
            assert str(error).startswith(f"{name} "), f"{name}[{place}] = {bad} gave: {error}"
        else:
            raise AssertionError(f"{name}[{place}] = {bad} was taken, of {limit}")
        again = ops.linear_cross_entropy(**case.arguments())
        assert all(identical(a, b) for a, b in zip(again, expected, strict=True))
    return size


POISON = (torch.nan, torch.inf, -torch.inf)


def check_nan_isolation(size: int, device: str) -> int:
    """Row 5: NaN or Inf in one row of hidden, or in the gradient of one row's losses, leaves the bits of the other rows' nll,
    prediction and grad_hidden, and of their most probable words. grad_weight and grad_bias are sums over the rows: they are not
    finite then, anywhere; but where the losses of that row have gradient 0, or are none, it takes no part in the kernels, and the
    bits of both stay (plain torch makes them NaN). NaN in a word's weight or bias makes every row's losses NaN."""
    kernels = ops.backend_name(FAMILY, device) != "reference"
    for number in range(size):
        g = generator(number)

        def pick(*choices: object, g: torch.Generator = g) -> object:
            return choices[int(torch.randint(len(choices), (), generator=g))]

        rows, words, dim = pick(1, 2, 7, 24, 25, 40, 300), pick(1, 2, 40, 191, 400), 1 + number % 33
        case = make_case(rows, words, dim, number, device=device, most=pick(None, None, 2), still=pick(0.0, 0.3),
                         keep_bytes=pick(KEEP, RECOMPUTE))
        row, poison = int(torch.randint(rows, (), generator=g)), pick(*POISON)
        row_of = torch.arange(rows) if case.cu_target is None else equations.segment_ids(case.cu_target, case.target.numel())
        own = (row_of.to(device) == row).nonzero().squeeze(1)
        name = pick("hidden", "hidden", "hidden", "grad_nll", "weight", "bias")
        said = f"number {number}: {poison} in row {row} of {name}"
        if name in ("weight", "bias"):
            poisoned = getattr(case, name).clone()
            poisoned[row % words] = torch.nan
            found = results(replace(case, **{name: poisoned}))
            assert found["nll"].isnan().all() and (found["prediction"] == row % words).all(), f"{said} was hidden"
            continue
        clean, poisoned = results(case), getattr(case, name).clone()
        takes_part = bool((case.grad_nll[own] != 0).any())
        if name == "hidden":
            poisoned[row, pick(slice(None), *range(dim))] = poison
        elif own.numel():
            poisoned[own[pick(0, -1)]] = poison
            takes_part = True
            if (case.grad_nll[own] == 0).all():  # that row now takes part, and another order of sums with it
                clean = results(replace(case, grad_nll=case.grad_nll.index_fill(0, own, 1.0)))
        found = results(replace(case, **{name: poisoned}))
        others = torch.arange(rows, device=device) != row
        of_others = row_of.to(device) != row
        for field, mask in (("nll", of_others), ("prediction", others), ("grad_hidden", others)):
            assert identical(found[field][mask], clean[field][mask]), f"{said} reached others' {field}"
        for field in ("grad_weight", "grad_bias"):
            if takes_part:
                assert not found[field].isfinite().any(), f"{said} was hidden from {field}"
            elif kernels:
                assert identical(found[field], clean[field]), f"{said} reached {field}, and has no part in it"
        if name == "hidden":
            assert not found["nll"][own].isfinite().any(), f"{said} was hidden from nll"
            a, b = (best(x, min(3, words)) for x in (case, replace(case, hidden=poisoned)))
            assert all(identical(b[field][others], a[field][others]) for field in a), f"{said} reached others' words"
            assert not b["log_probability"][row].isfinite().any(), f"{said} was hidden from top_words"
    return size


VARIED = [  # one row; few rows and many, at once and not; kept and not; rows without part; both index widths
    {"rows": 1, "words": 24000, "dim": 300},
    {"rows": 24, "words": 577, "dim": 33},
    {"rows": 25, "words": 577, "dim": 33, "keep_bytes": RECOMPUTE},
    {"rows": 24, "words": 1, "dim": 1, "long": 0},
    {"rows": 480, "words": 5003, "dim": 300},
    {"rows": 480, "words": 5003, "dim": 300, "keep_bytes": RECOMPUTE},
    {"rows": 1021, "words": 389, "dim": 150, "dtype": torch.float64, "still": 0.3},
    {"rows": 1021, "words": 389, "dim": 150, "still": 0.3, "keep_bytes": RECOMPUTE},
    {"rows": 700, "words": 200, "dim": 40, "still": 0.99, "most": 3, "keep_bytes": RECOMPUTE},
    {"rows": 4099, "words": 211, "dim": 7, "long": 0},
    {"rows": 16, "words": 24000, "dim": 300, "most": 34},
    {"rows": 60, "words": 400, "dim": 33, "most": 3, "forbidden": 0.5, "layout": 1},
    {"rows": 0, "words": 4, "dim": 3},
]


def digests(device: str) -> list[str]:
    kinds = VARIED if device == "cpu" else [kind for kind in VARIED if kind.get("dtype") != torch.float64]
    cases = [make_case(number=place, device=device, **kind) for place, kind in enumerate(kinds)]
    best_of = [(k, case) for k in (1, 5, 97) for case in cases if case.weight.shape[0] >= k]
    return [*(digest(results(case)) for case in cases), *(digest(best(case, k)) for k, case in best_of)]


def check_prefilled(size: int, device: str) -> int:
    """Row 6."""
    return op_checks.prefilled(__name__, KERNELS, size, device)


def check_determinism(size: int, device: str) -> int:
    """Row 11."""
    return op_checks.deterministic(digests, size, device)


CHECKS: dict[int, tuple[Callable[[int, str], int], int]] = {  # row of the scorecard: check, full size
    1: (check_opcheck, 11),
    2: (check_gradcheck, 2 * len(SHAPES)),
    3: (check_fuzz, 10_000),
    4: (check_bad_indices, 1_000),
    5: (check_nan_isolation, 500),
    6: (check_prefilled, 3),
    11: (check_determinism, 10),
}
