"""Every way to compute a decoder's cross-attention that we measure ourselves against.

A peer is given its inputs in the layout it likes best (padded, where it pads) and its masks ready; turning packed into padded is
not timed. All are given keys and values that are projected already, but for the one that says it projects them at each step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cross_attention.cases import ReplyCase
from benchmarks.measure import OURS, Unfit, Work
from case_fast import equations, ops
from case_fast.ops import Source

FAR = -1e30  # of a key that is padding, before the softmax: where all are, values of padding (0) are averaged


def ours(case: ReplyCase) -> Work:
    """Decoding, the sources are prepared once a reply, as the others' masks and keys are."""
    prepared = ops.prepare_sources(case.sources) if case.steps else None

    def attend(hidden: Tensor, *floats: Tensor) -> Tensor:
        return ops.cross_attention(hidden, case.cu_hidden, prepared or case.sources_of(floats))

    return Work(attend, case.inputs, case.grad_out)


def equation(case: ReplyCase) -> Work:
    """The fallback of case_fast, in plain torch."""

    def attend(hidden: Tensor, *floats: Tensor) -> Tensor:
        return equations.cross_attention(hidden, case.cu_hidden, case.sources_of(floats))

    return Work(attend, case.inputs, case.grad_out)


# ---- padded: (B, n, d) states, (B, H, m, D) keys


def _places(cu: Tensor) -> tuple[Tensor, int]:
    """Of each packed row its place among B * width padded ones, and the width."""
    sizes = cu.diff()
    width = max(1, int(sizes.max()))
    return equations.segment_ids(cu, int(cu[-1])) * width + equations.segment_positions(cu, int(cu[-1])), width


def _pad(x: Tensor, cu: Tensor) -> Tensor:
    """(B, width, ...), zeros beside the rows."""
    place, width = _places(cu)
    full = x.new_zeros((cu.numel() - 1) * width, *x.shape[1:])
    full[place] = x
    return full.unflatten(0, (-1, width))


def _unpad(x: Tensor, cu: Tensor) -> Tensor:
    return x.flatten(0, 1)[_places(cu)[0]]


def _padded(case: ReplyCase, attention: Callable[..., Tensor], function: Callable | None = None) -> Work:
    """Work on padded leaves, whose attention is attention(query (B, H, n, D), key, value (B, H, m, D), mask (B, 1, 1, m))."""
    leaves, masks = [_pad(case.hidden, case.cu_hidden)], []
    for s in case.sources:
        keys, values = (_pad(x, s.cu_keys).transpose(1, 2).contiguous() for x in (s.key, s.value))
        leaves += [keys, values, *s.floats()[2:]]
        real = torch.arange(keys.shape[2], device=keys.device) < s.cu_keys.diff()[:, None]
        masks.append(torch.zeros_like(real, dtype=keys.dtype).masked_fill(~real, FAR)[:, None, None, :])

    def pack(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        out, *grads = results
        found = [_unpad(out, case.cu_hidden)]
        for place, grad in enumerate(grads):
            if place == 0:
                grad = _unpad(grad, case.cu_hidden)
            elif (place - 1) % len(Source.FLOATS) < 2:
                grad = _unpad(grad.transpose(1, 2), case.sources[(place - 1) // len(Source.FLOATS)].cu_keys)
            found.append(grad)
        return tuple(found)

    blocks = function or _blocks
    return Work(lambda *leaves: blocks(attention, masks, *leaves), tuple(leaves), _pad(case.grad_out, case.cu_hidden), pack)


def _blocks(attention: Callable[..., Tensor], masks: list[Tensor], hidden: Tensor, *floats: Tensor) -> Tensor:
    for place, mask in enumerate(masks):
        key, value, norm_weight, norm_bias, query_weight, output_weight = floats[6 * place : 6 * place + 6]
        query = F.linear(F.layer_norm(hidden, hidden.shape[-1:], norm_weight, norm_bias), query_weight)
        query = query.unflatten(-1, (key.shape[1], -1)).transpose(1, 2)
        hidden = hidden + F.linear(attention(query, key, value, mask).transpose(1, 2).flatten(2), output_weight)
    return hidden


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + mask).softmax(-1) @ value


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def padded(case: ReplyCase) -> Work:
    return _padded(case, _plain)


def sdpa(case: ReplyCase) -> Work:
    return _padded(case, _fused)


def compiled(attention: Callable[..., Tensor]) -> Callable[[ReplyCase], Work]:
    def prepare(case: ReplyCase) -> Work:
        return _padded(case, attention, torch.compile(_blocks, dynamic=False))

    return prepare


def projecting(case: ReplyCase) -> Work:
    """As decoders are usually written: keys and values projected from the encoder's rows inside the layer, at every word."""
    if not case.steps:
        raise Unfit("in training all project once a step")
    work = _padded(case, _plain)
    memory = [_pad(rows, s.cu_keys) for rows, s in zip(case.memory, case.sources, strict=True)]
    heads, right = case.sources[0].key.shape[1], work.function

    def attend(hidden: Tensor, *floats: Tensor) -> Tensor:
        given = list(floats)
        for place, (rows, weights) in enumerate(zip(memory, case.projections, strict=True)):
            for at, weight in enumerate(weights):
                given[len(Source.FLOATS) * place + at] = F.linear(rows, weight).unflatten(-1, (heads, -1)).transpose(1, 2)
        return right(hidden, *given)

    work.function = attend
    return work


# ---- nested tensors


def nested(case: ReplyCase) -> Work:
    """scaled_dot_product_attention on nested tensors: nothing is padded. Keys of every reply, so replies without are left out."""
    if any(int(s.cu_keys.diff().min()) == 0 for s in case.sources):
        raise Unfit("no replies without keys")
    rows = case.cu_hidden.diff().tolist()
    lengths = [s.cu_keys.diff().tolist() for s in case.sources]
    heads = case.sources[0].key.shape[1]

    def ragged(x: Tensor, sizes: list[int]) -> Tensor:
        """(B, H, *, D) of packed (T, H, D)."""
        return torch.nested.as_nested_tensor([part.transpose(0, 1) for part in x.split(sizes)]).contiguous()

    def attend(hidden: Tensor, *floats: Tensor) -> Tensor:
        for place, sizes in enumerate(lengths):
            key, value, norm_weight, norm_bias, query_weight, output_weight = floats[6 * place : 6 * place + 6]
            query = F.linear(F.layer_norm(hidden, hidden.shape[-1:], norm_weight, norm_bias), query_weight)
            keys, values = kept[place] if case.steps else (ragged(key, sizes), ragged(value, sizes))
            attended = F.scaled_dot_product_attention(ragged(query.unflatten(-1, (heads, -1)), rows), keys, values)
            attended = torch.cat([x.transpose(0, 1) for x in attended.unbind()])
            hidden = hidden + F.linear(attended.flatten(1), output_weight)
        return hidden

    kept = [(ragged(s.key, sizes), ragged(s.value, sizes)) for s, sizes in zip(case.sources, lengths, strict=True)]
    return Work(attend, case.inputs, case.grad_out)


# ---- packed


def varlen(case: ReplyCase, compiled: bool = False) -> Work:
    """torch's own attention of packed sequences (FlashAttention)."""
    if not case.hidden.is_cuda:
        raise Unfit("runs on CUDA alone")
    if case.hidden.dtype not in (torch.float16, torch.bfloat16):
        raise Unfit("computes in float16 and bfloat16 alone")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as why:
        raise Unfit("is not in this torch") from why
    return _varlen(case, varlen_attn, compiled)


def _varlen(case: ReplyCase, attention: Callable[..., Tensor], compiled: bool = False) -> Work:
    """Heads of the next multiple of 8 numbers, as that attention wants them: the others are 0, in the weights too."""
    heads, true = case.sources[0].key.shape[1:]
    full = -(-true // 8) * 8
    scale = true**-0.5

    def wider(x: Tensor) -> Tensor:
        """(..., full) of (..., true)."""
        return F.pad(x, (0, full - true))

    leaves = [case.hidden]
    for s in case.sources:
        query_weight = wider(s.query_weight.unflatten(0, (heads, true)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)
        output_weight = wider(s.output_weight.unflatten(1, (heads, true))).flatten(1)
        leaves += [wider(s.key), wider(s.value), s.norm_weight, s.norm_bias, query_weight.contiguous(), output_weight]
    cu_query, longest = case.cu_hidden.int(), int(case.cu_hidden.diff().max())
    keys = [(s.cu_keys.int(), max(1, int(s.cu_keys.diff().max()))) for s in case.sources]

    def attend(hidden: Tensor, *floats: Tensor) -> Tensor:
        for place, (cu_keys, most) in enumerate(keys):
            key, value, norm_weight, norm_bias, query_weight, output_weight = floats[6 * place : 6 * place + 6]
            query = F.linear(F.layer_norm(hidden, hidden.shape[-1:], norm_weight, norm_bias), query_weight)
            attended = attention(query.unflatten(1, (heads, full)), key, value, cu_query, cu_keys, longest, most, scale=scale)
            hidden = hidden + F.linear(attended.flatten(1), output_weight)
        return hidden

    def pack(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found = list(results[:2])
        for at in range(2, len(results), len(Source.FLOATS)):
            key, value, norm_weight, norm_bias, query_weight, output_weight = results[at : at + len(Source.FLOATS)]
            query_weight = query_weight.unflatten(0, (heads, full))[:, :true].flatten(0, 1)
            output_weight = output_weight.unflatten(1, (heads, full))[..., :true].flatten(1)
            found += [key[..., :true], value[..., :true], norm_weight, norm_bias, query_weight, output_weight]
        return tuple(found)

    return Work(torch.compile(attend, dynamic=False) if compiled else attend, tuple(leaves), case.grad_out, pack)


PEERS: dict[str, Callable[[ReplyCase], Work]] = {
    OURS: ours,
    "equations.py, eager": equation,
    "padded, projected at each step, eager": projecting,
    "padded, eager": padded,
    "padded, scaled_dot_product_attention": sdpa,
    "padded, torch.compile": compiled(_plain),
    "padded, scaled_dot_product_attention, torch.compile": compiled(_fused),
    "nested tensors, scaled_dot_product_attention": nested,
    "packed, torch.nn.attention.varlen": varlen,
    "packed, torch.nn.attention.varlen, torch.compile": lambda case: varlen(case, compiled=True),
}
