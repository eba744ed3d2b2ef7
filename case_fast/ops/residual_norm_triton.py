"""residual_norm in Triton, forward and backward.

    total = x + dropout(update)      normed = (total - mean) inverse weight + bias      inverse = 1 / sqrt(variance + eps)

A program of forward serves a row, one of backward a few rows that depend on their number alone. It writes down its share of the
gradients of weight and bias, and a second launch adds the shares in order. There are no atomics: the same inputs give the same
bits. A row of d numbers is a masked block of the next power of two (300 occupies 512). Sums run in float32, in float64 for
float64 tensors.
"""
# Triton reads annotations as they stand, so this file has no `from __future__ import annotations`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from case_fast.ops.triton_launch import drawing_seed, on_device

MOST_SHARES = 256  # programs of backward: about two for each multiprocessor of an H100
SEEDS = ["rows", "each", "shares", "seed", "seed_at", "drop_below"]


@triton.jit
def _kept(row, key, drop_below, kept_scale, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """(BLOCK_D,): what dropout multiplies a row's columns by; the same ones as `reference.residual_keep`."""
    eight = tl.arange(0, BLOCK_D // 8).to(tl.uint32)
    zero = eight * 0
    words = tl.philox_impl(zero + row.to(tl.uint32), zero + (row >> 32).to(tl.uint32), eight, zero + 1, key.to(tl.uint32),
                           (key >> 32).to(tl.uint32))
    word = tl.interleave(tl.interleave(words[0], words[2]), tl.interleave(words[1], words[3]))
    half = tl.interleave(word & 0xFFFF, word >> 16).to(tl.int32)
    return tl.where(half >= drop_below, tl.full((), kept_scale, ACC), 0.0)


@triton.jit(do_not_specialize=SEEDS)
def forward_rows(x, update, weight, bias, total, normed, stats, rows: tl.int64, eps: tl.float64, seed: tl.uint64, seed_at,
                 drop_below: tl.int32, kept_scale: tl.float64, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, DROPS: tl.constexpr,
                 ACC: tl.constexpr):
    """total, where anything is added, and normed (rows, WIDTH); stats (2, rows): mean and inverse."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    here = d < WIDTH
    at = row * WIDTH + d
    t = tl.load(x + at, mask=here, other=0.0).to(ACC)
    if update is not None:
        added = tl.load(update + at, mask=here, other=0.0).to(ACC)
        if DROPS:
            added *= _kept(row, drawing_seed(seed, seed_at), drop_below, kept_scale, BLOCK_D, ACC)
        rounded = (t + added).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=here)
        t = rounded.to(ACC)  # of what backward will read
    mean = tl.sum(t, axis=0) / WIDTH
    centred = tl.where(here, t - mean, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / WIDTH + tl.full((), eps, ACC))
    w = tl.load(weight + d, mask=here, other=0.0).to(ACC)
    b = tl.load(bias + d, mask=here, other=0.0).to(ACC)
    tl.store(normed + at, (centred * inverse * w + b).to(normed.dtype.element_ty), mask=here)
    tl.store(stats + row, mean)
    tl.store(stats + rows + row, inverse)


@triton.jit(do_not_specialize=SEEDS)
def backward_rows(total, stats, weight, grad_total, grad_normed, grad_x, grad_update, share, rows: tl.int64, each: tl.int64,
                  seed: tl.uint64, seed_at, drop_below: tl.int32, kept_scale: tl.float64, WIDTH: tl.constexpr,
                  BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """grad_x and, where it is wanted, grad_update (rows, WIDTH); share (shares, 2, WIDTH) of the gradients of weight and bias."""
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    here = d < WIDTH
    w = tl.load(weight + d, mask=here, other=0.0).to(ACC)
    of_weight = tl.zeros((BLOCK_D,), ACC)
    of_bias = tl.zeros((BLOCK_D,), ACC)
    for place in range(0, tl.minimum(each, rows - program * each)):
        row = program * each + place
        at = row * WIDTH + d
        mean = tl.load(stats + row)
        inverse = tl.load(stats + rows + row)
        z = (tl.load(total + at, mask=here, other=0.0).to(ACC) - mean) * inverse
        y = tl.load(grad_normed + at, mask=here, other=0.0).to(ACC)
        of_weight += y * z
        of_bias += y
        g = y * w
        centre = tl.sum(g, axis=0) / WIDTH
        slope = tl.sum(g * z, axis=0) / WIDTH
        grad = (g - centre - z * slope) * inverse
        if grad_total is not None:
            grad += tl.load(grad_total + at, mask=here, other=0.0).to(ACC)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=here)
        if grad_update is not None:
            grad *= _kept(row, drawing_seed(seed, seed_at), drop_below, kept_scale, BLOCK_D, ACC)
            tl.store(grad_update + at, grad.to(grad_update.dtype.element_ty), mask=here)
    tl.store(share + program * 2 * WIDTH + d, of_weight, mask=here)
    tl.store(share + program * 2 * WIDTH + WIDTH + d, of_bias, mask=here)


@triton.jit(do_not_specialize=SEEDS)
def share_sums(share, grad_weight, grad_bias, shares, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
               ACC: tl.constexpr):
    """grad_weight and grad_bias (WIDTH,) from share (shares, 2, WIDTH)."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), ACC)
    for first in range(0, shares, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        here = (s < shares)[:, None] & (column < 2 * WIDTH)[None, :]
        total += tl.sum(tl.load(share + s[:, None] * (2 * WIDTH) + column[None, :], mask=here, other=0.0), axis=0)
    found = total.to(grad_weight.dtype.element_ty)
    tl.store(grad_weight + column, found, mask=column < WIDTH)
    tl.store(grad_bias + column - WIDTH, found, mask=(column >= WIDTH) & (column < 2 * WIDTH))


@triton.jit(do_not_specialize=SEEDS)
def drop_rows(update, base, out, seed: tl.uint64, seed_at, drop_below: tl.int32, kept_scale: tl.float64, WIDTH: tl.constexpr,
              BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """out (rows, WIDTH) = base + dropout(update)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    here = d < WIDTH
    at = row * WIDTH + d
    kept = _kept(row, drawing_seed(seed, seed_at), drop_below, kept_scale, BLOCK_D, ACC)
    t = tl.load(update + at, mask=here, other=0.0).to(ACC) * kept
    if base is not None:
        t += tl.load(base + at, mask=here, other=0.0).to(ACC)
    tl.store(out + at, t.to(out.dtype.element_ty), mask=here)


# ------------------------------------------------------------------------------------------------------------------ launches


def blocks(x: Tensor) -> dict:
    """What all kernels over rows are compiled for."""
    width = x.shape[1]
    block = max(16, triton.next_power_of_2(width))
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    return {"WIDTH": width, "BLOCK_D": block, "ACC": acc}


def draws(dropout_p: float) -> tuple[int, float]:
    """drop_below and kept_scale."""
    below = int(dropout_p * 2**16)
    return below, 2**16 / (2**16 - below)


@on_device
def forward(x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dropout_p: float, seed: int,
            seed_at: Tensor | None, total: Tensor, normed: Tensor, stats: Tensor) -> None:
    """Into total, where anything is added, normed and stats. All contiguous."""
    rows = x.shape[0]
    if rows:
        total = None if update is None else total
        forward_rows[rows,](x, update, weight, bias, total, normed, stats, rows, eps, seed, seed_at, *draws(dropout_p),
                            DROPS=dropout_p > 0, **blocks(x))


@on_device
def backward(total: Tensor, stats: Tensor, weight: Tensor, grad_total: Tensor | None, grad_normed: Tensor, dropout_p: float,
             seed: int, seed_at: Tensor | None, grad_x: Tensor, grad_update: Tensor | None, grad_weight: Tensor, grad_bias: Tensor
             ) -> None:
    """Into the last four; grad_update is there where dropout_p > 0. All contiguous."""
    rows, width = total.shape
    each = max(1, triton.cdiv(rows, MOST_SHARES))
    shares, sizes = triton.cdiv(rows, each), blocks(total)
    share = stats.new_empty(shares, 2, width)
    if rows:
        backward_rows[shares,](total, stats, weight, grad_total, grad_normed, grad_x, grad_update, share, rows, each, seed,
                               seed_at, *draws(dropout_p), **sizes)
    share_sums[triton.cdiv(2 * width, 16),](share, grad_weight, grad_bias, shares, WIDTH=width, BLOCK_S=128, BLOCK_C=16,
                                            ACC=sizes["ACC"])


@on_device
def drop(update: Tensor, base: Tensor | None, dropout_p: float, seed: int, seed_at: Tensor | None, out: Tensor) -> None:
    """Into out. All contiguous."""
    if update.shape[0]:
        drop_rows[update.shape[0],](update, base, out, seed, seed_at, *draws(dropout_p), **blocks(update))
