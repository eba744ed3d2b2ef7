"""The inputs of the segment_sum benchmarks: the rows that a model sums by segment, and their sums in float64."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import Case, Truth
from case_fast.errors import ConfigError
from case_fast.ops import reference

NAMED = {  # of real batches of 16 dialogues, the mean and the greatest
    "texts": "754x300:430", "knowledge": "713x300:16", "concepts": "666x300:16", "context": "1381x300:569:mixed",
    "words": "218x300:32", "targets": "233x1:16",
    "texts-most": "1014x300:668", "knowledge-most": "962x300:16", "concepts-most": "1286x300:16",
    "context-most": "4413x300:1167:mixed", "words-most": "381x300:55", "targets-most": "388x1:16",
}
SIZES = list(NAMED)
QUICK_SIZES = ["30x7:5", "30x1:5", "30x7:5:mixed"]
AXIS = "rows of 300"


@dataclass(frozen=True)
class SegmentCase(Case):
    """x (n, d), segment (n,) in [0, segments), grad_out (segments, d); without d where it is 1."""

    x: Tensor
    segment: Tensor
    grad_out: Tensor

    @property
    def segments(self) -> int:
        return self.grad_out.shape[0]

    @property
    def shape(self) -> dict[str, int]:
        return {"n": self.x.shape[0], "segments": self.segments, "d": self.x[0].numel()}

    @property
    def size(self) -> int | None:
        return self.x.shape[0] if self.x[0].numel() == 300 else None

    @property
    def least(self) -> tuple[tuple[float, float], ...]:
        floats, segment = self.x.numel() + self.grad_out.numel(), self.segment
        moved = floats * self.x.element_size() + segment.numel() * segment.element_size()
        return (self.x.numel(), moved), (0, moved)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return (self.x,)


def case_of(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> SegmentCase:
    """ROWSxWIDTH:SEGMENTS, segments end to end; with :mixed in any order. Or a name of NAMED.

    Raises:
        ConfigError: no such size.
    """
    shape = re.fullmatch(r"([1-9]\d{0,7})x([1-9]\d{0,4}):([1-9]\d{0,7})(:mixed)?", NAMED.get(name, name))
    if not shape:
        raise ConfigError(f"size {name!r} is unknown; rows x width : segments, such as 754x300:430, perhaps with :mixed; or one "
                          f"of {', '.join(NAMED)}")
    rows, width, segments = (int(number) for number in shape.groups()[:3])
    generator = torch.Generator().manual_seed(0)
    segment = torch.randint(segments, (rows,), generator=generator)
    segment = segment if shape[4] else segment.sort().values

    def normal(count: int) -> Tensor:
        return torch.randn(count, *([width] if width > 1 else []), generator=generator).to(device, dtype)

    what = f"{rows:,} rows of {width:,} into {segments:,} segments{', in any order' if shape[4] else ''}"
    return SegmentCase(name, what, normal(rows), segment.to(device), normal(segments))


def truth(case: SegmentCase) -> Truth:
    """Sums and gradient in float64; limits by how far the same in the case's dtype is off."""
    return Truth.of(("out", "grad_x"), _results(case, torch.float64), _results(case, case.x.dtype))


def _results(case: SegmentCase, dtype: torch.dtype) -> list[Tensor]:
    x = case.x.detach().to(dtype, copy=True).requires_grad_()
    out = reference.segment_sum(x, case.segment, case.segments)
    return [out.detach(), *torch.autograd.grad(out, x, case.grad_out.to(dtype))]
