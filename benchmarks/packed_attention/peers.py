"""Every way to compute attention of packed sequences that we measure ourselves against.

A peer is given its inputs in the layout it likes best (padded, where it pads) and its mask ready; turning packed into padded is
not timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import OURS, Unfit, Work
from benchmarks.packed_attention.cases import SequenceCase
from case_fast import equations, ops

MOST_BYTES = 4 << 30  # a padded peer whose scores would need more is left out, and the table says what it would need
FAR = -1e30  # of a key that is not seen, before the softmax


def ours(case: SequenceCase) -> Work:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.packed_attention(query, key, value, case.cu, case.cu, case.causal)

    return Work(attend, case.inputs, case.grad_out)


def equation(case: SequenceCase) -> Work:
    """The fallback of case_fast, in plain torch."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return equations.packed_attention(query, key, value, case.cu, case.cu, case.causal)

    return Work(attend, case.inputs, case.grad_out)


# ---- padded: (B, H, n, D)


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + mask).softmax(-1) @ value


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def padded(case: SequenceCase, attention: Callable[..., Tensor], compiled: bool = False) -> Work:
    sizes = case.cu.diff()
    count, width = sizes.numel(), int(sizes.max())
    needed = 4 * count * case.query.shape[1] * width**2 * case.query.element_size()
    if needed > MOST_BYTES:
        raise Unfit(f"needs about {needed / 2**30:,.0f} GiB")
    rows = case.query.shape[0]
    place = equations.segment_ids(case.cu, rows) * width + equations.segment_positions(case.cu, rows)
    within = torch.arange(width, device=case.query.device)
    seen = (within < sizes[:, None])[:, None, None, :]
    if case.causal:
        seen = seen & (within <= within[:, None])
    mask = torch.zeros(seen.shape, dtype=case.query.dtype, device=case.query.device).masked_fill(~seen, FAR)

    def pad(x: Tensor) -> Tensor:
        full = x.new_zeros(count * width, *x.shape[1:])
        full[place] = x
        return full.unflatten(0, (count, width)).transpose(1, 2).contiguous()

    def pack(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.transpose(1, 2).flatten(0, 1)[place] for x in results)

    function = torch.compile(attention, dynamic=False) if compiled else attention
    leaves = tuple(pad(x) for x in case.inputs)
    return Work(lambda *leaves: function(*leaves, mask), leaves, pad(case.grad_out), pack)


# ---- a sequence at a time


def one_by_one(case: SequenceCase) -> Work:
    """A call for each sequence, of its own length."""
    lengths = case.lengths

    def attend(*leaves: Tensor) -> Tensor:
        parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in leaves), strict=True)
        outs = [F.scaled_dot_product_attention(*(x[None] for x in part), is_causal=case.causal)[0] for part in parts]
        return torch.cat(outs, 1).transpose(0, 1)

    return Work(attend, case.inputs, case.grad_out)


def nested(case: SequenceCase) -> Work:
    """scaled_dot_product_attention on nested tensors."""
    if case.causal:
        raise Unfit("has no causal mask")
    lengths = case.lengths

    def ragged(x: Tensor) -> Tensor:
        """(B, H, *, D) of packed (T, H, D)."""
        return torch.nested.as_nested_tensor([part.transpose(0, 1) for part in x.split(lengths)]).contiguous()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(ragged(query), ragged(key), ragged(value))
        return torch.cat([x.transpose(0, 1) for x in out.unbind()])

    return Work(attend, case.inputs, case.grad_out)


# ---- packed


def varlen(case: SequenceCase) -> Work:
    """torch's own attention of packed sequences (FlashAttention)."""
    if not case.query.is_cuda:
        raise Unfit("runs on CUDA alone")
    if case.query.dtype not in (torch.float16, torch.bfloat16):
        raise Unfit("computes in float16 and bfloat16 alone")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as why:
        raise Unfit("is not in this torch") from why
    return _varlen(case, varlen_attn)


def _varlen(case: SequenceCase, attention: Callable[..., Tensor]) -> Work:
    """Heads of the next multiple of 8 numbers, as that attention wants them: the others are 0."""
    true = case.query.shape[2]
    missing, scale = -true % 8, true**-0.5
    cu, longest = case.cu.int(), max(case.lengths)
    window = {"window_size": (-1, 0)} if case.causal else {}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, cu, cu, longest, longest, scale=scale, **window)

    def wider(x: Tensor) -> Tensor:
        return F.pad(x, (0, missing))

    leaves = tuple(wider(x) for x in case.inputs)
    return Work(attend, leaves, wider(case.grad_out), lambda results: tuple(x[..., :true] for x in results))


PEERS: dict[str, Callable[[SequenceCase], Work]] = {
    OURS: ours,
    "equations.py, eager": equation,
    "padded, eager": lambda case: padded(case, _plain),
    "padded, scaled_dot_product_attention": lambda case: padded(case, _fused),
    "padded, torch.compile": lambda case: padded(case, _plain, compiled=True),
    "padded, scaled_dot_product_attention, torch.compile": lambda case: padded(case, _fused, compiled=True),
    "sequence by sequence, scaled_dot_product_attention": one_by_one,
    "nested tensors, scaled_dot_product_attention": nested,
    "packed, torch.nn.attention.varlen": varlen,
}
