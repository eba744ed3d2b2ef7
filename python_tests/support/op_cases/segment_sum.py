"""case_fast.ops.segment_sum: random calls, and what is particular to checking them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from op_case import POISON, Case, Damaged, Poisoned, generator, others, strided, wrong_entry
from torch import Tensor

from case_fast import ops
from case_fast.ops import reference

SHAPES = [  # rows, size, dims, the rest
    (1, 1, (1,), {}), (7, 3, (2,), {}), (7, 3, (), {}), (0, 4, (3,), {}), (0, 0, (2,), {}), (5, 9, (4,), {"sorted": True}),
    (13, 2, (3, 2), {}), (11, 5, (1, 1), {}), (6, 6, (17,), {}), (4, 1, (33,), {}), (9, 4, (0,), {}),
    (20, 30, (), {"sorted": True}), (2, 2, (300,), {"long": True}), (19, 4, (5,), {"layout": 1}), (8, 3, (2, 3), {"layout": 5}),
    (15, 15, (2,), {"sorted": True, "long": True}), (3, 50, (7,), {}), (31, 1, (), {"long": True}), (1, 8, (129,), {}),
    (10, 2, (16,), {"sorted": True, "layout": 1}), (25, 6, (2, 1, 2), {}), (64, 7, (), {"sorted": True, "layout": 1}),
]
CALLS = [{"rows": 9, "size": 4, "dims": (5,)}, {"rows": 30, "size": 11, "dims": (7,)}, {"rows": 41, "size": 3, "dims": (8,)}]


@dataclass(frozen=True)
class SegmentSum(Case):
    """``few`` 0: the kernel, however small the call."""

    x: Tensor
    segment: Tensor
    size: int
    grad_out: Tensor
    few: int = 0

    family = "segment_sum"
    op = staticmethod(ops.segment_sum)
    FLOATS = ("x",)
    LINEAR = True

    SMALL = [{"rows": 31, "size": 7, "dims": (6,)}, {"rows": 12, "size": 20, "dims": (2, 3)}]
    OPCHECK = [
        {"rows": 9, "size": 4, "dims": (5,)},
        {"rows": 9, "size": 4, "dims": ()},
        {"rows": 9, "size": 14, "dims": (3, 2), "long": True},
        {"rows": 0, "size": 4, "dims": (3,)},
        {"rows": 0, "size": 0, "dims": (3,)},
        {"rows": 9, "size": 4, "dims": (5,), "dtype": torch.float64},
        {"rows": 9, "size": 4, "dims": (5,), "dtype": torch.bfloat16},
        {"rows": 9, "size": 4, "dims": (5,), "layout": 1},
        {"rows": 9, "size": 4, "dims": (5,), "layout": 5},
    ]
    GRADCHECK = [
        {"rows": rows, "size": size, "dims": dims, "number": place} | more
        for place, (rows, size, dims, more) in enumerate(SHAPES)
    ]
    VARIED = [  # in order and not, one thread and several, by columns and by segments, narrow rows, strides, empty segments
        {"rows": 754, "size": 430, "dims": (300,), "sorted": True},
        {"rows": 1381, "size": 569, "dims": (300,)},
        {"rows": 713, "size": 16, "dims": (300,), "sorted": True, "long": True},
        {"rows": 2000, "size": 3, "dims": (129,), "layout": 1},
        {"rows": 900, "size": 4000, "dims": (31, 5), "layout": 5},
        {"rows": 40000, "size": 300, "dims": (1,)},
        {"rows": 40000, "size": 300, "dims": (), "layout": 1},
        {"rows": 5, "size": 2, "dims": (20000,)},
        {"rows": 0, "size": 70, "dims": (8,)},
        {"rows": 500, "size": 90, "dims": (70,), "dtype": torch.float64, "long": True},
        {"rows": 500, "size": 90, "dims": (70,), "dtype": torch.bfloat16},
    ]
    AVERAGE = [({"rows": 300, "size": 5, "dims": (20,)}, 20, 1.0001, 1.0001)]
    DRAWN = []
    STATUSES = [(13, "segment")]
    COMPILED = [
        ("native", "inductor", None, CALLS),
        ("native", "aot_eager", True, CALLS),
        ("reference", "aot_eager", True, CALLS),
    ]

    ON_GPU = {
        "texts": {"rows": 754, "size": 430, "dims": (300,), "sorted": True},
        "knowledge": {"rows": 713, "size": 16, "dims": (300,), "sorted": True, "long": True},
        "words of a loss": {"rows": 233, "size": 16, "dims": (), "sorted": True},
        "prime sizes": {"rows": 997, "size": 101, "dims": (13,)},
        "two dimensions": {"rows": 301, "size": 40, "dims": (3, 75), "layout": 5},
        "one row": {"rows": 1, "size": 1, "dims": (1,)},
        "no rows": {"rows": 0, "size": 5, "dims": (8,)},
        "no segments": {"rows": 0, "size": 0, "dims": (8,)},
        "large": {"rows": 60000, "size": 20011, "dims": (150,), "long": True},
    }

    @classmethod
    def made(cls, rows: int, size: int, dims: tuple[int, ...] = (5,), number: int = 0, dtype: torch.dtype = torch.float32,
             device: str = "cpu", magnitude: float = 1.0, layout: int = 0, sorted: bool = False, long: bool = False,
             few: int = 0) -> SegmentSum:
        """dims: of a row. sorted: segments lie end to end. long: they are named in int64."""
        g = generator(number)
        segment = torch.randint(max(size, 1), (rows if size else 0,), generator=g)
        segment = segment.sort().values if sorted else segment

        def normal(count: int, place: int) -> Tensor:
            x = (torch.randn(count, *dims, generator=g, dtype=torch.float64) * magnitude).to(dtype)
            return strided(x, layout and layout + place).to(device)

        segment = strided(segment if long else segment.int(), layout).to(device)
        return cls(normal(segment.numel(), 0), segment, size, normal(size, 1), few)

    @classmethod
    def native_calls(cls) -> tuple[str, ...]:
        """The gradient is a gather of torch's own."""
        return ("segment_sum_forward",)

    @classmethod
    def plain(cls, few: int, **arguments: object) -> Tensor:
        return reference.segment_sum(**arguments)

    @classmethod
    def recipe(cls, draw, st) -> dict:
        width = st.one_of(st.integers(0, 20), st.sampled_from([33, 64, 127, 300]))
        return {
            "rows": draw(st.one_of(st.integers(0, 40), st.integers(0, 400))),
            "size": draw(st.one_of(st.integers(0, 4), st.integers(0, 300))),
            "dims": draw(st.one_of(st.just(()), st.tuples(width), st.tuples(st.integers(1, 4), st.integers(1, 30)))),
            "sorted": draw(st.booleans()),
            "long": draw(st.booleans()),
        }

    @classmethod
    def damaged(cls, number: int, g: torch.Generator, device: str) -> Damaged:
        size = 1 + number % 37
        case = cls.made(1 + number % 150, size, (1 + number % 9,)[: number % 4], number, device=device, long=number % 2 == 1)
        segment, said = wrong_entry(case.segment, [size] * case.segment.numel(), g)
        return Damaged(case, "segment", replace(case, segment=segment), said)

    @classmethod
    def poisoned(cls, number: int, g: torch.Generator, device: str) -> Poisoned:
        """Some rows of one segment, or the gradient of its sum."""
        size = 2 + number % 20
        case = cls.made(2 + number % 90, size, (1 + number % 40,), number, device=device, sorted=number % 3 == 0)
        chosen = int(case.segment[int(torch.randint(case.segment.numel(), (), generator=g))])
        mine, poison = case.segment == chosen, POISON[number % 3]
        kept = {"out": others(size, slice(chosen, chosen + 1), device), "grad_x": ~mine}
        if number % 2:
            grad_out = case.grad_out.clone()
            grad_out[chosen] = poison
            return Poisoned(case, replace(case, grad_out=grad_out), poison, f"the gradient of segment {chosen}", kept,
                            {"grad_x": mine})
        x = case.x.clone()
        x[mine.nonzero()[0]] = poison
        return Poisoned(case, replace(case, x=x), poison, f"a row of segment {chosen}", kept, {"out": ~kept["out"]})

    def registered(self, runs: str):
        kernels = self.kernels()
        yield kernels._forward_op, (runs, self.x, self.segment, self.size)
        yield kernels._backward_op, (runs, self.grad_out, self.segment)


BASE = SegmentSum.BASE = SegmentSum.made(20, 6, (5,))
SegmentSum.WRONG = [
    ("x must be (n, ...)", {"x": BASE.x[0, 0]}, ValueError),
    ("x must be float32", {"x": BASE.x.int()}, TypeError),
    ("x must be float32", {"x": BASE.x.to(torch.float8_e4m3fn)}, TypeError),
    ("segment must be (n,)", {"x": BASE.x[1:]}, ValueError),
    ("segment must be (n,)", {"segment": BASE.segment[1:]}, ValueError),
    ("segment must be int32", {"segment": BASE.segment.float()}, TypeError),
    ("segment must be int32", {"segment": BASE.segment.short()}, TypeError),
    ("segment must have one dimension", {"segment": BASE.segment[:, None]}, ValueError),
    ("segment must be on cpu", {"segment": BASE.segment.to("meta")}, ValueError),
    ("segment holds", {"segment": BASE.segment + 6}, IndexError),
    ("segment holds", {"segment": BASE.segment - 6}, IndexError),
    ("segment holds", {"segment": BASE.segment + 6, "few": 1 << 15}, IndexError),
    ("segment names", {"size": 0}, IndexError),
    ("size must be at least 0", {"size": -1}, ValueError),
    ("size must be a whole number", {"size": 6.0}, TypeError),
    ("size must be a whole number", {"size": True}, TypeError),
]
