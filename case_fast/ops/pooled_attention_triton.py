"""pooled_attention in Triton, forward and backward.

    out[s, h] = sum_j dropout(softmax_j(scale q[s, h] . n_j))_j n_j     over the rows n_j of sequence s, which all heads share

One program of forward serves a (sequence, head). Rows come in blocks of BLOCK_N with a running maximum, so sequences of any
length work. Backward is one launch: of a sequence each head's program sums grad_query, and one more grad_rows over all heads,
block by block; both make the weights again. There are no atomics: the same inputs give the same bits. A row of d numbers is a
masked block of the next power of two (300 occupies 512). Sums run in float32, in float64 for float64 tensors. Offsets out of
range are never followed (`device_flag`).
"""
# Triton reads annotations as they stand, so this file has no `from __future__ import annotations`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from case_fast.ops import device_flag as flags
from case_fast.ops.device_flag import device_flag, raise_pending
from case_fast.ops.triton_launch import drawing_seed, dropout_arguments, dropped, on_device

BAD_CU = tl.constexpr(flags.BAD_CU)
SIZES = ["sequences", "total", "query_stride", "query_head", "grad_stride", "grad_head", "row_stride", "seed", "drop_below"]
POINTERS = ["query", "rows", "cu", "out", "lse", "grad_out", "grad_query", "grad_rows", "seed_at"]


# ------------------------------------------------------------------------------------------------------------------- pieces


@triton.jit
def _span(cu, sequence, sequences, total, flag):
    """The rows [begin, end) of a sequence, whatever stands in cu."""
    begin = tl.load(cu + sequence).to(tl.int64)
    end = tl.load(cu + sequence + 1).to(tl.int64)
    ends = (tl.load(cu).to(tl.int64) == 0) & (tl.load(cu + sequences).to(tl.int64) == total)
    tl.store(flag, BAD_CU, mask=(begin < 0) | (end < begin) | (end > total) | ~ends)
    begin = tl.minimum(tl.maximum(begin, 0), total)
    return begin, tl.minimum(tl.maximum(end, begin), total)


@triton.jit
def _first_number(cu, sequence, sequences, DROPOUT: tl.constexpr):
    """The number of a sequence's first weight for dropout: its place times the longest sequence."""
    longest = tl.full((), 0, tl.int64)
    if DROPOUT:
        for first in range(0, sequences, 256):
            s = first + tl.arange(0, 256)
            here = s < sequences
            size = tl.load(cu + s + 1, mask=here, other=0).to(tl.int64) - tl.load(cu + s, mask=here, other=0).to(tl.int64)
            longest = tl.maximum(longest, tl.max(size, axis=0))
    return sequence * longest


@triton.jit
def _block(rows, row, end, row_stride, d, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """(BLOCK_N, BLOCK_D): rows, and zeros from ``end`` on."""
    here = (row < end)[:, None] & (d < WIDTH)[None, :]
    return tl.load(rows + row[:, None] * row_stride + d[None, :], mask=here, other=0.0).to(ACC)


@triton.jit
def _one(x, at, d, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """(BLOCK_D,): the row of a tensor that begins at element ``at``."""
    return tl.load(x + at + d, mask=d < WIDTH, other=0.0).to(ACC)


@triton.jit
def _gradients(x, here, q, g, lse, mean, scale, number, head, key, drop_below, kept_scale, DROPOUT: tl.constexpr,
               ACC: tl.constexpr):
    """(BLOCK_N,) each: the weights after dropout and the gradients of the scores before ``scale``, for the rows ``x``."""
    log_weight = tl.sum(q[None, :] * x, axis=1) * tl.full((), scale, ACC) - lse
    weight = tl.exp(tl.where(log_weight > 0, 0.0, log_weight))  # of huge scores the rounding of lse would make it any size
    slope = tl.sum(g[None, :] * x, axis=1)
    after = weight
    if DROPOUT:
        after = dropped(weight, number, head, key, drop_below, kept_scale)
        slope = dropped(slope, number, head, key, drop_below, kept_scale)
    slope = weight * (slope - mean) * tl.full((), scale, ACC)
    return tl.where(here, after, 0.0), tl.where(here, slope, 0.0)


# ------------------------------------------------------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def forward_heads(query, rows, cu, out, lse, flag, sequences: tl.int64, total: tl.int64, query_stride: tl.int64,
                  query_head: tl.int64, row_stride: tl.int64, scale: tl.float64, seed: tl.uint64, seed_at, drop_below: tl.int64,
                  kept_scale: tl.float64, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr):
    """out (s, H, d) and lse (s, H)."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    begin, end = _span(cu, sequence, sequences, total, flag)
    number = _first_number(cu, sequence, sequences, DROPOUT)
    drawn_by = drawing_seed(seed, seed_at)
    q = _one(query, sequence * query_stride + head * query_head, d, WIDTH, ACC)
    total_out = tl.zeros((BLOCK_D,), ACC)
    peak = tl.full((), -float("inf"), ACC)
    total_weight = tl.zeros((), ACC)
    for first in range(begin, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        x = _block(rows, row, end, row_stride, d, WIDTH, ACC)
        score = tl.sum(q[None, :] * x, axis=1) * tl.full((), scale, ACC)
        score = tl.where(row < end, score, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(score, axis=0))
        weight = tl.where(row < end, tl.exp(score - new_peak), 0.0)
        shrink = tl.exp(peak - new_peak)
        total_weight = total_weight * shrink + tl.sum(weight, axis=0)
        if DROPOUT:
            weight = dropped(weight, number + (row - begin), head, drawn_by, drop_below, kept_scale)
        total_out = total_out * shrink + tl.sum(weight[:, None] * x, axis=0)
        peak = new_peak
    total_weight = tl.where(begin < end, total_weight, 1.0)
    at = sequence * HEADS + head
    tl.store(out + at * WIDTH + d, (total_out / total_weight).to(out.dtype.element_ty), mask=d < WIDTH)
    tl.store(lse + at, peak + tl.log(total_weight))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def backward_heads(grad_out, query, rows, cu, out, lse, grad_query, grad_rows, flag, sequences: tl.int64, total: tl.int64,
                   grad_stride: tl.int64, grad_head: tl.int64, query_stride: tl.int64, query_head: tl.int64,
                   row_stride: tl.int64, scale: tl.float64, seed: tl.uint64, seed_at, drop_below: tl.int64,
                   kept_scale: tl.float64, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr):
    """grad_query (s, H, d): the first H programs of a sequence. grad_rows (T, d): the last."""
    sequence = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    begin, end = _span(cu, sequence, sequences, total, flag)
    number = _first_number(cu, sequence, sequences, DROPOUT)
    drawn_by = drawing_seed(seed, seed_at)
    sums_rows = part == HEADS
    first_head = tl.where(sums_rows, 0, part)
    last_head = tl.where(sums_rows, HEADS, part + 1)
    total_query = tl.zeros((BLOCK_D,), ACC)
    for first in range(begin, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        x = _block(rows, row, end, row_stride, d, WIDTH, ACC)
        total_rows = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        for head in range(first_head, last_head):
            q = _one(query, sequence * query_stride + head * query_head, d, WIDTH, ACC)
            g = _one(grad_out, sequence * grad_stride + head * grad_head, d, WIDTH, ACC)
            at = sequence * HEADS + head
            mean = tl.sum(g * _one(out, at * WIDTH, d, WIDTH, ACC), axis=0)
            weight, slope = _gradients(x, row < end, q, g, tl.load(lse + at).to(ACC), mean, scale, number + (row - begin), head,
                                       drawn_by, drop_below, kept_scale, DROPOUT, ACC)
            if sums_rows:
                total_rows += weight[:, None] * g[None, :] + slope[:, None] * q[None, :]
            else:
                total_query += tl.sum(slope[:, None] * x, axis=0)
        here = (row < tl.where(sums_rows, end, begin))[:, None] & (d < WIDTH)[None, :]
        tl.store(grad_rows + row[:, None] * WIDTH + d[None, :], total_rows.to(grad_rows.dtype.element_ty), mask=here)
    at = (sequence * HEADS + part) * WIDTH + d
    tl.store(grad_query + at, total_query.to(grad_query.dtype.element_ty), mask=d < tl.where(sums_rows, 0, WIDTH))


# ------------------------------------------------------------------------------------------------------------------ launches


def blocks(query: Tensor, elements: int) -> dict:
    """The compile-time arguments that both kernels share; ``elements``: of a block in float32, that spill no register."""
    _, heads, width = query.shape
    double = query.dtype == torch.float64
    columns = max(16, triton.next_power_of_2(width))
    return {
        "HEADS": heads,
        "WIDTH": width,
        "BLOCK_D": columns,
        "BLOCK_N": max(1, min(32, elements // (columns * (2 if double else 1)))),
        "ACC": tl.float64 if double else tl.float32,
    }


@on_device
def forward(query: Tensor, rows: Tensor, cu: Tensor, scale: float, dropout_p: float, seed: int, seed_at: Tensor | None = None
            ) -> tuple[Tensor, Tensor]:
    """out (s, H, d), and lse (s, H) that backward needs.

    All tensors of one device and checked but for what cu holds; rows of query and rows dense, cu contiguous. seed_at: one int64
    on the device, XORed to ``seed`` when a kernel draws; None: nothing is.

    Raises:
        IndexError: what an earlier kernel found in its offsets.
    """
    if query.is_cuda:
        raise_pending()
    sequences, heads, _ = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty((sequences, heads), dtype=torch.float64 if query.dtype == torch.float64 else torch.float32,
                      device=query.device)
    if sequences:
        forward_heads[sequences, heads](
            query, rows, cu, out, lse, device_flag(), sequences, rows.shape[0], query.stride(0), query.stride(1), rows.stride(0),
            scale, **dropout_arguments(dropout_p, seed, seed_at), **blocks(query, 8192),
        )
    return out, lse


@on_device
def backward(grad_out: Tensor, query: Tensor, rows: Tensor, cu: Tensor, out: Tensor, lse: Tensor, scale: float, dropout_p: float,
             seed: int, seed_at: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of query and rows; rows of grad_out dense. As `forward`."""
    sequences, heads, _ = query.shape
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if sequences:
        backward_heads[sequences, heads + 1](
            grad_out, query, rows, cu, out, lse, grad_query, grad_rows, device_flag(), sequences, rows.shape[0],
            grad_out.stride(0), grad_out.stride(1), query.stride(0), query.stride(1), rows.stride(0), scale,
            **dropout_arguments(dropout_p, seed, seed_at), **blocks(query, 2048), num_warps=8,
        )
    return grad_query, grad_rows
