"""What Triton kernels over tiles of scores share: products of rows, the sizes of tiles, and torch's own products in full.

Triton compiles a kernel again for each way in which its arguments are multiples of 16 or not, which takes a third of a second.
So sizes that change from batch to batch are not specialised, and views begin at 16 bytes; what is read or written as a matrix
has rows of a length that is.
"""
# Triton reads annotations as they stand, so this file has no `from __future__ import annotations`.

import torch
import triton
import triton.language as tl
from torch import Tensor

ENOUGH = 128  # programs below which a smaller tile is taken


@triton.jit
def products(left, right, i, j, rows, columns, DIM: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
             BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """(BLOCK_I, BLOCK_J): the products of rows i of ``left`` and j of ``right``; places past the end repeat the last row."""
    k = tl.arange(0, BLOCK_K)
    a = left + tl.minimum(i, rows - 1).to(tl.int64)[:, None] * DIM + k[None, :]
    b = right + tl.minimum(j, columns - 1).to(tl.int64)[None, :] * DIM + k[:, None]
    z = tl.zeros((BLOCK_I, BLOCK_J), ACC)
    for first in range(0, DIM, BLOCK_K):
        if DIM % BLOCK_K == 0:
            z = tl.dot(tl.load(a), tl.load(b), z, input_precision=PRECISION, out_dtype=ACC)
        else:
            x = tl.load(a, mask=(k < DIM - first)[None, :], other=0.0)
            y = tl.load(b, mask=(k < DIM - first)[:, None], other=0.0)
            z = tl.dot(x, y, z, input_precision=PRECISION, out_dtype=ACC)
        a += BLOCK_K
        b += BLOCK_K
    return z


@triton.jit
def row_products(left, right, row, k, DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """(BLOCK_S,): the products of one row with rows of ``right``, int64; 0 where ``row`` is -1."""
    z = tl.zeros((BLOCK_S,), ACC)
    for first in range(0, DIM, BLOCK_K):
        d = first + k
        one = tl.load(left + d, mask=d < DIM, other=0.0).to(ACC)
        here = (row >= 0)[:, None] & (d < DIM)[None, :]
        many = tl.load(right + row[:, None] * DIM + d[None, :], mask=here, other=0.0).to(ACC)
        z += tl.sum(one[None, :] * many, axis=1)
    return z


@triton.jit
def finite(peak):
    """The maximum of no score, -inf, as a number that may be subtracted."""
    return tl.where(peak == -float("inf"), 0.0, peak)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores and sums run in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tile_of(rows: int, columns: int, choices: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Rows and columns of a tile: the first of ``choices``, from the largest to the least, of whose sides no half would be empty
    and that makes programs enough; else the last. Few choices: Triton compiles for each."""
    for i, j in choices[:-1]:
        if i < 2 * rows and j < 2 * columns and triton.cdiv(rows, i) * triton.cdiv(columns, j) >= ENOUGH:
            return i, j
    return choices[-1]


def tile_options(block_i: int, block_j: int, dim: int, dtype: torch.dtype) -> dict:
    """The compile-time arguments of `products`, but for its rows and columns, and the options of a kernel that calls it."""
    half = dtype in (torch.float16, torch.bfloat16)
    # the largest block of depth that wastes no more than an eighth
    fits = [k for k in ((64, 32, 16) if half else (32, 16)) if k * triton.cdiv(dim, k) <= 1.125 * dim]
    return {
        "BLOCK_K": fits[0] if fits else 16,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": 8 if block_i * block_j >= 128 * 128 else 4,
        "num_stages": 3 if half else 2,
    }


def row_options(dim: int, dtype: torch.dtype) -> dict:
    """The compile-time arguments of `row_products` that do not depend on how many rows are taken at once."""
    return {
        "DIM": dim,
        "BLOCK_K": min(128, triton.next_power_of_2(dim)),
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in ``dtype``, of which half-precision products on a GPU are a kind of their own."""
    if a.dtype == dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)
