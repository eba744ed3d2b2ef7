"""cross_attention of many rows on a GPU, and what backward needs of it: torch's layer norm and products around our attention."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from case_fast.ops import backend, common, reference
from case_fast.ops.packed_attention import attend, attend_backward

FAMILY, EACH = "cross_attention", 6  # floats of a source: key, value, norm_weight, norm_bias, query_weight, output_weight


def kept_size(hidden: Tensor, floats: Sequence[Tensor]) -> int:
    """Elements that `views` reads."""
    total, (rows, width), dtype = 0, hidden.shape, hidden.dtype
    for key in floats[::EACH]:
        heads, dimension = key.shape[1:]
        total += sum(_whole(n, dtype) for n in _row_parts(rows, width, heads * dimension)) + rows * heads * _log_size(dtype)
    return total


def _row_parts(rows: int, width: int, inner: int) -> tuple[int, int, int]:
    """Elements of what is kept of a source's rows: hidden, query, attended."""
    return rows * width, rows * inner, rows * inner


def _whole(elements: int, dtype: torch.dtype) -> int:
    """So many that what follows starts at whole 16 bytes, at which a GPU's matrix products are at their best."""
    each = 16 // dtype.itemsize
    return (elements + each - 1) // each * each


def _log_size(dtype: torch.dtype) -> int:
    """Elements of one lse, which is in float32 for half precision."""
    return 2 if dtype in common.HALF else 1


class _Kept(NamedTuple):
    """What backward needs of one source."""

    hidden: Tensor  # (T, d), before the layer norm
    query: Tensor  # (T, H, D)
    attended: Tensor  # (T, H, D)
    lse: Tensor  # (T, H), float32 (float64 for float64)


def views(saved: Tensor, rows: int, width: int, heads: int, dimension: int, sources: int) -> list[_Kept]:
    """Views of saved: rows of all kinds, source by source, each from whole 16 bytes on; then lse of all sources."""
    sizes = _row_parts(rows, width, heads * dimension) * sources
    *parts, logs = saved.split([*(_whole(n, saved.dtype) for n in sizes), sources * rows * heads * _log_size(saved.dtype)])
    parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    logs = (logs.view(torch.float32) if saved.dtype in common.HALF else logs).view(sources, rows, heads)
    inner = (rows, heads, dimension)
    return [
        _Kept(hidden.view(rows, width), query.view(inner), attended.view(inner), lse)
        for hidden, query, attended, lse in zip(parts[::3], parts[1::3], parts[2::3], logs, strict=True)
    ]


def _plain(device_type: str) -> ExitStack:
    """Inside it torch's products are neither cast nor recorded."""
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if torch.is_autocast_enabled(device_type):
        stack.enter_context(torch.autocast(device_type, enabled=False))
    return stack


def forward(hidden: Tensor, cu_hidden: Tensor, floats: list[Tensor], cu_keys: list[Tensor], key_of: list[Tensor | None],
            eps: float, dropout_p: float, output_dropout_p: float, seed: int, seed_at: Tensor | None, out: Tensor,
            saved: Tensor | None) -> Tensor:
    """The last source writes out. saved: what backward needs, or None where none follows."""
    rows, width = hidden.shape
    heads, dimension = floats[0].shape[1:]
    count, inner = len(cu_keys), heads * dimension
    if saved is None:
        saved = hidden.new_empty(kept_size(hidden, floats[:EACH]))
        kept = views(saved, rows, width, heads, dimension, 1) * count  # one place for all
    else:
        kept = views(saved, rows, width, heads, dimension, count)
    with _plain(hidden.device.type):
        kept[0].hidden.copy_(hidden)
        for place, (cu, of) in enumerate(zip(cu_keys, key_of, strict=True)):
            key, value, norm_weight, norm_bias, query_weight, output_weight = floats[place * EACH :][:EACH]
            state, query, attended, lse = kept[place]
            normed = F.layer_norm(state, (width,), norm_weight, norm_bias, eps)
            torch.mm(normed, query_weight.t(), out=query.view(rows, inner))
            numbers = (False, dimension**-0.5, dropout_p, reference.source_seed(seed, place, 0), seed_at)
            attend(query, key, value, (cu_hidden, cu, of, None), numbers, attended, lse)
            added = torch.mm(attended.view(rows, inner), output_weight.t())
            following = kept[place + 1].hidden if place + 1 < count else out
            _drop(added, state, following, output_dropout_p, reference.source_seed(seed, place, 1), seed_at)
    return out


def backward(grad_out: Tensor, hidden: Tensor, cu_hidden: Tensor, floats: list[Tensor], cu_keys: list[Tensor],
             key_of: list[Tensor | None], saved: Tensor, eps: float, dropout_p: float, output_dropout_p: float, seed: int,
             seed_at: Tensor | None, found: list[Tensor]) -> None:
    """Of `forward`, into found: the gradients of hidden and of floats."""
    rows, width = hidden.shape
    heads, dimension = floats[0].shape[1:]
    kept, each = views(saved, rows, width, heads, dimension, len(cu_keys)), EACH
    grad = found[0].copy_(grad_out)
    added, grad_query = torch.empty_like(grad), torch.empty_like(kept[0].query)
    flat = (rows, heads * dimension)
    with _plain(hidden.device.type):
        for place in reversed(range(len(cu_keys))):
            key, value, norm_weight, norm_bias, query_weight, output_weight = floats[place * each :][:each]
            grads = found[1 + place * each :][:each]
            state, query, attended, lse = kept[place]
            if output_dropout_p > 0:
                _drop(grad, None, added, output_dropout_p, reference.source_seed(seed, place, 1), seed_at)
            grad_added = added if output_dropout_p > 0 else grad
            torch.mm(grad_added.t(), attended.view(flat), out=grads[5])
            grad_attended = torch.mm(grad_added, output_weight)
            numbers = (False, dimension**-0.5, dropout_p, reference.source_seed(seed, place, 0), seed_at)
            offsets = (cu_hidden, cu_keys[place], key_of[place], None)
            attend_backward(grad_attended, query, key, value, offsets, attended, lse, numbers, (grad_query, *grads[:2]))
            normed, mean, inverse = torch.native_layer_norm(state, (width,), norm_weight, norm_bias, eps)
            torch.mm(grad_query.view(flat).t(), normed, out=grads[4])
            grad_normed = torch.mm(grad_query.view(flat), query_weight)
            through, *norms = torch.ops.aten.native_layer_norm_backward(grad_normed, state, (width,), mean, inverse, norm_weight,
                                                                        norm_bias, [True] * 3)
            grad += through
            for to, norm in zip(grads[2:4], norms, strict=True):
                to.copy_(norm)


def _drop(x: Tensor, base: Tensor | None, to: Tensor, dropout_p: float, seed: int, seed_at: Tensor | None) -> None:
    """to = base + dropout(x), as the equation drops what a source adds."""
    if dropout_p == 0:
        torch.add(x, 0 if base is None else base, out=to)
    elif x.is_cpu:
        keep = reference.dropout_keep(x.numel(), 1, dropout_p, reference.seed_of(seed, seed_at)).view(x.shape)
        torch.add(x * keep / (1 - dropout_p), 0 if base is None else base, out=to)
    else:
        with torch.cuda.device(x.device):
            status = backend.native.cross_attention_drop_cuda(
                x.numel(), common.DTYPES[x.dtype], dropout_p, seed, *common.pointers(seed_at, x, base, to),
                torch.cuda.current_stream().cuda_stream,
            )
        if status:
            common.refuse(FAMILY, status)
