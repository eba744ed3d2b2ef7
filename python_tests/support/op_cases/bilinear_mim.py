"""case_fast.ops.bilinear_mim and mim_sides, its two sides: random calls, and what is particular to checking them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from op_case import HALF, WRONG_SEEDS, Case, Damaged, Poisoned, chooser, full, generator, strided, wrong_entry
from torch import Tensor

from case_fast import equations, ops

SIGMOID, DOT = equations.SCORES
SHAPES = [  # pairs, rows (None: one to one), dim, num_negatives
    (1, None, 1, None), (1, None, 3, 4), (2, None, 1, None), (2, None, 5, 1), (3, None, 2, None), (3, None, 4, 7),
    (5, None, 3, None), (7, None, 17, None), (11, None, 2, 3), (13, None, 5, None), (1, 2, 3, None), (1, 5, 2, 3),
    (4, 1, 3, None), (4, 1, 3, 2), (5, 2, 4, None), (6, 3, 1, 5), (3, 9, 2, None), (2, 11, 3, 6), (9, 4, 6, None),
    (12, 5, 3, 2), (17, 7, 2, None), (7, 19, 3, 9), (0, None, 3, None), (0, 4, 2, None), (0, 4, 2, 3), (5, 3, 33, None),
]
NAMES = ("pairs", "rows", "dim", "num_negatives")
CALLS = [{"pairs": 9, "rows": 4, "seed": 3}, {"pairs": 12, "rows": 20, "seed": 4}, {"pairs": 30, "rows": 7, "seed": 5}]
SAMPLED = [call | {"num_negatives": 3} for call in CALLS]
SAMPLED_DOT = [call | {"score": DOT} for call in SAMPLED]


def sides_of_equations(x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor | None, **more: object) -> tuple:
    """equations.mim_sides with the op's default of positive, and logit without gradient. On a GPU x W is rounded to half
    precision, as torch's own product rounds it; the equation itself computes in float32."""
    positive = torch.arange(x.shape[0], device=x.device) if positive is None else positive
    if weight is not None and x.dtype in HALF and x.device.type != "cpu":
        x, weight = x @ weight, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    side_y, side_x, logit = equations.mim_sides(x, y, weight, positive, **more)
    return side_y, side_x, logit.detach()


@dataclass(frozen=True)
class BilinearMIM(Case):
    x: Tensor
    y: Tensor
    weight: Tensor | None
    positive: Tensor | None
    grad_y: Tensor
    grad_x: Tensor
    num_negatives: int | None = None
    seed: int | Tensor = 0
    score: str = SIGMOID
    sizes: Tensor | None = None

    family = "bilinear_mim"
    op = staticmethod(ops.mim_sides)
    public = staticmethod(ops.bilinear_mim)
    plain = staticmethod(sides_of_equations)
    FLOATS = ("x", "y", "weight")
    OUTPUTS = ("side_y", "side_x", "logit")
    GRADIENTS = {"side_y": "grad_y", "side_x": "grad_x"}
    SUMS = True

    SMALL = [{"pairs": 20, "rows": 11}, {"pairs": 20, "rows": 11, "score": DOT}, {"pairs": 6},
             {"pairs": 7, "rows": 5, "num_negatives": 4, "seed": 8}, {"pairs": 7, "rows": 5, "score": DOT, "num_negatives": 4}]
    OPCHECK = [
        {"pairs": 7},
        {"pairs": 7, "score": DOT},
        {"pairs": 9, "rows": 4, "num_negatives": 3, "seed": 5},
        {"pairs": 9, "rows": 4, "score": DOT, "num_negatives": 3, "seed": 2**40},
        {"pairs": 0, "rows": 3},
        {"pairs": 0, "rows": 0, "score": DOT},
        {"pairs": 6, "rows": 11, "dim": 3, "dtype": torch.float64},
        {"pairs": 6, "rows": 11, "layout": 1},
        {"pairs": 1},
        {"pairs": 70, "rows": 40, "dim": 33},
        {"pairs": 9, "rows": 6, "beyond": (3, 2)},
        {"pairs": 9, "rows": 6, "score": DOT, "num_negatives": 3, "seed": 5, "beyond": (3, 2)},
    ]
    GRADCHECK = [
        dict(zip(NAMES, shape, strict=True)) | {"score": score, "number": place, "magnitude": 1.5, "seed": 2**40 + place}
        for place, shape in enumerate(SHAPES) for score in equations.SCORES
    ] + [
        {"pairs": 7, "rows": 5, "dim": 3, "score": score, "num_negatives": negatives, "seed": 7, "beyond": beyond}
        for score in equations.SCORES for negatives in (None, 4) for beyond in ((2, 1), (0, 3), (6, 4), (7, 5))
    ]
    VARIED = [  # within a tile, across tiles and beyond one, many to one, sampled few and many of few and many rows, both scores
        {"pairs": 16, "dim": 300},
        {"pairs": 61, "rows": 17, "dim": 7},
        {"pairs": 61, "rows": 17, "dim": 7, "score": DOT},
        {"pairs": 700, "dim": 300},
        {"pairs": 389, "rows": 1021, "dim": 150, "dtype": torch.float64},
        {"pairs": 1280, "rows": 64, "dim": 300},
        {"pairs": 1280, "rows": 64, "dim": 33, "score": DOT},
        {"pairs": 400, "dim": 40, "num_negatives": 64, "seed": 9},
        {"pairs": 2000, "rows": 3001, "dim": 33, "num_negatives": 2, "seed": 9, "score": DOT},
        {"pairs": 2000, "rows": 3001, "dim": 33, "num_negatives": 2, "seed": 9},
        {"pairs": 50, "rows": 5, "dim": 9, "num_negatives": 200, "seed": 9, "dtype": torch.float64},
        {"pairs": 1, "dim": 3},
        {"pairs": 0, "rows": 4},
        {"pairs": 700, "dim": 300, "beyond": (33, 33)},
        {"pairs": 61, "rows": 17, "dim": 7, "score": DOT, "beyond": (20, 5)},
        {"pairs": 400, "rows": 90, "dim": 40, "num_negatives": 64, "seed": 9, "beyond": (100, 9)},
        {"pairs": 50, "rows": 5, "dim": 9, "num_negatives": 200, "seed": 9, "score": DOT, "beyond": (1, 0)},
    ]
    AVERAGE = [
        ({"pairs": 64, "rows": 30, "dim": 150, "magnitude": 5.0}, 30, 1.5, 1.5),
        ({"pairs": 200, "dim": 16, "magnitude": 3.0, "score": DOT}, 30, 1.5, 1.5),
        ({"pairs": 60, "rows": 40, "dim": 40, "magnitude": 4.0, "num_negatives": 20}, 30, 1.5, 1.5),
    ]
    DRAWN = [{"pairs": pairs, "rows": rows, "num_negatives": negatives, "score": score} for score in equations.SCORES
             for pairs, rows, negatives in [(40, None, 7), (33, 70, 3), (60, 5, 90), (300, 7, 2)]]
    STATUSES = []  # it says which entry of positive, or nothing
    COMPILED = [
        ("native", "inductor", None, CALLS),
        ("native", "aot_eager", True, CALLS),
        ("native", "aot_eager", True, SAMPLED_DOT),
        ("native", "aot_eager", None, SAMPLED),
        ("reference", "eager", True, CALLS),
        ("reference", "eager", True, SAMPLED_DOT),
    ]

    ON_GPU = {name: {"magnitude": 2**0.5, "seed": 0x1234_5678_9ABC_DEF0} | recipe for name, recipe in {
        "fine": {"pairs": 1280, "rows": 64, "dim": 300},
        "sampled": {"pairs": 1280, "dim": 300, "num_negatives": 64},
        "dot": {"pairs": 1009, "rows": 757, "dim": 13, "score": DOT},
        "coarse": {"pairs": 16, "dim": 300},
        "sampled, shared": {"pairs": 300, "rows": 70, "dim": 75, "num_negatives": 19},
        "prime sizes": {"pairs": 1009, "rows": 757, "dim": 13},
        "more rows than a block": {"pairs": 5003, "rows": 1501, "dim": 300},
        "one pair": {"pairs": 1, "dim": 4},
        "one row of y": {"pairs": 5, "rows": 1, "dim": 4},
        "no pairs": {"pairs": 0, "rows": 3, "dim": 4},
        "dot, sampled": {"pairs": 300, "rows": 70, "dim": 75, "score": DOT, "num_negatives": 19},
        "dot, one row of y": {"pairs": 5, "rows": 1, "dim": 4, "score": DOT},
        "not all exist": {"pairs": 1280, "rows": 64, "dim": 300, "beyond": (301, 5)},
        "not all exist, sampled": {"pairs": 300, "rows": 70, "dim": 75, "num_negatives": 19, "beyond": (31, 5)},
        "not all exist, dot": {"pairs": 1009, "rows": 757, "dim": 13, "score": DOT, "beyond": (100, 57)},
    }.items()}

    @classmethod
    def made(cls, pairs: int, rows: int | None = None, dim: int = 5, score: str = SIGMOID, number: int = 0,
             dtype: torch.dtype = torch.float32, device: str = "cpu", magnitude: float = 1.0, layout: int = 0,
             long: bool = True, groups: int | None = None, beyond: tuple[int, int] | None = None, **more: object
             ) -> BilinearMIM:
        """rows None: x_p and y_p pair, else any row of y does, of the first ``groups`` of them. Scores have about the size of
        ``magnitude``. beyond: so many of the pairs and of the rows do not exist."""
        g = generator(number)
        size_y = pairs if rows is None else rows

        def normal(*shape: int, scale: float, place: int) -> Tensor:
            x = (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)
            return strided(x, layout and layout + place).to(device)

        spread = magnitude * (dim**-0.5 if score == DOT else 1) ** 0.5
        x, y = normal(pairs, dim, scale=spread, place=0), normal(size_y, dim, scale=spread, place=1)
        weight = normal(dim, dim, scale=1 / dim, place=2) if score == SIGMOID else None
        positive = None
        if beyond is not None:
            more["sizes"] = torch.tensor([pairs - beyond[0], size_y - beyond[1]], device=device)
        if rows is not None:
            existing = rows - (beyond[1] if beyond else 0)
            positive = torch.randint(max(min(existing, groups or rows), 1), (pairs,), generator=g)
            positive = strided(positive if long else positive.int(), layout).to(device)
        grads = (torch.randn(pairs, generator=g, dtype=torch.float64).to(full(dtype)).to(device) for _ in range(2))
        return cls(x, y, weight, positive, *grads, score=score, **more)

    def has_gradient(self) -> bool:
        """A pair alone has no negatives."""
        pairs = self.x.shape[0] if self.sizes is None else int(self.sizes[0])
        return super().has_gradient() and pairs > 0 and (self.positive is not None or pairs > 1)

    @classmethod
    def recipe(cls, draw, st) -> dict:
        choices = {
            "pairs": st.integers(0, 64),
            "rows": st.one_of(st.none(), st.integers(1, 64)),
            "dim": st.one_of(st.integers(1, 40), st.sampled_from([64, 150, 300])),
            "score": st.sampled_from(equations.SCORES),
            "long": st.booleans(),
            "groups": st.one_of(st.none(), st.integers(1, 4)),
            "num_negatives": st.one_of(st.none(), st.integers(1, 80)),
            "seed": st.integers(0, 2**63 - 1),
        }
        return {name: draw(choice) for name, choice in choices.items()}

    @classmethod
    def damaged(cls, number: int, g: torch.Generator, device: str) -> Damaged:
        rows = 1 + number % 40
        case = cls.made(1 + number % 50, rows, 1 + number % 9, equations.SCORES[number % 2], number, device=device,
                        long=number % 3 > 0, num_negatives=None if number % 4 else 3)
        positive, said = wrong_entry(case.positive, [rows] * case.positive.numel(), g)
        return Damaged(case, "positive", replace(case, positive=positive), said)

    @classmethod
    def poisoned(cls, number: int, g: torch.Generator, device: str) -> Poisoned:
        """A NaN in a row of x or y shows in every loss whose sums hold that row, and in no other; in weight, in all losses.
        It shows in its own gradient too."""
        pick = chooser(g)
        pairs, rows = (int(torch.randint(1, most, (), generator=g)) for most in (40, 30))
        case = cls.made(pairs, pick(None, rows, rows), 1 + number % 33, pick(*equations.SCORES), number, device=device,
                        num_negatives=pick(None, 1, 2, 5), seed=number, groups=pick(None, None, 3))
        name = pick(*case.floats())
        poisoned = getattr(case, name).clone()
        row = int(torch.randint(poisoned.shape[0], (), generator=g))
        poisoned[row, pick(slice(None), *range(poisoned.shape[1]))] = torch.nan
        every = torch.ones(pairs, dtype=torch.bool, device=device)
        held = (every, every) if name == "weight" else case.holds(name, row)
        shown = dict(zip(("side_y", "side_x"), held, strict=True))
        kept = {side: ~mask for side, mask in shown.items()}
        if held[0].any() or held[1].any():
            own = torch.arange(len(poisoned), device=device) == row
            shown[f"grad_{name}"] = torch.ones_like(own) if name == "weight" else own
        return Poisoned(case, replace(case, **{name: poisoned}), torch.nan, f"row {row} of {name}", kept, shown)

    def holds(self, name: str, row: int) -> tuple[Tensor, Tensor]:
        """(P,) bool each: whether the sum over rows of y, and over rows of x, of each pair holds this row of x or y."""
        positive = torch.arange(len(self.x), device=self.x.device) if self.positive is None else self.positive.long()
        own = torch.arange(len(self.x), device=positive.device) == row if name == "x" else positive == row
        if self.num_negatives is None:
            if name == "x":
                return own, own | (positive != positive[row])
            return torch.ones_like(own), own
        over_y, over_x, found_y, found_x = equations.draw_negatives(positive, len(self.y), self.num_negatives, self.seed)
        if name == "x":
            return own, own | ((over_x == row).any(1) & found_x)
        return own | ((over_y == row).any(1) & found_y), own

    def registered(self, runs: str):
        tensors, kernels = (self.x, self.y, self.weight, self.positive, self.sizes), self.kernels()
        numbers = (self.num_negatives, *self.seeds(), self.score, True)
        yield kernels._forward_op, (runs, *tensors, *numbers)
        saved = kernels._forward_op(runs, *tensors, *numbers)[3]
        yield kernels._backward_op, (runs, self.grad_y, self.grad_x, *tensors, saved, *numbers)


BASE = BilinearMIM.BASE = BilinearMIM.made(6, 4)
BilinearMIM.WRONG = [
    ("x ", {"x": BASE.x[0]}, ValueError),
    ("x ", {"x": BASE.x.int()}, TypeError),
    ("x ", {"x": BASE.x.to(torch.float8_e4m3fn)}, TypeError),
    ("x ", {"x": BASE.x[:, :0], "y": BASE.y[:, :0], "weight": BASE.weight[:0, :0]}, ValueError),
    ("y ", {"y": BASE.y[:, 1:]}, ValueError),
    ("y ", {"y": BASE.y[0]}, ValueError),
    ("y ", {"y": BASE.y.double()}, TypeError),
    ("y ", {"y": BASE.y.to("meta")}, ValueError),
    ("weight ", {"weight": BASE.weight[1:]}, ValueError),
    ("weight ", {"weight": BASE.weight[:, 1:]}, ValueError),
    ("weight ", {"weight": BASE.weight.double()}, TypeError),
    ("weight ", {"weight": BASE.weight.to("meta")}, ValueError),
    ("weight ", {"weight": None}, ValueError),
    ("weight ", {"score": DOT}, ValueError),
    ("score ", {"score": "cosine"}, ValueError),
    ("positive ", {"positive": None}, ValueError),
    ("positive ", {"positive": BASE.positive[1:]}, ValueError),
    ("positive ", {"positive": BASE.positive.unsqueeze(1)}, ValueError),
    ("positive ", {"positive": BASE.positive.float()}, TypeError),
    ("positive ", {"positive": BASE.positive.short()}, TypeError),
    ("positive ", {"positive": BASE.positive.to("meta")}, ValueError),
    ("positive ", {"positive": BASE.positive + 4}, IndexError),
    ("positive ", {"positive": BASE.positive - 4, "score": DOT, "weight": None}, IndexError),
    ("positive ", {"y": BASE.y[:0]}, IndexError),
    ("positive holds 99 at place 3; it must be in [0, 4)",
     {"positive": BASE.positive.where(torch.arange(6) != 3, 99)}, IndexError),
    ("num_negatives ", {"num_negatives": 0}, ValueError),
    ("num_negatives ", {"num_negatives": -1}, ValueError),
    ("num_negatives ", {"num_negatives": 2**31}, ValueError),
    ("num_negatives ", {"num_negatives": 2.0}, TypeError),
    ("num_negatives ", {"num_negatives": True}, TypeError),
    ("reduction ", {"reduction": "max"}, ValueError),
    ("sizes ", {"sizes": torch.tensor([1, 2], dtype=torch.int32)}, TypeError),
    ("sizes ", {"sizes": torch.tensor([1])}, ValueError),
    ("sizes ", {"sizes": torch.tensor([1, 2], device="meta")}, ValueError),
    ("sizes holds 7 and 2; there are 6 pairs and 4 rows", {"sizes": torch.tensor([7, 2])}, IndexError),
    ("sizes holds 6 and -1", {"sizes": torch.tensor([6, -1])}, IndexError),
    *WRONG_SEEDS,
]
