"""The inputs of the packed_attention benchmarks: sequences end to end that attend to themselves, causal or not, and what comes
out in float64."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import Case, Truth
from case_fast import equations
from case_fast.errors import ConfigError

HEADS, DIMENSION = 2, 150  # of the paper
NAMED = {"contexts": "16x100", "replies": "16x16:causal"}  # a batch of the paper: encoder and decoder
SIZES = [*NAMED, "16x16", "16x64", "16x256", "16x1024", "256x16:causal", "64x100:causal", "64x100:skewed", "4x1024:causal"]
QUICK_SIZES = ["4x9", "4x9:causal", "4x9:skewed"]
AXIS = "rows of 16 sequences"


@dataclass(frozen=True)
class SequenceCase(Case):
    """query, key, value, grad_out: (T, H, D); cu: (B + 1,), where each sequence starts."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu: Tensor
    causal: bool
    grad_out: Tensor

    @property
    def lengths(self) -> list[int]:
        return self.cu.diff().tolist()

    @property
    def shape(self) -> dict[str, int]:
        rows, heads, dimension = self.query.shape
        return {"B": self.cu.numel() - 1, "T": rows, "longest": max(self.lengths), "H": heads, "D": dimension}

    @property
    def size(self) -> int | None:
        return self.query.shape[0] if re.fullmatch(r"16x\d+", self.name) else None

    @property
    def least(self) -> tuple[tuple[float, float], ...]:
        (rows, heads, dimension), lengths = self.query.shape, self.lengths
        pairs = sum(n * (n + 1) / 2 if self.causal else n * n for n in lengths)
        product, row = 2 * pairs * heads * dimension, rows * heads * dimension * self.query.element_size()
        return (2 * product, 4 * row), (4 * product, 7 * row)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return self.query, self.key, self.value


def case_of(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, heads: int = HEADS, dimension: int = DIMENSION
            ) -> SequenceCase:
    """BxN: B sequences of N/2 to 3N/2 rows. BxN:causal: no row sees those behind it. BxN:skewed: most are short, a few several
    times N, as lengths of texts are. Or contexts, replies.

    Raises:
        ConfigError: no such size.
    """
    shape = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})(?::(causal|skewed))?", NAMED.get(name, name))
    if not shape:
        raise ConfigError(f"size {name!r} is unknown; sequences x rows, such as 16x100, perhaps with :causal or :skewed; or one "
                          f"of {', '.join(NAMED)}")
    count, mean, how = int(shape[1]), int(shape[2]), shape[3]
    generator = torch.Generator().manual_seed(0)
    if how == "skewed":
        lengths = (torch.rand(count, generator=generator).log().neg() * mean).round().clamp(min=1).long()
    else:
        lengths = torch.randint(max(1, mean // 2), mean + mean // 2 + 1, (count,), generator=generator)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])

    def normal() -> Tensor:
        return torch.randn(int(cu[-1]), heads, dimension, generator=generator).to(device, dtype)

    what = f"{count:,} sequences of about {mean:,} rows{', causal' if how == 'causal' else ', lengths skewed' if how else ''}"
    query, key, value, grad_out = (normal() for _ in range(4))
    return SequenceCase(name, what, query, key, value, cu.to(device), how == "causal", grad_out)


def truth(case: SequenceCase) -> Truth:
    """Output and gradients by equations.py in float64; limits by how far the same in the case's dtype is off."""
    names = ("out", "grad_query", "grad_key", "grad_value")
    return Truth.of(names, _results(case, torch.float64), _results(case, case.query.dtype))


def _results(case: SequenceCase, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in case.inputs]
    out = equations.packed_attention(*leaves, case.cu, case.cu, case.causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad_out.to(dtype))]
