"""The inputs of the bilinear_mim benchmarks: pairs of rows, in the shapes that training has and larger, and their losses in
float64."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import Case, Truth
from case_fast import equations
from case_fast.errors import ConfigError

DIMENSION = 300  # of the paper
NAMED = {"coarse": "16", "fine": "1280x64", "sampled": "1280:64"}
SIZES = [*NAMED, "1024", "2048", "4096", "8192", "16384"]
QUICK_SIZES = ["24x10", "24:5"]
AXIS = "pairs, all others in the batch as negatives"
_AT_ONCE = {"cpu": 6 << 20, "cuda": 256 << 20}  # scores; some ten arrays of so many float64: the truth in little memory


@dataclass(frozen=True)
class PairCase(Case):
    """x (P, d), y (Q, d), weight (d, d), positive (P,), grad_out (P,); negatives None: all others."""

    x: Tensor
    y: Tensor
    weight: Tensor
    positive: Tensor
    negatives: int | None
    seed: int
    grad_out: Tensor

    @property
    def scores(self) -> tuple[int, int]:
        return self.x.shape[0], self.y.shape[0]

    @property
    def one_to_one(self) -> bool:
        return torch.equal(self.positive, torch.arange(self.y.shape[0], device=self.y.device))

    @property
    def shape(self) -> dict[str, int]:
        drawn = {} if self.negatives is None else {"negatives": self.negatives}
        return {"P": self.scores[0], "Q": self.scores[1], "d": self.x.shape[1], **drawn}

    @property
    def size(self) -> int | None:
        return self.scores[0] if self.negatives is None and self.one_to_one else None

    @property
    def least(self) -> tuple[tuple[float, float], ...]:
        (pairs, rows), width = self.scores, self.x.shape[1]
        scores = pairs * (rows if self.negatives is None else 1 + 2 * self.negatives)
        products, moved = 2 * width * (scores + pairs * width), self.x.element_size() * width * (pairs + rows + width)
        return (products, moved), (2 * products, 2 * moved)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return self.x, self.y, self.weight


def case_of(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, dimension: int = DIMENSION) -> PairCase:
    """coarse (16 pairs), fine (1280x64: many x to one y), sampled (1280:64 negatives), or P, PxQ, P:negatives."""
    shape = re.fullmatch(r"([1-9]\d{0,5})(?:([x:])([1-9]\d{0,5}))?", NAMED.get(name, name))
    if not shape:
        raise ConfigError(f"size {name!r} is unknown; one of {', '.join(NAMED)}, a number of pairs such as 8192, "
                          "pairs x rows of y such as 1280x64, or pairs:negatives such as 1280:64")
    pairs, second = int(shape[1]), int(shape[3] or 0)
    rows, negatives = (second, None) if shape[2] == "x" else (pairs, second or None)
    if rows > pairs:
        raise ConfigError(f"size {name!r} has more rows of y than pairs: each row of y has to belong to one")
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    positive = torch.arange(pairs) * rows // pairs  # in order, equally many each, as a batch has them
    x, y = normal(pairs, dimension), normal(rows, dimension)
    weight = normal(dimension, dimension) * 2 / dimension  # logits of deviation 2: both slopes and flats of the sigmoid
    among = f"{negatives:,} negatives drawn a pair and side" if negatives else "all others as negatives"
    grad_out = torch.rand(pairs, generator=generator) + 0.5
    tensors = (t.to(device, dtype) for t in (x, y, weight))
    return PairCase(name, f"{pairs:,} x {rows:,}, {among}", *tensors, positive.to(device), negatives, 5, grad_out.to(device))


def truth(case: PairCase) -> Truth:
    """Losses and gradients by equations.py in float64; limits by how far the same in the case's dtype is off."""
    names = ("loss", "grad_x", "grad_y", "grad_weight")
    return Truth.of(names, _by_parts(case, torch.float64), _by_parts(case, case.x.dtype))


def _by_parts(case: PairCase, dtype: torch.dtype) -> list[Tensor]:
    """The sum over rows of y needs all of y and some rows of x at once; the sum over rows of x all of x and some rows of y, with
    one more that stands for the positives left out."""
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in case.inputs]
    x, y, weight = leaves
    if dtype in (torch.float16, torch.bfloat16):  # x W in that dtype, as torch has it; the equation itself would take float32
        projected = x @ weight
        x, weight = projected.detach().requires_grad_(), torch.eye(len(weight), device=x.device, dtype=dtype)

    def finished(loss: Tensor) -> list[Tensor]:
        if x is not leaves[0]:
            projected.backward(x.grad)
        return [loss, *(t.grad for t in leaves)]

    grad = case.grad_out.to(equations.full_precision(x).dtype)
    if case.negatives is not None:
        side_y, side_x, _ = equations.mim_sides(x, y, weight, case.positive, case.negatives, case.seed)
        (side_y + side_x).backward(grad)
        return finished((side_y + side_x).detach())
    loss = torch.zeros_like(grad)
    pairs, rows = case.scores
    at_once = _AT_ONCE[x.device.type]
    for part in torch.arange(pairs, device=x.device).split(max(1, at_once // rows)):
        side, *_ = equations.mim_sides(x[part], y, weight, case.positive[part])
        side.backward(grad[part])
        loss[part] += side.detach()
    for part in torch.arange(rows, device=x.device).split(max(1, at_once // pairs)):
        here = (case.positive >= part[0]) & (case.positive <= part[-1])
        among = torch.where(here, case.positive - part[0], part.numel())
        _, side, _ = equations.mim_sides(x, torch.cat([y[part], y[:1] * 0]), weight, among)
        side[here].backward(grad[here])
        loss[here] += side[here].detach()
    return finished(loss)
