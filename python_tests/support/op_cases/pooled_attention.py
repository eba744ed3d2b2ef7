"""case_fast.ops.pooled_attention: random calls, and what is particular to checking them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from op_case import (
    POISON,
    WRONG_SEEDS,
    Case,
    Damaged,
    Poisoned,
    generator,
    offsets,
    others,
    ragged,
    spoiled,
    strided,
    wrong_entry,
)
from torch import Tensor

from case_fast import ops
from case_fast.ops import reference

SHAPES = [  # rows, heads, dim, the rest
    ([1], 1, 1, {}), ([1], 2, 3, {}), ([3], 1, 2, {}), ([2, 3], 2, 2, {}), ([5, 1], 5, 3, {}), ([0, 4, 3], 1, 3, {}),
    ([0], 2, 3, {}), ([], 1, 2, {}), ([0, 0], 2, 2, {}), ([7, 1, 3], 1, 2, {}), ([13], 1, 1, {}), ([1, 2, 3, 4], 3, 1, {}),
    ([6], 1, 17, {}), ([3], 2, 33, {}), ([9, 1], 2, 2, {"scale": 0.0}), ([4, 3], 2, 3, {"scale": 1.5}),
    ([2, 2, 2], 1, 5, {"layout": 1}), ([17], 2, 2, {"layout": 2}),
    ([1, 1, 1, 1], 2, 3, {"layout": 4, "long": True}), ([19, 0, 5], 2, 3, {"layout": 5}),
]
CALLS = [{"rows": rows, "dropout_p": 0.1, "seed": seed} for rows, seed in [([5, 6, 0], 3), ([2, 2], 4), ([1, 0, 40], 5)]]


def varied() -> list[dict]:
    """The last three are those of the paper's batch: knowledge texts, reactions in context, replies."""
    g = generator(17)
    texts, reactions, replies = (ragged(g, count, 2 * mean) for count, mean in ((430, 6), (32, 43), (16, 16)))
    return [
        {"rows": [3, 7, 0, 1]},
        {"rows": [300, 1], "dim": 150},
        {"rows": [2000], "dim": 33, "heads": 1},
        {"rows": [40] * 30 + [900] + [2] * 30, "dim": 64, "heads": 5},
        {"rows": [0, 0]},
        {"rows": [30, 5, 90], "dtype": torch.float64, "long": True, "layout": 1},
        {"rows": [30, 5, 90], "dim": 301, "layout": 4},
        {"rows": texts, "dim": 300, "dropout_p": 0.2, "seed": 3},
        {"rows": texts, "dim": 300},
        {"rows": reactions, "dim": 300},
        {"rows": replies, "dim": 300},
    ]


@dataclass(frozen=True)
class PooledAttention(Case):
    query: Tensor
    rows: Tensor
    cu: Tensor
    grad_out: Tensor
    scale: float = 0.4
    dropout_p: float = 0.0
    seed: int | Tensor = 0

    family = "pooled_attention"
    op = staticmethod(ops.pooled_attention)
    plain = staticmethod(reference.pooled_attention)
    FLOATS = ("query", "rows")

    SMALL = [{"rows": [20, 7]}, {"rows": [3, 0, 4], "heads": 3}]
    OPCHECK = [
        {"rows": [3, 5]},
        {"rows": [1, 0, 5], "dropout_p": 0.3, "seed": 5},
        {"rows": [0, 0]},
        {"rows": []},
        {"rows": [5, 9], "heads": 1, "dim": 3, "long": True},
        {"rows": [6, 4], "dtype": torch.float64},
        {"rows": [6, 4], "layout": 1},
        {"rows": [6, 4], "layout": 4},
    ]
    GRADCHECK = [
        {"rows": rows, "heads": heads, "dim": dim, "number": place, "dropout_p": 0.3 * (place % 3 == 2), "seed": 2**40 + place,
         **more} for place, (rows, heads, dim, more) in enumerate(SHAPES)
    ]
    VARIED = varied()
    AVERAGE = [  # weights recomputed from one rounded number a head cost up to twice where scores are in the tens
        ({"rows": [5, 6, 7, 1] * 20, "dim": 300, "scale": 150**-0.5}, 20, 1.3, 1.3),
        ({"rows": [100, 70], "dim": 150, "scale": 0.1}, 20, 1.3, 1.3),
        ({"rows": [30, 17], "dim": 16, "scale": 0.25, "magnitude": 3.0}, 20, 1.3, 2.0),
    ]
    DRAWN = [{"rows": [12, 50, 3], "dropout_p": 0.4}]
    STATUSES = [(14, "cu")]
    COMPILED = [("native", "aot_eager", True, CALLS), ("reference", "aot_eager", True, CALLS)]

    ON_GPU = {
        "knowledge texts": {"rows": [5, 6, 4, 8, 5] * 86, "dim": 300},
        "reactions in context": {"rows": [70, 31, 84, 12] * 8, "dim": 300},
        "replies": {"rows": [16, 9, 23, 12] * 4, "dim": 300},
        "prime sizes": {"rows": [11, 3, 0, 5, 67], "heads": 3, "dim": 13},
        "one head": {"rows": [40, 1, 0, 200], "heads": 1, "dim": 150},
        "wide rows": {"rows": [5, 40], "heads": 2, "dim": 1024},
        "rows apart": {"rows": [9, 40], "layout": 1, "dim": 10},
        "heads first": {"rows": [9, 40], "layout": 4, "dim": 10},
        "any strides": {"rows": [9, 40], "layout": 2, "dim": 10},
        "no rows": {"rows": [0, 0]},
        "no sequences": {"rows": []},
        "one row": {"rows": [1], "heads": 1, "dim": 1},
        "many sequences": {"rows": [3, 0, 17, 6] * 500, "dim": 32, "long": True},
    }
    VARIANTS = [{}, {"dropout_p": 0.2, "seed": 2**40 + 3}]

    @classmethod
    def made(cls, rows: list[int], heads: int = 2, dim: int = 5, number: int = 0, dtype: torch.dtype = torch.float32,
             device: str = "cpu", magnitude: float = 1.0, layout: int = 0, long: bool = False, **more: object) -> PooledAttention:
        """Sequences of so many ``rows``. long: cu is int64. layout 4: heads lie one after the other."""
        g = generator(number)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * magnitude).to(dtype)

        floats = (normal(len(rows), heads, dim), normal(sum(rows), dim), normal(len(rows), heads, dim))
        floats = [strided(x, layout and layout + place).to(device) for place, x in enumerate(floats)]
        return cls(*floats[:2], offsets(rows, long, layout, device), floats[2], **more)

    @classmethod
    def recipe(cls, draw, st) -> dict:
        length = st.one_of(st.integers(0, 6), st.integers(0, 40))
        choices = {
            "rows": st.lists(length, max_size=12),
            "heads": st.integers(1, 5),
            "dim": st.one_of(st.integers(1, 40), st.sampled_from([150, 300])),
            "long": st.booleans(),
            "dropout_p": st.sampled_from([0.0, 0.0, 0.1, 0.5]),
            "seed": st.integers(0, 2**63 - 1),
        }
        found = {name: draw(choice) for name, choice in choices.items()}
        size = found["dim"] ** -0.5
        return found | {"scale": draw(st.sampled_from([0.0, 0.5 * size, size, 1.5 * size]))}

    @classmethod
    def damaged(cls, number: int, g: torch.Generator, device: str) -> Damaged:
        rows = ragged(g, 1 + number % 7, 9)
        case = cls.made(rows, 1 + number % 3, 1 + number % 9, number, device=device, long=number % 2 == 1)
        cu, said = wrong_entry(case.cu, [sum(rows) + 1] * (len(rows) + 1), g)
        return Damaged(case, "cu", replace(case, cu=cu), said)

    @classmethod
    def poisoned(cls, number: int, g: torch.Generator, device: str) -> Poisoned:
        """One sequence's query, rows or gradient."""
        rows = ragged(g, 2 + number % 6, 12)
        case = cls.made(rows, 1 + number % 3, 3 + number % 20, number, device=device, dropout_p=0.2 * (number % 2), seed=number)
        victim = int(torch.randint(len(rows), (), generator=g))
        own, rows_of_it = slice(victim, victim + 1), slice(int(case.cu[victim]), int(case.cu[victim + 1]))
        name = ("query", "rows", "grad_out")[number % 3]
        broken = spoiled(getattr(case, name), rows_of_it if name == "rows" else own, number)
        mask, mask_of_rows = others(len(rows), own, device), others(sum(rows), rows_of_it, device)
        kept = {"out": mask, "grad_query": mask, "grad_rows": mask_of_rows}
        shown = {}
        if name == "rows" and number % 5 and number % 2 == 0 and rows[victim]:
            shown = {"out": ~mask}
        return Poisoned(case, replace(case, **{name: broken}), POISON[number % 3], f"sequence {victim} of {name}", kept, shown)

    def registered(self, runs: str):
        numbers, kernels = (self.scale, self.dropout_p, *self.seeds()), self.kernels()
        yield kernels._forward_op, (runs, self.query, self.rows, self.cu, *numbers)
        out, lse = kernels._forward_op(runs, self.query, self.rows, self.cu, *numbers)
        yield kernels._backward_op, (runs, self.grad_out, self.query, self.rows, self.cu, out, lse, *numbers)


BASE = PooledAttention.BASE = PooledAttention.made([3, 5, 1])
PooledAttention.WRONG = [
    ("query must be (s, H, d)", {"query": BASE.query[0]}, ValueError),
    ("query must be (s, H, d)", {"query": BASE.query[:, :0]}, ValueError),
    ("query must be (s, H, d)", {"query": BASE.query[:, :, :0], "rows": BASE.rows[:, :0]}, ValueError),
    ("query must be float32", {"query": BASE.query.int()}, TypeError),
    ("rows must be (T, 5)", {"rows": BASE.rows[0]}, ValueError),
    ("rows must be (T, 5)", {"rows": BASE.rows[:, :4]}, ValueError),
    ("rows must be torch.float32", {"rows": BASE.rows.double()}, TypeError),
    ("rows must be on cpu", {"rows": BASE.rows.to("meta")}, ValueError),
    ("cu must be int32", {"cu": BASE.cu.float()}, TypeError),
    ("cu must have one dimension", {"cu": BASE.cu[:, None]}, ValueError),
    ("cu must be on cpu", {"cu": BASE.cu.to("meta")}, ValueError),
    ("cu must be (4,)", {"cu": BASE.cu[:3]}, ValueError),
    ("cu must be (4,)", {"cu": BASE.cu[:0]}, ValueError),
    ("cu starts", {"cu": BASE.cu + 1}, IndexError),
    ("cu falls", {"cu": torch.tensor([0, 7, 6, 9])}, IndexError),
    ("cu ends", {"rows": BASE.rows[1:]}, IndexError),
    ("scale", {"scale": -0.1}, ValueError),
    ("scale", {"scale": float("nan")}, ValueError),
    ("dropout_p", {"dropout_p": 1.0}, ValueError),
    ("dropout_p", {"dropout_p": float("nan")}, ValueError),
    *WRONG_SEEDS,
]
