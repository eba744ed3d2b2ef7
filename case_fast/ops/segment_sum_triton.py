"""segment_sum in Triton, forward (the sum) and backward (the gather).

    out_s = sum of x_i over the rows i with segment[i] = s        grad_x_i = grad_out_(segment[i])

One program of forward serves a segment and a block of columns. It goes through the rows in blocks of BLOCK_N and loads only those
of its own: one launch, which sorts nothing. Where rows times segments are many, they are sorted first, and a program goes through
its own places of that order. Rows are added block by block in ascending order, and there are no atomics: the same inputs give the
same bits. Sums run in float32, in float64 for float64 tensors. Numbers out of range are never followed (`device_flag`).
"""
# Triton reads annotations as they stand, so this file has no `from __future__ import annotations`.


import torch
import triton
import triton.language as tl
from torch import Tensor

from case_fast.ops import device_flag as flags
from case_fast.ops.common import dense_rows
from case_fast.ops.device_flag import device_flag, raise_pending
from case_fast.ops.triton_launch import on_device

BAD_SEGMENT = tl.constexpr(flags.BAD_SEGMENT)
MOST_LOOKS = 1 << 24  # rows times segments: looks at a number, some microseconds; beyond, a sort costs less
SIZES = ["rows", "size", "width", "stride"]
POINTERS = ["x", "segment", "order", "start", "out", "grad_out", "grad_x"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def forward_sums(x, segment, order, start, out, flag, rows: tl.int64, size: tl.int64, width: tl.int64, stride: tl.int64,
                 ORDERED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """out (size, width). ORDERED: the rows of segment s are order[start[s]:start[s + 1]]."""
    own = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.full((), 0, tl.int64)
    end = rows
    looks = own + tl.program_id(1) == 0  # the program that looks for what names nothing
    if ORDERED:
        begin = tl.load(start + own)
        end = tl.load(start + own + 1)
        bad = looks & ((tl.load(start) != 0) | (tl.load(start + size) != rows))  # those are sorted to both ends
        tl.store(flag, BAD_SEGMENT, mask=bad)
    total = tl.zeros((BLOCK_D,), ACC)
    for first in range(begin, end, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        here = place < end
        if ORDERED:
            row = tl.load(order + place, mask=here, other=0)
            mine = here
        else:
            row = place
            named = tl.load(segment + place, mask=here, other=0).to(tl.int64)
            bad = here & ((named < 0) | (named >= size))
            tl.store(flag, BAD_SEGMENT, mask=looks & (tl.sum(bad.to(tl.int32), axis=0) > 0))
            mine = here & (named == own)
        if tl.sum(mine.to(tl.int32), axis=0) > 0:
            taken = mine[:, None] & (d < width)[None, :]
            total += tl.sum(tl.load(x + row[:, None] * stride + d[None, :], mask=taken, other=0.0).to(ACC), axis=0)
    tl.store(out + own * width + d, total.to(out.dtype.element_ty), mask=d < width)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def backward_rows(grad_out, segment, grad_x, flag, rows: tl.int64, size: tl.int64, width: tl.int64, stride: tl.int64,
                  BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """grad_x (rows, width); a row whose number names nothing is NaN."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    here = place < rows
    named = tl.load(segment + place, mask=here, other=0).to(tl.int64)
    good = here & (named >= 0) & (named < size)
    tl.store(flag, BAD_SEGMENT, mask=tl.sum((here & ~good).to(tl.int32), axis=0) > 0)
    inside = (d < width)[None, :]
    found = tl.load(grad_out + named[:, None] * stride + d[None, :], mask=good[:, None] & inside, other=float("nan"))
    tl.store(grad_x + place[:, None] * width + d[None, :], found, mask=here[:, None] & inside)


# ------------------------------------------------------------------------------------------------------------------ launches


def blocks(width: int) -> dict:
    """The compile-time arguments that both kernels share: one variant for rows of a few numbers, and one for the others."""
    return {"BLOCK_N": 256, "BLOCK_D": 4} if width <= 4 else {"BLOCK_N": 32, "BLOCK_D": 64}


def in_order(segment: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The rows by segment, ascending within one: order (n,) and start (size + 1,). Waits for nothing on the device."""
    named, order = torch.sort(segment, stable=True)
    return order, torch.searchsorted(named, torch.arange(size + 1, device=segment.device, dtype=segment.dtype))


@on_device
def forward(x: Tensor, segment: Tensor, size: int) -> Tensor:
    """out (size, ...), in the dtype of x. Checked but for what segment names.

    Raises:
        IndexError: what an earlier kernel found in its indices.
    """
    if x.is_cuda:
        raise_pending()
    out = x.new_empty((size, *x.shape[1:]))
    if not out.numel():
        return out
    rows, width, stride = dense_rows(x)
    segment, order, start = segment.contiguous(), None, None
    if rows.shape[0] * size > MOST_LOOKS:
        order, start = in_order(segment, size)
    sizes = blocks(width)
    forward_sums[size, triton.cdiv(width, sizes["BLOCK_D"])](
        rows, segment, order, start, out, device_flag(), rows.shape[0], size, width, stride,
        ORDERED=order is not None, ACC=tl.float64 if x.dtype == torch.float64 else tl.float32, **sizes,
    )
    return out


@on_device
def backward(grad_out: Tensor, segment: Tensor) -> Tensor:
    """grad_x (n, ...), in the dtype of grad_out; and `take`. As `forward`."""
    if grad_out.is_cuda:
        raise_pending()
    grad_x = grad_out.new_empty((segment.shape[0], *grad_out.shape[1:]))
    if not grad_x.numel():
        return grad_x
    rows, width, stride = dense_rows(grad_out)
    sizes = blocks(width)
    backward_rows[triton.cdiv(segment.shape[0], sizes["BLOCK_N"]), triton.cdiv(width, sizes["BLOCK_D"])](
        rows, segment.contiguous(), grad_x, device_flag(), segment.shape[0], rows.shape[0], width, stride, **sizes,
    )
    return grad_x
