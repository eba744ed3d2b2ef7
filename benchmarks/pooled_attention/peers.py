"""Every way to attend from one query a sequence that we measure ourselves against: the whole of it, products included.

A peer is given its inputs in the layout it likes best (padded, where it pads) and its mask ready; turning packed into padded is
not timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import OURS, Unfit, Work
from benchmarks.pooled_attention.cases import PooledCase, by_definition
from case_fast import ops
from case_fast.ops import reference

MOST_BYTES = 4 << 30  # a padded peer whose rows, keys and values would need more is left out, and the table says how much
FAR = -1e30  # of a row that is not seen, before the softmax


def ours(case: PooledCase) -> Work:
    """Keys and values are never made: queries go through the projection to keys, pooled rows through that to values."""

    def attend(query: Tensor, rows: Tensor, *weights: Tensor) -> Tensor:
        if not weights:
            return ops.pooled_attention(query, rows, case.cu, case.scale)
        key, value = weights
        projected = torch.bmm(query.transpose(0, 1), key).transpose(0, 1)
        pooled = ops.pooled_attention(projected, rows, case.cu, case.scale)
        return torch.bmm(pooled.transpose(0, 1), value.transpose(1, 2)).transpose(0, 1)

    return Work(attend, case.inputs, case.grad_out)


def defined(case: PooledCase, attention: Callable[..., Tensor]) -> Work:
    """Keys and values of all rows are made."""
    return Work(lambda query, rows, *weights: by_definition(query, rows, case.cu, case.scale, *weights, attention=attention),
                case.inputs, case.grad_out)


def padded(case: PooledCase, attention: Callable[..., Tensor], compiled: bool = False) -> Work:
    """Rows (s, n, d); their keys and values (s, H, n, D) are made, padding included."""
    sizes = case.cu.diff()
    count, width, heads = sizes.numel(), int(sizes.max()), case.query.shape[1]
    needed = 6 * count * width * case.rows.shape[1] * case.rows.element_size()
    if needed > MOST_BYTES:
        raise Unfit(f"needs about {needed / 2**30:,.0f} GiB")
    total = case.rows.shape[0]
    place = reference.segment_ids(case.cu, total) * width + reference.segment_positions(case.cu, total)
    seen = (torch.arange(width, device=sizes.device) < sizes[:, None])[:, None, None, :]
    mask = torch.zeros(seen.shape, dtype=case.rows.dtype, device=sizes.device).masked_fill(~seen, FAR)
    scale = case.scale

    def attend(query: Tensor, rows: Tensor, *weights: Tensor) -> Tensor:
        if weights:
            keys, values = (F.linear(rows, x.flatten(0, 1)).unflatten(-1, (heads, -1)).transpose(1, 2) for x in weights)
        else:
            keys = values = rows.unsqueeze(1).expand(-1, heads, -1, -1)
        return attention(query.unsqueeze(2), keys, values, mask, scale).squeeze(2)

    def pack(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        out, *gradients = results
        if gradients:
            gradients[1] = gradients[1].flatten(0, 1)[place]
        return out, *gradients

    rows = case.rows.new_zeros(count * width, case.rows.shape[1])
    rows[place] = case.rows
    leaves = (case.query, rows.unflatten(0, (count, width)), *case.weights)
    return Work(torch.compile(attend, dynamic=False) if compiled else attend, leaves, case.grad_out, pack)


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return (query @ key.transpose(2, 3) * scale + mask).softmax(-1) @ value


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


PEERS: dict[str, Callable[[PooledCase], Work]] = {
    OURS: ours,
    f"{OURS}, packed_attention to keys and values": lambda case: defined(case, ops.packed_attention),
    "reference.py, eager": lambda case: defined(case, reference.packed_attention),
    "padded, eager": lambda case: padded(case, _plain),
    "padded, scaled_dot_product_attention": lambda case: padded(case, _fused),
    "padded, torch.compile": lambda case: padded(case, _plain, compiled=True),
    "padded, scaled_dot_product_attention, torch.compile": lambda case: padded(case, _fused, compiled=True),
}
