"""case_fast.ops.residual_norm: random calls, and what is particular to checking them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from op_case import POISON, WRONG_SEEDS, Case, Poisoned, generator, others, strided
from torch import Tensor

from case_fast import ops
from case_fast.ops import reference

SHAPES = [  # rows, width, what is added
    (1, 1, True), (3, 1, False), (2, 2, True), (7, 3, True), (0, 5, True), (0, 4, False), (5, 7, True), (4, 8, False),
    (3, 9, True), (6, 17, True), (2, 33, False), (1, 40, True), (11, 5, True), (17, 4, True), (19, 2, False), (34, 3, True),
    (5, 16, True), (2, 64, True), (13, 1, True), (3, 31, False), (8, 10, True),
]
CALLS = [{"rows": rows, "width": 9, "dropout_p": 0.3, "seed": seed} for rows, seed in [(8, 3), (30, 4), (41, 5)]]


@dataclass(frozen=True)
class ResidualNorm(Case):
    x: Tensor
    update: Tensor | None
    weight: Tensor
    bias: Tensor
    grad_total: Tensor
    grad_normed: Tensor
    eps: float = 1e-5
    dropout_p: float = 0.0
    seed: int | Tensor = 0

    family = "residual_norm"
    op = staticmethod(ops.residual_norm)
    plain = staticmethod(reference.residual_norm)
    FLOATS = ("x", "update", "weight", "bias")
    OUTPUTS = ("total", "normed")
    GRADIENTS = {"total": "grad_total", "normed": "grad_normed"}

    SMALL = [{"rows": 31, "width": 6, "updates": False}, {"rows": 12, "width": 37, "dropout_p": 0.3, "seed": 3}]
    OPCHECK = [
        {"rows": 9, "width": 5},
        {"rows": 9, "width": 5, "updates": False},
        {"rows": 9, "width": 20, "dropout_p": 0.3, "seed": 5},
        {"rows": 0, "width": 3},
        {"rows": 9, "width": 5, "dtype": torch.float64, "dropout_p": 0.3, "seed": 5},
        {"rows": 9, "width": 5, "layout": 1},
        {"rows": 9, "width": 5, "layout": 2, "dropout_p": 0.3, "seed": 5},
    ]
    GRADCHECK = [  # eps above the variance of rows: of one or two columns they would all be normalised to the same, sharply
        {"rows": rows, "width": width, "updates": updates, "number": place, "eps": 0.1}
        | ({"dropout_p": 0.3, "seed": 2**40 + place} if place % 3 == 0 else {})
        for place, (rows, width, updates) in enumerate(SHAPES)
    ]
    VARIED = [  # one block of rows and many, one thread and several, every end of a row, with and without all that may be absent
        {"rows": 750, "width": 300, "dropout_p": 0.1, "seed": 2**40 + 1},
        {"rows": 750, "width": 300},
        {"rows": 750, "width": 300, "updates": False},
        {"rows": 16, "width": 300, "dropout_p": 0.2, "seed": 5},
        {"rows": 53, "width": 257, "dropout_p": 0.5, "seed": 7, "layout": 1},
        {"rows": 1201, "width": 17, "dropout_p": 0.3, "seed": 8, "layout": 2},
        {"rows": 9001, "width": 1, "eps": 0.1},
        {"rows": 40000, "width": 3, "dropout_p": 0.4, "seed": 9},
        {"rows": 2, "width": 20000, "dropout_p": 0.4, "seed": 10},
        {"rows": 0, "width": 8},
        {"rows": 200, "width": 131, "dropout_p": 0.2, "seed": 11, "dtype": torch.float64},
        {"rows": 200, "width": 131, "dropout_p": 0.2, "seed": 12, "dtype": torch.bfloat16},
    ]
    AVERAGE = [({"rows": 200, "width": 300}, 20, 1.2, 1.1)]
    DRAWN = [{"rows": 57, "width": 101, "dropout_p": 0.4}]
    STATUSES = []  # no argument's contents can be wrong
    COMPILED = [
        ("native", "inductor", None, CALLS),
        ("native", "aot_eager", True, CALLS),
        ("reference", "aot_eager", True, [call | {"dropout_p": 0.0} for call in CALLS]),  # tracing the draws backward takes long
        ("reference", "eager", True, CALLS),
    ]

    ON_GPU = {
        "texts": {"rows": 754, "width": 300},
        "nothing added": {"rows": 713, "width": 300, "updates": False},
        "replies": {"rows": 233, "width": 300},
        "prime sizes": {"rows": 997, "width": 131},
        "any strides": {"rows": 301, "width": 75, "layout": 5},
        "one of all": {"rows": 1, "width": 1, "eps": 0.1},
        "no rows": {"rows": 0, "width": 8},
        "wide": {"rows": 40, "width": 1024},
        "many rows": {"rows": 60000, "width": 96},
    }
    VARIANTS = [{}, {"dropout_p": 0.2, "seed": 2**40 + 3}]

    @classmethod
    def made(cls, rows: int, width: int, number: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu",
             magnitude: float = 1.0, layout: int = 0, updates: bool = True, **more: object) -> ResidualNorm:
        """updates: whether anything is added."""
        g = generator(number)

        def normal(*shape: int, scale: float = 1.0, by: int = 0) -> Tensor:
            x = (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)
            return strided(x, layout and layout + by).to(device)

        x, update, grad_total, grad_normed = (normal(rows, width, scale=magnitude, by=place) for place in range(4))
        weight, bias = normal(width, scale=0.2) + 1, normal(width)
        return cls(x, update if updates else None, weight, bias, grad_total, grad_normed, **more)

    @classmethod
    def recipe(cls, draw, st) -> dict:
        return {
            "rows": draw(st.one_of(st.integers(0, 40), st.integers(0, 400))),
            "width": draw(st.one_of(st.integers(3, 70), st.sampled_from([127, 128, 129, 300, 513]))),
            "updates": draw(st.booleans()),
            "dropout_p": draw(st.sampled_from([0.0, 0.1, 0.5])),
            "seed": draw(st.integers(0, 2**63 - 1)),
            "eps": draw(st.sampled_from([1e-5, 1e-2])),
        }

    @classmethod
    def poisoned(cls, number: int, g: torch.Generator, device: str) -> Poisoned:
        """One row of x, of what is added, or of a gradient."""
        rows, name = 2 + number % 90, ("x", "update", "grad_total", "grad_normed")[number % 4]
        case = cls.made(rows, 2 + number % 40, number, device=device, dropout_p=0.2 * (number % 3), seed=number)
        row, poison = int(torch.randint(rows, (), generator=g)), POISON[number % 3]
        spoiled = getattr(case, name).clone()
        spoiled[row] = poison
        kept = dict.fromkeys(("total", "normed", "grad_x", "grad_update"), others(rows, slice(row, row + 1), device))
        dropping = case.dropout_p > 0  # then what is not finite is dropped here and there, as NaN
        shows = ("grad_x", "grad_update")[: 1 + (poison != poison or not dropping)]
        shows = shows if name.startswith("grad") else ("total", "normed", *shows)
        return Poisoned(case, replace(case, **{name: spoiled}), poison, f"row {row} of {name}", kept,
                        {name: ~kept[name] for name in shows})

    def registered(self, runs: str):
        kernels, draws = self.kernels(), (self.dropout_p, *self.seeds())
        yield kernels._forward_op, (runs, self.x, self.update, self.weight, self.bias, self.eps, *draws)
        total, _, stats = kernels._forward(runs, self.x, self.update, self.weight, self.bias, self.eps, *draws)
        total = self.x if self.update is None else total
        for grad_total in (self.grad_total, None):
            yield kernels._backward_op, (runs, grad_total, self.grad_normed, total, stats, self.weight, *draws)
        for base in (self.x, None):
            yield kernels._drop_op, (runs, self.grad_total, base, *draws)


BASE = ResidualNorm.BASE = ResidualNorm.made(20, 5)
ResidualNorm.WRONG = [
    ("x must be (n, d)", {"x": BASE.x[0]}, ValueError),
    ("x must be (n, d)", {"x": BASE.x[:, :0]}, ValueError),
    ("x must be float32", {"x": BASE.x.int()}, TypeError),
    ("x must be float32", {"x": BASE.x.to(torch.float8_e4m3fn)}, TypeError),
    ("update must be (20, 5)", {"update": BASE.update[1:]}, ValueError),
    ("update must be (20, 5)", {"update": BASE.update[:, 1:]}, ValueError),
    ("update must be torch.float32", {"update": BASE.update.double()}, TypeError),
    ("update must be on cpu", {"update": BASE.update.to("meta")}, ValueError),
    ("weight must be (d,)", {"weight": BASE.weight[1:]}, ValueError),
    ("weight must be (d,)", {"weight": BASE.x}, ValueError),
    ("weight must be torch.float32", {"weight": BASE.weight.double()}, TypeError),
    ("weight must be on cpu", {"weight": BASE.weight.to("meta")}, ValueError),
    ("bias must be (d,)", {"bias": BASE.bias[1:]}, ValueError),
    ("bias must be torch.float32", {"bias": BASE.bias.half()}, TypeError),
    ("eps must be", {"eps": -1.0}, ValueError),
    ("eps must be", {"eps": float("nan")}, ValueError),
    ("dropout_p must be in [0, 1)", {"dropout_p": 1.0}, ValueError),
    ("dropout_p must be in [0, 1)", {"dropout_p": -0.1}, ValueError),
    *WRONG_SEEDS,
]
