"""Checks of case_fast.ops.bilinear_mim, each of any size: the tests run a share of them, the scorecard all.

A check takes the number of cases and a device, returns how many cases it looked at, and raises AssertionError on a failure.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import op_checks
import torch
from helpers import generator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_checks import digest, identical, strided
from scipy.stats import chisquare
from torch import Tensor

from case_fast import equations, ops

KERNELS = sys.modules["case_fast.ops.bilinear_mim"]  # the module; `ops.bilinear_mim` is the function
FLOATS = ("x", "y", "weight")


@dataclass(frozen=True)
class Case:
    """One call's arguments, and the gradient of both sides of its loss."""

    x: Tensor
    y: Tensor
    weight: Tensor | None
    positive: Tensor | None
    grad_y: Tensor
    grad_x: Tensor
    num_negatives: int | None = None
    seed: int = 0
    score: str = "bilinear_sigmoid"

    def arguments(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("grad_y", "grad_x")}

    def floats(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in FLOATS if getattr(self, name) is not None}

    def pairs_with(self) -> Tensor:
        """positive, also where it is left to its default."""
        return torch.arange(self.x.shape[0], device=self.x.device) if self.positive is None else self.positive.long()

    def to(self, dtype: torch.dtype) -> Case:
        full = torch.float64 if dtype == torch.float64 else torch.float32
        return replace(self, grad_y=self.grad_y.to(full), grad_x=self.grad_x.to(full),
                       **{name: x.to(dtype) for name, x in self.floats().items()})


def make_case(pairs: int, rows: int | None = None, dim: int = 5, score: str = "bilinear_sigmoid", number: int = 0,
              dtype: torch.dtype = torch.float32, device: str = "cpu", magnitude: float = 1.0, layout: int = 0,
              long: bool = True, groups: int | None = None, **more: object) -> Case:
    """Random arguments, the `number`-th; rows None: x_p and y_p pair, else any row of y does, of the first ``groups`` of
    them. ``layout``: strides other than contiguous. Scores have about the size of ``magnitude``."""
    g = generator(number)
    size_y = pairs if rows is None else rows

    def normal(*shape: int, scale: float, place: int) -> Tensor:
        x = (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)
        return strided(x, layout and layout + place).to(device)

    spread = magnitude * (dim**-0.5 if score == "dot" else 1) ** 0.5
    x, y = normal(pairs, dim, scale=spread, place=0), normal(size_y, dim, scale=spread, place=1)
    weight = normal(dim, dim, scale=1 / dim, place=2) if score == "bilinear_sigmoid" else None
    positive = None
    if rows is not None:
        positive = torch.randint(max(min(rows, groups or rows), 1), (pairs,), generator=g)
        positive = strided(positive if long else positive.int(), layout).to(device)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    grads = (torch.randn(pairs, generator=g, dtype=torch.float64).to(full).to(device) for _ in range(2))
    return Case(x, y, weight, positive, *grads, score=score, **more)


def sides_of_equations(x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor | None, **more: object) -> tuple:
    """equations.mim_sides with the op's default of positive, and logit without gradient."""
    positive = torch.arange(x.shape[0], device=x.device) if positive is None else positive
    side_y, side_x, logit = equations.mim_sides(x, y, weight, positive, **more)
    return side_y, side_x, logit.detach()


def results(case: Case, function: Callable[..., tuple] = ops.mim_sides, autocast: bool = False) -> dict[str, Tensor]:
    """Both sides, the logit, and the gradient of every floating-point input; the forward pass under autocast, or not."""
    leaves = {name: x.detach().requires_grad_() for name, x in case.floats().items()}
    with torch.autocast(case.x.device.type, torch.bfloat16, enabled=autocast):
        side_y, side_x, logit = function(**(case.arguments() | leaves))
    assert not logit.requires_grad
    found = torch.autograd.grad((side_y, side_x), list(leaves.values()), (case.grad_y, case.grad_x))
    return {"side_y": side_y.detach(), "side_x": side_x.detach(), "logit": logit} | dict(
        zip((f"grad_{name}" for name in leaves), found, strict=True)
    )


def counted() -> AbstractContextManager[Counter]:
    """How often each native function of the family is called within."""
    return op_checks.counted("bilinear_mim")


# ------------------------------------------------------------------------------------------------------------ the checks


def check_opcheck(size: int, device: str) -> int:
    """Row 1: torch.library.opcheck of both registered ops."""
    runs = ops.backend_name("bilinear_mim", device)
    assert runs != "reference", "the registered ops call kernels, and there is none here"
    made = [
        make_case(7, device=device),
        make_case(7, score="dot", device=device),
        make_case(9, 4, num_negatives=3, seed=5, device=device),
        make_case(9, 4, score="dot", num_negatives=3, seed=2**40, device=device),
        make_case(0, 3, device=device),
        make_case(0, 0, score="dot", device=device),
        make_case(6, 11, dim=3, dtype=torch.float64, device=device),
        make_case(6, 11, layout=1, device=device),
        make_case(1, device=device),
        make_case(70, 40, dim=33, device=device),
    ]
    for case in made[:size]:
        tensors = (case.x, case.y, case.weight, case.positive)
        numbers = (case.num_negatives, case.seed, case.score, True)
        torch.library.opcheck(KERNELS._forward_op, (runs, *tensors, *numbers))
        saved = KERNELS._forward_op(runs, *tensors, *numbers)[3]
        torch.library.opcheck(KERNELS._backward_op, (runs, case.grad_y, case.grad_x, *tensors, saved, *numbers))
    return 2 * len(made[:size])


SHAPES = [  # pairs, rows (None: one to one), dim, num_negatives
    (1, None, 1, None), (1, None, 3, 4), (2, None, 1, None), (2, None, 5, 1), (3, None, 2, None), (3, None, 4, 7),
    (5, None, 3, None), (7, None, 17, None), (11, None, 2, 3), (13, None, 5, None), (1, 2, 3, None), (1, 5, 2, 3),
    (4, 1, 3, None), (4, 1, 3, 2), (5, 2, 4, None), (6, 3, 1, 5), (3, 9, 2, None), (2, 11, 3, 6), (9, 4, 6, None),
    (12, 5, 3, 2), (17, 7, 2, None), (7, 19, 3, 9), (0, None, 3, None), (0, 4, 2, None), (0, 4, 2, 3), (5, 3, 33, None),
]


def check_gradcheck(size: int, device: str) -> int:
    """Row 2: analytic against numerical gradients of x, y and weight in float64, for both scores."""
    for place, (pairs, rows, dim, negatives) in enumerate(SHAPES[: (size + 1) // 2]):
        for score in equations.SCORES:
            case = make_case(pairs, rows, dim, score, place, torch.float64, device, 1.5)
            case = replace(case, num_negatives=negatives, seed=2**40 + place)
            names = list(case.floats())
            leaves = [x.requires_grad_() for x in case.floats().values()]

            def call(*leaves: Tensor, case: Case = case, names: list[str] = names) -> tuple[Tensor, Tensor]:
                return ops.mim_sides(**(case.arguments() | dict(zip(names, leaves, strict=True))))[:2]

            if pairs:
                assert torch.autograd.gradcheck(call, leaves)
            found = torch.autograd.grad(sum(side.sum() for side in call(*leaves)), leaves)
            assert all(x.shape == leaf.shape for x, leaf in zip(found, leaves, strict=True))
            if pairs < 2 and rows is None or pairs == 0:
                assert not any(x.any() for x in found), "without negatives the gradient is exactly 0"
    return 2 * len(SHAPES[: (size + 1) // 2])


def close_to_truth(case: Case) -> float:
    """The house's rule for sides, logit and gradients; returns the largest share of the allowed error."""
    dtype = case.x.dtype
    found, plain = results(case), results(case, sides_of_equations)
    truth = results(case.to(torch.float64), sides_of_equations)
    floor = 1e-11 if dtype == torch.float64 else 1e-5
    full = torch.float64 if dtype == torch.float64 else torch.float32
    worst = 0.0
    for name, true in truth.items():
        assert found[name].shape == true.shape, name
        assert found[name].dtype == (dtype if name.startswith("grad_") else full), name
        if not true.numel():
            continue
        ours, theirs = ((x[name].double() - true).abs().max().item() for x in (found, plain))
        if dtype == torch.float64:
            theirs = floor * true.abs().max().item()
        assert ours <= 2 * theirs + floor, f"{name}: error {ours:.3g}, plain torch's {theirs:.3g}"
        worst = max(worst, ours / (2 * theirs + floor))
    return worst


def mean_errors(recipe: dict, number: int) -> dict[str, float]:
    """Root mean square error over `number` cases, of sides, logit and gradients, over plain torch's."""
    ours, theirs = Counter(), Counter()
    for place in range(number):
        case = make_case(**recipe, number=place)
        found, plain = results(case), results(case, sides_of_equations)
        for name, true in results(case.to(torch.float64), sides_of_equations).items():
            ours[name] += (found[name].double() - true).square().mean().item()
            theirs[name] += (plain[name].double() - true).square().mean().item()
    return {name: (ours[name] / theirs[name]) ** 0.5 for name in ours}


@st.composite
def recipes(draw: Callable, device: str = "cpu") -> dict:
    """Arguments of `make_case`. Scores are kept of order 1: in the tens, one rounding of one of them is above the rule's
    1e-5, and which of two equally good sums it hits is luck; `mean_errors` compares those on average."""
    kinds = [torch.float32] * 4 + [torch.float64, torch.bfloat16] + [torch.float16] * (device != "cpu")
    choices = {
        "pairs": st.integers(0, 64),
        "rows": st.one_of(st.none(), st.integers(1, 64)),
        "dim": st.one_of(st.integers(1, 40), st.sampled_from([64, 150, 300])),
        "score": st.sampled_from(equations.SCORES),
        "number": st.integers(0, 2**31),
        "dtype": st.sampled_from(kinds),
        "magnitude": st.sampled_from([0.1, 0.5, 1.0]),
        "layout": st.integers(0, 3),
        "long": st.booleans(),
        "groups": st.one_of(st.none(), st.integers(1, 4)),
        "num_negatives": st.one_of(st.none(), st.integers(1, 80)),
        "seed": st.integers(0, 2**63 - 1),
    }
    return {"device": device} | {name: draw(choice) for name, choice in choices.items()}


def check_fuzz(size: int, device: str) -> int:
    """Row 3: sides, logit and all gradients against float64, on whatever hypothesis thinks of."""
    seen = 0

    @settings(max_examples=size, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(recipes(device))
    def compare(recipe: dict) -> None:
        nonlocal seen
        seen += 1
        close_to_truth(make_case(**recipe))

    compare()
    return seen


def check_bad_indices(size: int, device: str) -> int:
    """Row 4: an entry of positive that names no row is an IndexError that names it, before anything is computed; the next
    good call gives the same bits as ever."""
    g = generator(4)
    for number in range(size):
        rows = 1 + number % 40
        case = make_case(1 + number % 50, rows, 1 + number % 9, equations.SCORES[number % 2], number, device=device,
                         long=number % 3 > 0, num_negatives=None if number % 4 else 3)
        expected = ops.mim_sides(**case.arguments())
        positive = case.positive.clone()
        place = int(torch.randint(positive.numel(), (), generator=g))
        good = int(positive[place])
        wrong = [-1, rows, rows + 1, -rows, 2**31 - 1, -(2**31)]
        if positive.dtype == torch.int64:  # 2^32 + i would be i in 32 bits
            wrong += [-(2**63), 2**63 - 1, 2**31, 2**32, 2**40, 2**32 + good, good - 2**32]
        bad = wrong[int(torch.randint(len(wrong), (), generator=g))]
        positive[place] = bad
        broken = case.arguments() | {"positive": positive, "validate": True}
        if number % 5 == 0:
            broken |= {leaf: x.clone().requires_grad_() for leaf, x in case.floats().items()}
        try:
            ops.bilinear_mim(**broken)
        except IndexError as error:
            assert str(error).startswith("positive"), f"positive[{place}] = {bad} gave: {error}"
        else:
            raise AssertionError(f"positive[{place}] = {bad} was taken, of {rows} rows")
        again = ops.mim_sides(**case.arguments())
        assert all(identical(a, b) for a, b in zip(again, expected, strict=True))
    return size


def holds(case: Case, name: str, row: int) -> tuple[Tensor, Tensor]:
    """(P,) bool each: whether the sum over rows of y, and over rows of x, of each pair holds this row of x or y."""
    positive = case.pairs_with()
    own = torch.arange(case.x.shape[0], device=positive.device) == row if name == "x" else positive == row
    if case.num_negatives is None:
        if name == "x":
            return own, own | (positive != positive[row])
        return torch.ones_like(own), own
    over_y, over_x, found_y, found_x = equations.draw_negatives(positive, case.y.shape[0], case.num_negatives, case.seed)
    if name == "x":
        return own, own | ((over_x == row).any(1) & found_x)
    return own | ((over_y == row).any(1) & found_y), own


def check_nan_shows(size: int, device: str) -> int:
    """Row 5, turned round: a NaN in a row of x or y makes every loss whose sums hold that row NaN, and leaves the bits of all
    others; a NaN in weight makes all losses NaN. Its gradient shows it too."""
    for number in range(size):
        g = generator(number)

        def pick(*choices: object, g: torch.Generator = g) -> object:
            return choices[int(torch.randint(len(choices), (), generator=g))]

        pairs, rows = (int(torch.randint(1, most, (), generator=g)) for most in (40, 30))
        case = make_case(pairs, pick(None, rows, rows), 1 + number % 33, pick(*equations.SCORES), number, device=device,
                         num_negatives=pick(None, 1, 2, 5), seed=number, groups=pick(None, None, 3))
        clean = results(case)
        name = pick(*case.floats())
        poisoned = getattr(case, name).clone()
        row = int(torch.randint(poisoned.shape[0], (), generator=g))
        poisoned[row, pick(slice(None), *range(poisoned.shape[1]))] = torch.nan
        found = results(replace(case, **{name: poisoned}))
        every = torch.ones(pairs, dtype=torch.bool, device=device)
        held = (every, every) if name == "weight" else holds(case, name, row)
        for side, reached in zip(("side_y", "side_x"), held, strict=True):
            said = f"{side}, number {number}: NaN in row {row} of {name}"
            assert found[side][reached].isnan().all(), f"{said} was hidden"
            assert identical(found[side][~reached], clean[side][~reached]), f"{said} reached a sum that does not hold it"
        if held[0].any() or held[1].any():
            assert found[f"grad_{name}"].isnan().any(), f"NaN in {name} was hidden from its gradient"
    return size


VARIED = [  # within a tile, across tiles and beyond one, many to one, sampled few and many of few and many rows, both scores
    {"pairs": 16, "dim": 300},
    {"pairs": 61, "rows": 17, "dim": 7},
    {"pairs": 61, "rows": 17, "dim": 7, "score": "dot"},
    {"pairs": 700, "dim": 300},
    {"pairs": 389, "rows": 1021, "dim": 150, "dtype": torch.float64},
    {"pairs": 1280, "rows": 64, "dim": 300},
    {"pairs": 1280, "rows": 64, "dim": 33, "score": "dot"},
    {"pairs": 400, "dim": 40, "num_negatives": 64},
    {"pairs": 2000, "rows": 3001, "dim": 33, "num_negatives": 2, "score": "dot"},
    {"pairs": 2000, "rows": 3001, "dim": 33, "num_negatives": 2},
    {"pairs": 50, "rows": 5, "dim": 9, "num_negatives": 200, "dtype": torch.float64},
    {"pairs": 1, "dim": 3},
    {"pairs": 0, "rows": 4},
]


def digests(device: str) -> list[str]:
    kinds = VARIED if device == "cpu" else [kind for kind in VARIED if kind.get("dtype") != torch.float64]
    return [digest(results(make_case(number=place, device=device, seed=9, **kind))) for place, kind in enumerate(kinds)]


def check_prefilled(size: int, device: str) -> int:
    """Row 6."""
    return op_checks.prefilled(__name__, KERNELS, size, device)


def check_determinism(size: int, device: str) -> int:
    """Row 11."""
    return op_checks.deterministic(digests, size, device)


def draws_taken(positive: Tensor, rows: int, num_negatives: int, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """(P, Q) and (P, P): how often a backend drew each row for each pair, read from gradients.

    With every score 0, each of the k + 1 terms of a sum has the same share of its gradient: that of the score of one row is
    the number of its draws / (k + 1), and for the positive its own term too, less 1, which makes it 0.
    """
    pairs = positive.numel()
    ones, zeros = (torch.full((n, 1), value, dtype=torch.float64, device=device) for n, value in ((pairs, 1.0), (rows, 0.0)))
    over_y, over_x = torch.zeros(pairs, rows, dtype=torch.int64), torch.zeros(pairs, pairs, dtype=torch.int64)
    for pair in range(pairs):
        for counts, x, y, place in ((over_y, ones, zeros, 0), (over_x, ones * 0, zeros + 1, 1)):
            x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
            sides = ops.mim_sides(x, y, None, positive, num_negatives, seed, "dot")
            (found,) = torch.autograd.grad(sides[place][pair], y if place == 0 else x)
            found = found[:, 0] * (num_negatives + 1)
            found[positive[pair] if place == 0 else pair] = 0
            counts[pair] = found.round().long()
            assert (found - counts[pair]).abs().max() < 1e-6
    return over_y, over_x


def check_draws(size: int, device: str) -> int:
    """The rows that a backend draws are those of `equations.draw_negatives`, uniform over the eligible ones."""
    positive = torch.tensor([4, 0, 0, 2, 4, 4, 1], device=device)
    for number in range(size):
        seed = (number * 0x9E3779B97F4A7C15) % 2**63
        taken = draws_taken(positive, 7, 2_000, seed, device)
        expected = equations.draw_negatives(positive, 7, 2_000, seed)
        for counts, drawn in zip(taken, expected[:2], strict=True):
            assert torch.equal(counts, torch.stack([torch.bincount(row.cpu(), minlength=7) for row in drawn]))
        for pair, c in enumerate(positive.tolist()):
            for counts, eligible in zip(taken, (torch.arange(7) != c, positive.cpu() != c), strict=True):
                assert not counts[pair][~eligible].any()
                assert chisquare(counts[pair][eligible].numpy()).pvalue > 1e-6
    return size


CHECKS: dict[int, tuple[Callable[[int, str], int], int]] = {  # row of the scorecard: check, full size
    1: (check_opcheck, 10),
    2: (check_gradcheck, 2 * len(SHAPES)),
    3: (check_fuzz, 10_000),
    4: (check_bad_indices, 1_000),
    5: (check_nan_shows, 500),
    6: (check_prefilled, 3),
    11: (check_determinism, 10),
}
