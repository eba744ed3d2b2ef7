"""Arguments of case_fast.ops.cross_attention, random and of any shape. Needs only torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from attention_checks import offsets, strided
from torch import Tensor

from case_fast import equations, ops
from case_fast.ops import Source
from case_fast.ops.cross_attention import FLOATS


@dataclass(frozen=True)
class Case:
    """One call's arguments, and the gradient of its output."""

    hidden: Tensor
    cu_hidden: Tensor
    sources: list[Source]
    grad_out: Tensor
    eps: float = 1e-5
    dropout_p: float = 0.0
    output_dropout_p: float = 0.0
    seed: int = 0

    def arguments(self) -> dict:
        names = ("hidden", "cu_hidden", "sources", "eps", "dropout_p", "output_dropout_p", "seed")
        return {name: getattr(self, name) for name in names}

    def floats(self) -> dict[str, Tensor]:
        inside = {f"{place}.{name}": getattr(s, name) for place, s in enumerate(self.sources) for name in FLOATS}
        return {"hidden": self.hidden} | inside

    def having(self, floats: dict[str, Tensor]) -> Case:
        """With these floats in place of its own."""
        sources = [replace(s, **{name: floats[f"{place}.{name}"] for name in FLOATS if f"{place}.{name}" in floats})
                   for place, s in enumerate(self.sources)]
        return replace(self, hidden=floats.get("hidden", self.hidden), sources=sources)

    def call(self, floats: dict[str, Tensor], plain: bool = False) -> Tensor:
        return (equations.cross_attention if plain else ops.cross_attention)(**self.having(floats).arguments())

    def to(self, dtype: torch.dtype) -> Case:
        changed = self.having({name: x.to(dtype) for name, x in self.floats().items()})
        return replace(changed, grad_out=self.grad_out.to(dtype))


def make_case(rows: list[int], keys: list[list[int]], width: int = 6, heads: int = 2, dim: int = 5, number: int = 0,
              dtype: torch.dtype = torch.float32, device: str = "cpu", magnitude: float = 1.0, layout: int = 0,
              long: bool = False, share: bool = False, **more: object) -> Case:
    """Random arguments, the `number`-th, of sequences of so many ``rows`` and, for each source, of so many ``keys``.

    layout: strides other than contiguous. share: sequences attend to random ones of ``keys``."""
    g = torch.Generator().manual_seed(number)

    def normal(*shape: int, scale: float = 1.0, by: int = 0) -> Tensor:
        x = (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)
        return strided(x, (layout + by) % 4 if layout else 0).to(device)

    sources = []
    for lengths in keys:
        of = None
        if share or len(lengths) != len(rows):
            rows = rows if lengths else []
            of = torch.randint(max(len(lengths), 1), (len(rows),), generator=g)
            of = (of if long else of.int()).to(device)
        inner, norm = heads * dim, normal(2, width, scale=0.2)
        sources.append(Source(
            normal(sum(lengths), heads, dim, scale=magnitude), normal(sum(lengths), heads, dim, scale=magnitude, by=1),
            offsets(lengths, long, layout % 2, device), norm[0] + 1, norm[1], normal(inner, width, scale=width**-0.5),
            normal(width, inner, scale=inner**-0.5), of,
        ))
    sources = [replace(s, key_of=s.key_of if s.key_of is None else s.key_of[: len(rows)]) for s in sources]
    cu, total = offsets(rows, long, layout % 2, device), sum(rows)
    # gradients of weights and of shared keys sum over rows: so they stay of order 1
    return Case(normal(total, width), cu, sources, normal(total, width, scale=max(total, 1) ** -0.5), **more)
