"""Arguments of case_fast.ops.packed_attention, random and of any shape. Needs only torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from attention_checks import offsets, strided
from torch import Tensor

from case_fast import equations, ops

FLOATS = ("query", "key", "value")
INDEX = ("cu_query", "cu_key", "key_of", "key_length")


@dataclass(frozen=True)
class Case:
    """One call's arguments, and the gradient of its output."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_query: Tensor
    cu_key: Tensor
    key_of: Tensor | None
    key_length: Tensor | None
    grad_out: Tensor
    causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    seed: int = 0

    def arguments(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "grad_out"}

    def floats(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in FLOATS}

    def call(self, floats: dict[str, Tensor], plain: bool = False) -> Tensor:
        return (equations.packed_attention if plain else ops.packed_attention)(**(self.arguments() | floats))

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, grad_out=self.grad_out.to(dtype), **{name: x.to(dtype) for name, x in self.floats().items()})


def make_case(rows: list[int], keys: list[int] | None = None, heads: int = 2, dim: int = 5, number: int = 0,
              dtype: torch.dtype = torch.float32, device: str = "cpu", magnitude: float = 1.0, layout: int = 0, long: int = 0,
              share: bool = False, room: bool = False, **more: object) -> Case:
    """Random arguments, the `number`-th, of sequences of so many ``rows`` of queries and ``keys`` (default: as many).

    layout: strides other than contiguous. long: bits that say which of INDEX are int64. share: sequences attend to random
    ones of ``keys``. room: of each sequence of keys only the first few are keys, the others are NaN."""
    g = torch.Generator().manual_seed(number)
    keys = rows if keys is None else keys

    def normal(total: int) -> Tensor:
        return (torch.randn(total, heads, dim, generator=g, dtype=torch.float64) * magnitude).to(dtype)

    query, key, value, grad_out = normal(sum(rows)), normal(sum(keys)), normal(sum(keys)), normal(sum(rows))
    key_of = key_length = None
    if share or len(keys) != len(rows):
        rows = rows if keys else []  # no one has any keys to name
        query, grad_out = query[: sum(rows)], grad_out[: sum(rows)]
        key_of = torch.randint(max(len(keys), 1), (len(rows),), generator=g)
    if room:
        key_length = (torch.rand(len(keys), generator=g, dtype=torch.float64) * (torch.tensor(keys) + 1)).long()
        place = equations.segment_positions(offsets(keys, True, 0, "cpu"), sum(keys))
        unused = place >= key_length[equations.segment_ids(offsets(keys, True, 0, "cpu"), sum(keys))]
        key[unused], value[unused] = torch.nan, torch.nan
    floats = (query, key, value, grad_out)
    floats = [strided(x, (layout + place) % 4 if layout else 0).to(device) for place, x in enumerate(floats)]
    numbers = [x if x is None else strided(x if long >> place & 1 else x.int(), layout % 2).to(device)
               for place, x in enumerate((key_of, key_length), 2)]
    cu = [offsets(lengths, bool(long >> place & 1), layout % 2, device) for place, lengths in enumerate((rows, keys))]
    return Case(*floats[:3], *cu, *numbers, floats[3], **more)
