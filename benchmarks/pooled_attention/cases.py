"""The inputs of the pooled_attention benchmarks: one query a sequence and head, rows end to end, and the projections to keys and
values between them, or none; and what comes out in float64."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Case, Truth
from case_fast.errors import ConfigError
from case_fast.ops import reference

HEADS, DIMENSION = 2, 150  # of the paper
NAMED = {"texts": "430x6", "reactions": "32x43", "replies": "16x16"}  # of a real batch: those whose first row goes on
SIZES = [*NAMED, *(f"{name}:pool" for name in NAMED), *(f"{s}x6" for s in (16, 64, 256, 1024, 4096)), "64x6:skewed"]
QUICK_SIZES = ["5x4", "5x4:pool", "5x4:skewed"]
AXIS = "sequences of about 6 rows"


@dataclass(frozen=True)
class PooledCase(Case):
    """rows (T, d), d = H D; cu (s + 1,). query and grad_out (s, H, D) and the projections key and value (H, D, d); where the op
    is measured without them, none, and query and grad_out (s, H, d)."""

    query: Tensor
    rows: Tensor
    weights: tuple[Tensor, ...]
    cu: Tensor
    grad_out: Tensor
    scale: float

    @property
    def lengths(self) -> list[int]:
        return self.cu.diff().tolist()

    @property
    def shape(self) -> dict[str, int]:
        (rows, width), heads = self.rows.shape, self.query.shape[1]
        return {"s": self.query.shape[0], "T": rows, "longest": max(self.lengths), "H": heads, "d": width}

    @property
    def size(self) -> int | None:
        return self.query.shape[0] if re.fullmatch(r"\d+x6", self.name) else None

    @property
    def least(self) -> tuple[tuple[float, float], ...]:
        """By the op: keys and values are never made."""
        heads, (rows, width) = self.query.shape[1], self.rows.shape
        pooled = 2 * rows * heads * width
        projected = sum(2 * self.query.shape[0] * x.numel() for x in self.weights)
        moved = self.rows.numel() + self.query.numel() + sum(x.numel() for x in self.weights)
        results, size = self.grad_out.numel(), self.rows.element_size()
        return (2 * pooled + projected, size * (moved + results)), (4 * pooled + 2 * projected, size * (2 * moved + results))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return self.query, self.rows, *self.weights


def case_of(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, heads: int = HEADS, dimension: int = DIMENSION
            ) -> PooledCase:
    """SxN: S sequences of N/2 to 3N/2 rows, keys and values by projection. SxN:pool: the attention alone, over the rows
    themselves. SxN:skewed: most are short, a few several times N. Or texts, reactions, replies, perhaps with :pool.

    Raises:
        ConfigError: no such size.
    """
    first, colon, rest = name.partition(":")
    shape = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,4})(?::(pool|skewed))?", NAMED.get(first, first) + colon + rest)
    if not shape:
        raise ConfigError(f"size {name!r} is unknown; sequences x rows, such as 430x6, perhaps with :pool or :skewed; or one of "
                          f"{', '.join(NAMED)}")
    count, mean, how = int(shape[1]), int(shape[2]), shape[3]
    generator = torch.Generator().manual_seed(0)
    if how == "skewed":
        lengths = (torch.rand(count, generator=generator).log().neg() * mean).round().clamp(min=1).long()
    else:
        lengths = torch.randint(max(1, mean // 2), mean + mean // 2 + 1, (count,), generator=generator)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    width, projects = heads * dimension, how != "pool"

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    own = dimension if projects else width
    query, rows, grad_out = normal(count, heads, own), normal(int(cu[-1]), width), normal(count, heads, own)
    weights = [normal(heads, dimension, width) * width**-0.5 for _ in range(2 if projects else 0)]
    what = f"{count:,} sequences of about {mean:,} rows{', lengths skewed' if how == 'skewed' else ''}"
    what += ", keys and values by projection" if projects else ", over the rows themselves"
    query, rows, grad_out, *weights = (x.to(device, dtype) for x in (query, rows, grad_out, *weights))
    return PooledCase(name, what, query, rows, tuple(weights), cu.to(device), grad_out, own**-0.5)


def by_definition(query: Tensor, rows: Tensor, cu: Tensor, scale: float, key: Tensor | None = None, value: Tensor | None = None,
                  attention=reference.packed_attention) -> Tensor:
    """Keys and values (T, H, D) made, then attended to; without projections the rows are both."""
    heads = query.shape[1]
    shared = rows.unsqueeze(1).expand(-1, heads, -1)
    keys, values = (shared if x is None else F.linear(rows, x.flatten(0, 1)).unflatten(1, (heads, -1)) for x in (key, value))
    one_each = torch.arange(cu.shape[0], device=cu.device)
    return attention(query, keys, values, one_each, cu, scale=scale)


def truth(case: PooledCase) -> Truth:
    """Output and gradients by reference.py in float64; limits by how far the same in the case's dtype is off."""
    names = ("out", "grad_query", "grad_rows", "grad_key", "grad_value")[: 3 + len(case.weights)]
    return Truth.of(names, _results(case, torch.float64), _results(case, case.rows.dtype))


def _results(case: PooledCase, dtype: torch.dtype) -> list[Tensor]:
    query, rows, *weights = leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in case.inputs]
    out = by_definition(query, rows, case.cu, case.scale, *weights)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad_out.to(dtype))]
