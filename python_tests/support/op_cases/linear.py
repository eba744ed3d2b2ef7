"""case_fast.ops.linear: random calls, and what is particular to checking them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from op_case import POISON, Case, Poisoned, chooser, generator, others, strided
from torch import Tensor

from case_fast import ops
from case_fast.ops import reference

SHAPES = [  # rows, depth, outputs, the rest
    (1, 1, 1, {}), (3, 2, 4, {}), (5, 7, 3, {"bias": False}), (0, 3, 2, {}), (2, 0, 3, {}), (4, 3, 0, {}), (13, 5, 1, {}),
    (2, 17, 9, {}), (7, 3, 33, {}), (3, 4, 2, {"second": 3}), (5, 2, 1, {"second": 4, "bias": False}), (4, 3, 2, {"groups": 2}),
    (2, 5, 3, {"groups": 3, "second": 2}), (3, 2, 5, {"groups": 1, "columns": True}), (6, 4, 3, {"columns": True}),
    (11, 3, 2, {"second": 5, "columns": True}), (3, 5, 4, {"layout": 1}), (4, 3, 5, {"layout": 2, "groups": 2}), (2, 33, 2, {}),
    (5, 3, 4, {"layout": 5, "second": 2}),
]
CALLS = [{"rows": 9, "depth": 5, "outputs": 4}, {"rows": 12, "depth": 6, "outputs": 7}, {"rows": 30, "depth": 8, "outputs": 20}]
ACTIVATIONS = reference.ACTIVATIONS


def of_weights(x: Tensor, weight: Tensor, second: Tensor | None, bias: Tensor | None, activation: str | None = None) -> Tensor:
    return ops.linear(x, weight if second is None else [weight, second], bias, activation)


def of_reference(x: Tensor, weight: Tensor, second: Tensor | None, bias: Tensor | None, activation: str | None = None) -> Tensor:
    return reference.linear(x, weight if second is None else [weight, second], bias, activation)


@dataclass(frozen=True)
class Linear(Case):
    """``second``: another weight, behind the first."""

    x: Tensor
    weight: Tensor
    second: Tensor | None
    bias: Tensor | None
    grad_out: Tensor
    activation: str | None = None

    family = "linear"
    op = staticmethod(of_weights)
    plain = staticmethod(of_reference)
    FLOATS = ("x", "weight", "second", "bias")

    SMALL = [
        {"rows": 9, "depth": 5, "outputs": 4},
        {"rows": 4, "depth": 6, "outputs": 3, "second": 2, "activation": "gelu"},
        {"rows": 5, "depth": 3, "outputs": 4, "groups": 2, "activation": "tanh", "bias": False, "columns": True},
    ]
    OPCHECK = [
        *({"rows": 9, "depth": 5, "outputs": 4, "activation": activation} for activation in ACTIVATIONS),
        {"rows": 9, "depth": 5, "outputs": 4, "second": 3, "activation": "gelu"},
        {"rows": 9, "depth": 5, "outputs": 4, "groups": 2, "columns": True},
        {"rows": 0, "depth": 5, "outputs": 4},
        {"rows": 9, "depth": 5, "outputs": 0, "bias": False},
        {"rows": 9, "depth": 5, "outputs": 4, "dtype": torch.float64},
        *({"rows": 9, "depth": 5, "outputs": 4, "layout": layout, "second": 2} for layout in (1, 2, 3)),
    ]
    GRADCHECK = [
        {"rows": rows, "depth": depth, "outputs": outputs, "number": place, "activation": activation, **more}
        for place, (rows, depth, outputs, more) in enumerate(SHAPES) for activation in (None, "gelu", "tanh")
    ]
    VARIED = [  # by rows of x and by rows of the weights; one piece of depth and several; groups; weights transposed or not
        {"rows": 250, "depth": 300, "outputs": 300},
        {"rows": 250, "depth": 300, "outputs": 300, "second": 600, "activation": "gelu"},
        {"rows": 1000, "depth": 300, "outputs": 300, "second": 40, "bias": False},
        {"rows": 700, "depth": 900, "outputs": 97, "activation": "relu"},
        {"rows": 31, "depth": 1301, "outputs": 130, "activation": "tanh"},
        {"rows": 16, "depth": 300, "outputs": 900, "columns": True},
        {"rows": 211, "depth": 150, "outputs": 300, "groups": 2, "columns": True},
        {"rows": 211, "depth": 300, "outputs": 150, "groups": 2, "layout": 1},
        {"rows": 1, "depth": 300, "outputs": 300},
        {"rows": 1381, "depth": 67, "outputs": 33, "dtype": torch.float64, "activation": "gelu"},
        {"rows": 0, "depth": 5, "outputs": 4},
        {"rows": 90, "depth": 61, "outputs": 70, "layout": 2},
    ]
    AVERAGE = [({"rows": 300, "depth": 300, "outputs": 70}, 10, 1.1, 1.4),
               ({"rows": 90, "depth": 1300, "outputs": 70, "activation": "gelu"}, 10, 1.1, 1.4)]
    DRAWN = []
    STATUSES = []
    COMPILED = [
        ("native", "inductor", None, CALLS),
        ("native", "aot_eager", True, [call | {"activation": "gelu", "second": 3} for call in CALLS]),
        ("reference", "aot_eager", True, CALLS),
    ]
    ON_GPU = {
        "query, key and value": {"rows": 750, "depth": 300, "outputs": 300, "second": 600, "bias": False},
        "wide": {"rows": 430, "depth": 300, "outputs": 600, "activation": "gelu"},
        "heads": {"rows": 211, "depth": 150, "outputs": 300, "groups": 2, "columns": True, "activation": "tanh"},
        "no rows": {"rows": 0, "depth": 5, "outputs": 4},
    }

    @classmethod
    def made(cls, rows: int, depth: int, outputs: int, number: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu",
             magnitude: float = 1.0, layout: int = 0, groups: int = 0, second: int | None = None, bias: bool = True,
             activation: str | None = None, columns: bool = False) -> Linear:
        """Results have about the size of ``magnitude``. groups: 0 is none. second: outputs of another weight. columns: weights
        are transposed views."""
        g = generator(number)
        of = (groups,) if groups else ()

        def normal(*shape: int, place: int, scale: float = 1.0) -> Tensor:
            x = (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)
            if columns and place in (1, 2):
                return x.mT.contiguous().to(device).mT
            return strided(x, layout and layout + place).to(device)

        scale, total = magnitude * max(depth, 1) ** -0.5, outputs + (second or 0)
        return cls(
            normal(rows, *of, depth, place=0),
            normal(*of, outputs, depth, place=1, scale=scale),
            None if second is None else normal(*of, second, depth, place=2, scale=scale),
            normal(*of, total, place=3, scale=magnitude) if bias else None,
            normal(rows, *of, total, place=4, scale=min(1.0, 8 * max(rows, 1) ** -0.5)),  # gradients sum over rows
            activation,
        )

    @classmethod
    def recipe(cls, draw, st) -> dict:
        width = st.one_of(st.integers(0, 20), st.integers(0, 70), st.sampled_from([127, 150, 300, 385]))
        return {
            "rows": draw(st.one_of(st.integers(0, 40), st.integers(0, 300))), "depth": draw(width), "outputs": draw(width),
            "groups": draw(st.integers(0, 3)), "second": draw(st.one_of(st.none(), st.integers(0, 50))),
            "bias": draw(st.booleans()), "activation": draw(st.sampled_from(ACTIVATIONS)), "columns": draw(st.booleans()),
        }

    @classmethod
    def poisoned(cls, number: int, g: torch.Generator, device: str) -> Poisoned:
        """A row of x, or of the gradient of its result."""
        pick, poison = chooser(g), POISON[number % 3]
        rows, activation = 2 + number % 50, pick(*ACTIVATIONS) if poison != poison else None  # relu and tanh hide an infinity
        case = cls.made(rows, pick(1, 5, 40), pick(1, 7, 40), number, device=device, groups=pick(0, 2),
                        second=pick(None, 3), activation=activation)
        row = number % rows
        apart, mine = others(rows, slice(row, row + 1), device), torch.zeros(rows, dtype=torch.bool, device=device)
        mine[row] = True
        every = {f"grad_{name}": torch.ones(x.shape[:1], dtype=torch.bool, device=device)
                 for name, x in case.floats().items() if name in ("weight", "second")}
        if number % 2:
            grad_out = case.grad_out.clone()
            grad_out[row] = poison
            kept = {"out": apart | mine, "grad_x": apart}
            shown = {"grad_x": mine, **every} if activation != "relu" else {}
            return Poisoned(case, replace(case, grad_out=grad_out), poison, f"the gradient of row {row}", kept, shown)
        x = case.x.clone()
        x[row] = poison
        return Poisoned(case, replace(case, x=x), poison, f"row {row}", {"out": apart, "grad_x": apart}, {"out": mine, **every})

    def registered(self, runs: str):
        kernels, weights = self.kernels(), [x for x in (self.weight, self.second) if x is not None]
        keep = torch.rand_like(self.grad_out) if self.activation else None
        wanted = [True, self.bias is not None, *[True] * len(weights)]
        yield kernels._forward_op, (runs, self.x, weights, self.bias, self.activation, True, False)
        yield kernels._backward_op, (runs, [self.grad_out], self.x, weights, keep, self.activation, wanted)
        if self.second is not None:
            yield kernels._forward_op, (runs, self.x, weights, self.bias, None, True, True)
            apart = [x.contiguous() for x in self.grad_out.split([x.shape[-2] for x in weights], -1)]
            yield kernels._backward_op, (runs, apart, self.x, weights, None, None, wanted)


BASE = Linear.BASE = Linear.made(7, 5, 4, second=3)
GROUPED = Linear.made(7, 5, 4, groups=2)
Linear.WRONG = [
    ("x must be (n, K)", {"x": BASE.x[0]}, ValueError),
    ("x must be (n, K)", {"x": BASE.x[None, None]}, ValueError),
    ("x must be float32", {"x": BASE.x.int()}, TypeError),
    ("weight must be torch.float32 as x", {"weight": BASE.weight.double(), "second": None}, TypeError),
    ("weight[1] must be torch.float32 as x", {"second": BASE.second.double()}, TypeError),
    ("weight[0] must be (N, 5) as x, not (4, 4)", {"weight": BASE.weight[:, 1:]}, ValueError),
    ("weight[1] must be (N, 5) as x, not (3,)", {"second": BASE.second[:, 0]}, ValueError),
    ("weight[0] must be (2, N, 5) as x, not (4, 5)", {"x": GROUPED.x}, ValueError),
    ("weight[0] must be (N, 5) as x, not (2, 4, 5)", {"weight": GROUPED.weight}, ValueError),
    ("weight[1] must be on cpu as x", {"second": BASE.second.to("meta")}, ValueError),
    ("bias must be (7,) as the outputs of weight, not (6,)", {"bias": BASE.bias[1:]}, ValueError),
    ("bias must be (2, 4) as the outputs", {"x": GROUPED.x, "weight": GROUPED.weight, "second": None}, ValueError),
    ("bias must be torch.float32 as x", {"bias": BASE.bias.double()}, TypeError),
    ("activation must be None, relu, gelu, tanh, not 'silu'", {"activation": "silu"}, ValueError),
]
