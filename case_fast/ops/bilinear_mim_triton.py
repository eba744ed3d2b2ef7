"""bilinear_mim in Triton, forward and backward, in-batch and sampled: what runs it on GPUs.

    side_y_p = log( exp S_pc + sum_{q != c} exp S_pq ) - S_pc             over rows of y;  c = positive[p],
    side_x_p = log( exp S_pc + sum_{p': c' != c} exp S_p'c ) - S_pc       over rows of x;  S = sigmoid(x W y^T) or x y^T

In-batch, forward scores each tile of (P, Q) once, and both sums of a tile are added to those of its row and its column: as
parts (tiles, rows) that are added in a fixed order, or with ``deterministic=False`` by atomics. For the sigmoid, 0 < S < 1, no
running maximum is needed; "dot" keeps one for each row and column. Backward scores again, writes the gradient of the scores in
blocks of at most BLOCK_BYTES, and multiplies these by x W and y with torch's own matrix products.

Depth is cut into blocks of BLOCK_K, to whose multiple x W and y are padded: 300 occupies 320. Sampled, one program serves one
pair; its 1 + 2k scores are kept, and rows collect their gradients from a list sorted by row. Products run in the inputs'
dtype and add in float32 (float64 for float64); float32 is not rounded to TF32 unless torch is told so for its own products.
"""
# Triton reads annotations as they stand, so this file has no `from __future__ import annotations`.

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from case_fast.ops import device_flag as flags
from case_fast.ops.device_flag import device_flag, raise_pending
from case_fast.ops.triton_launch import drawing_seed, on_device
from case_fast.ops.triton_tiles import finite, product, products, row_options, row_products, sum_dtype, tile_of, tile_options

BLOCK_ROWS = 4096  # rows of x at once: bounds the parts of the sums
BLOCK_BYTES = 32 << 20  # of the scores' gradient at once
_HALF_TILES = (64, 128), (32, 32)
TILES = {  # (rows of x, rows of y), the largest first: none spills, and of the largest two blocks or more fit an SM of sm_90
    torch.float16: _HALF_TILES, torch.bfloat16: _HALF_TILES, torch.float32: ((64, 64), (32, 32)), torch.float64: ((32, 32),),
}
BAD_POSITIVE = tl.constexpr(flags.BAD_POSITIVE)


# ------------------------------------------------------------------------------------------------------------------- pieces


@triton.jit
def _positives(positive, p, here, rows, flag):
    """The rows of y that pairs p belong to, int32; -1 where that is no row, and where there is no pair."""
    c = tl.load(positive + p, mask=here, other=-1).to(tl.int64)
    good = (c >= 0) & (c < rows)
    tl.store(flag, BAD_POSITIVE, mask=tl.sum((here & ~good).to(tl.int32), axis=0) > 0)
    return tl.where(good, c, -1).to(tl.int32)


@triton.jit
def _existing(sizes, PLACE: tl.constexpr, size, before):
    """How many of the pairs (PLACE 0) or rows of y (1) ``before`` + [0, size) exist: all where sizes is None."""
    if sizes is not None:
        size = tl.minimum(tl.maximum(tl.load(sizes + PLACE) - before, 0), size).to(tl.int32)
    return size


# ----------------------------------------------------------------------------------------------------------------- in-batch


@triton.jit(do_not_specialize=["pairs", "rows", "first"])
def sum_tiles(xw, y, positive, logit, row_sum, row_peak, column_sum, column_peak, flag, pairs, rows, first, sizes,
              DOT: tl.constexpr, ATOMIC: tl.constexpr, DEPTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
              BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """One tile's sums of exp S over its rows and its columns, without the positives; and the positives' logits.

    row_sum, row_peak: (tiles of y, pairs); column_sum, column_peak: (tiles of x, rows). ATOMIC: (pairs,) and (rows,). first: the
    number of the first of these pairs; sizes: how many pairs and rows exist, or None.
    """
    tile_p, tile_q = tl.program_id(0), tl.program_id(1)
    p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    q = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    here_p, here_q = p < pairs, q < rows
    z = products(xw, y, p, q, pairs, rows, DEPTH, BLOCK_P, BLOCK_Q, BLOCK_K, PRECISION, ACC)
    exist_p = p < _existing(sizes, 0, pairs, first)
    exist_q = q < _existing(sizes, 1, rows, 0)
    c = _positives(positive, p, exist_p, rows, flag)
    own = c[:, None] == q[None, :]
    mine = (c >= tile_q * BLOCK_Q) & (c < (tile_q + 1) * BLOCK_Q)
    tl.store(logit + p, tl.sum(tl.where(own, z, 0.0), axis=1), mask=mine)  # one tile of each row has it
    other = exist_p[:, None] & exist_q[None, :] & ~own
    if DOT:
        z = tl.where(other, z, -float("inf"))
        peak_p, peak_q = tl.max(z, axis=1), tl.max(z, axis=0)
        sum_p = tl.sum(tl.exp(z - finite(peak_p)[:, None]), axis=1)
        sum_q = tl.sum(tl.exp(z - finite(peak_q)[None, :]), axis=0)
        tl.store(row_peak + tile_q * pairs + p, peak_p, mask=here_p)
        tl.store(column_peak + tile_p.to(tl.int64) * rows + q, peak_q, mask=here_q)
    else:
        weight = tl.where(other, tl.exp(1 / (1 + tl.exp(-z))), 0.0)
        sum_p, sum_q = tl.sum(weight, axis=1), tl.sum(weight, axis=0)
    if ATOMIC:
        tl.atomic_add(row_sum + p, sum_p, mask=here_p)
        tl.atomic_add(column_sum + q, sum_q, mask=here_q)
    else:
        tl.store(row_sum + tile_q.to(tl.int64) * pairs + p, sum_p, mask=here_p)
        tl.store(column_sum + tile_p.to(tl.int64) * rows + q, sum_q, mask=here_q)


@triton.jit(do_not_specialize=["pairs", "rows", "first", "all_rows", "first_pair"])
def gradient_tiles(xw, y, positive, row_weight, row_peak, column_weight, column_peak, own_gradient, out, flag, pairs, rows,
                   first, all_rows, stride, first_pair, sizes, DOT: tl.constexpr, DEPTH: tl.constexpr, BLOCK_P: tl.constexpr,
                   BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """out (pairs, stride): the loss's gradient of the scores of these rows of x with rows [first, first + rows) of y. Columns
    from ``rows`` on are undefined: stride, a multiple of BLOCK_Q, has room for whole tiles, which are stored without a mask.

    e^S S (1 - S) (row_weight_p + column_weight_q), for "dot" row_weight_p e^(S - row_peak_p) + column_weight_q e^(S -
    column_peak_q); own_gradient_p for the positive; 0 beyond the pairs, from first_pair on, and the rows that exist.
    """
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    here_p, here_q = p < pairs, q < rows
    z = products(xw, y, p, q, pairs, rows, DEPTH, BLOCK_P, BLOCK_Q, BLOCK_K, PRECISION, ACC)
    a = tl.load(row_weight + p, mask=here_p, other=0.0)[:, None]
    b = tl.load(column_weight + q, mask=here_q, other=0.0)[None, :]
    if DOT:
        peak_p = tl.load(row_peak + p, mask=here_p, other=0.0)[:, None]
        peak_q = tl.load(column_peak + q, mask=here_q, other=0.0)[None, :]
        gradient = a * tl.exp(z - peak_p) + b * tl.exp(z - peak_q)
    else:
        s = 1 / (1 + tl.exp(-z))
        gradient = tl.exp(s) * s * (1 - s) * (a + b)
    exist_p = p < _existing(sizes, 0, pairs, first_pair)
    exist_q = q < _existing(sizes, 1, rows, first)
    gradient = tl.where(exist_p[:, None] & exist_q[None, :], gradient, 0.0)
    c = _positives(positive, p, exist_p, all_rows, flag)
    own = tl.load(own_gradient + p, mask=here_p, other=0.0)[:, None]
    gradient = tl.where(c[:, None] == (q + first)[None, :], own, gradient)
    tl.store(out + p.to(tl.int64)[:, None] * stride + q[None, :], gradient.to(out.dtype.element_ty), mask=here_p[:, None])


@triton.jit(do_not_specialize=["pairs", "rows"])
def group_sums(value, positive, out, pairs, rows, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """out_q: the sum of value_p over the pairs p of row q of y, in ascending order of blocks of p."""
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, pairs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        c = tl.load(positive + p, mask=p < pairs, other=-1)
        v = tl.load(value + p, mask=p < pairs, other=0.0)
        total += tl.sum(tl.where(c[:, None] == q[None, :], v[:, None], 0.0), axis=0)
    tl.store(out + q, total, mask=q < rows)


# ------------------------------------------------------------------------------------------------------------------ sampled


@triton.jit
def _draw(slot, p, n, key, SIDE: tl.constexpr):
    """(Philox(slot, p, SIDE, 0) * n) >> 32, as `reference.draw_negatives`."""
    zero = slot * 0
    word, _, _, _ = tl.philox_impl(slot.to(tl.uint32), (zero + p).to(tl.uint32), (zero + SIDE).to(tl.uint32),
                                   zero.to(tl.uint32), key.to(tl.uint32), (key >> 32).to(tl.uint32))
    return ((word.to(tl.uint64) * n.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit(do_not_specialize=["pairs", "rows", "negatives", "steps", "seed", "seed_at"])
def draw_rows(positive, members, start, over_y, over_x, flag, pairs, rows, negatives, steps, seed: tl.uint64, seed_at, sizes,
              BLOCK: tl.constexpr):
    """over_y, over_x (pairs, negatives): the rows drawn; -1 where there is none to draw.

    members: the pairs that exist, ordered by their row of y; start (rows + 1,): where a row's members begin; steps: bits of
    `pairs`; sizes: how many pairs and rows exist, or None.
    """
    p = tl.program_id(0)
    pairs, rows = _existing(sizes, 0, pairs, 0), _existing(sizes, 1, rows, 0)
    c = tl.load(positive + p).to(tl.int64)
    good = (c >= 0) & (c < rows) & (p < pairs)
    tl.store(flag, BAD_POSITIVE, mask=~good & (p < pairs))
    begin = tl.load(start + c, mask=good, other=0)
    size = tl.load(start + c + 1, mask=good, other=0) - begin
    others_y, others_x = size * 0 + (rows - 1), pairs - size
    key = drawing_seed(seed, seed_at)
    for first in range(0, negatives, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        here = slot < negatives
        at = p.to(tl.int64) * negatives + slot
        r = _draw(slot, p, others_y, key, 0)
        tl.store(over_y + at, tl.where(good & (others_y > 0), r + (r >= c), -1), mask=here)
        # The r-th pair outside the group is r + the number of members m_i of the group with m_i - i <= r, which ascends in i.
        r = _draw(slot, p, others_x, key, 1)
        low = r * 0
        high = low + size
        for _ in range(steps):
            middle = (low + high) // 2
            open_ = low < high
            m = tl.load(members + begin + middle, mask=open_, other=0)
            before = open_ & (m - middle <= r)
            low = tl.where(before, middle + 1, low)
            high = tl.where(open_ & ~before, middle, high)
        tl.store(over_x + at, tl.where(good & (others_x > 0), r + low, -1), mask=here)


@triton.jit(do_not_specialize=["rows", "negatives"])
def sampled_scores(xw, y, positive, over_y, over_x, out, rows, negatives, DIM: tl.constexpr, BLOCK_S: tl.constexpr,
                   BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """out (pairs, 1 + 2 negatives): x_p W y of the positive, of the rows of y drawn, and of its own y with the rows of x drawn.

    -inf where there was no row to draw; NaN for a positive that is no row of y.
    """
    p = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    c = tl.load(positive + p).to(tl.int64)
    good = (c >= 0) & (c < rows)
    c = tl.where(good, c, 0)
    own = tl.zeros((BLOCK_K,), ACC)
    for first in range(0, DIM, BLOCK_K):
        d = first + k
        one = tl.load(xw + p * DIM + d, mask=d < DIM, other=0.0).to(ACC)
        own += one * tl.load(y + c * DIM + d, mask=d < DIM, other=0.0).to(ACC)
    out += p * (1 + 2 * negatives)
    tl.store(out, tl.where(good, tl.sum(own, axis=0), float("nan")))
    for first in range(0, negatives, BLOCK_S):
        slot = first + tl.arange(0, BLOCK_S)
        here = slot < negatives
        row = tl.load(over_y + p * negatives + slot, mask=here, other=-1)
        z = row_products(xw + p * DIM, y, row, k, DIM, BLOCK_S, BLOCK_K, ACC)
        tl.store(out + 1 + slot, tl.where(row >= 0, z, -float("inf")), mask=here)
        row = tl.load(over_x + p * negatives + slot, mask=here, other=-1)
        z = row_products(y + c * DIM, xw, row, k, DIM, BLOCK_S, BLOCK_K, ACC)
        tl.store(out + 1 + negatives + slot, tl.where(row >= 0, z, -float("inf")), mask=here)


@triton.jit
def collect_rows(order, start, other, gradient, source, out, DIM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
                 ACC: tl.constexpr):
    """out_i: the sum of gradient_e source[other_e] over the entries e of row i: order[start_i : start_(i + 1)]."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin, end = tl.load(start + row), tl.load(start + row + 1)
    total = tl.zeros((BLOCK_K,), ACC)
    for first in range(begin, end, BLOCK_E):
        place = first + tl.arange(0, BLOCK_E)
        here = place < end
        entry = tl.load(order + place, mask=here, other=0)
        amount = tl.load(gradient + entry, mask=here, other=0.0)
        i = tl.load(other + entry, mask=here, other=0)
        part = tl.load(source + i[:, None] * DIM + d[None, :], mask=here[:, None] & (d < DIM)[None, :], other=0.0).to(ACC)
        total += tl.sum(amount[:, None] * part, axis=0)
    tl.store(out + row * DIM + d, total.to(out.dtype.element_ty), mask=d < DIM)


# ------------------------------------------------------------------------------------------------------------------ launches


def tiles(pairs: int, rows: int, dim: int, dtype: torch.dtype) -> dict:
    """The compile-time arguments that the kernels over tiles share. A function of shapes alone: so is the order of sums."""
    block_p, block_q = tile_of(pairs, rows, TILES[dtype])
    options = tile_options(block_p, block_q, dim, dtype)
    depth = options["BLOCK_K"] * triton.cdiv(dim, options["BLOCK_K"])
    return {"DEPTH": depth, "BLOCK_P": block_p, "BLOCK_Q": block_q} | options


def saved_elements(pairs: int, rows: int, num_negatives: int | None) -> int:
    """Of `forward`'s ``saved``: sums or scores that backward needs."""
    return sum(map(_aligned, _sections(pairs, rows))) if num_negatives is None else pairs * (1 + 2 * num_negatives)


def _sections(pairs: int, rows: int) -> tuple[int, ...]:
    """In-batch: sum_y, peak_y and logit of each pair, the sum and the peak of each row of y."""
    return pairs, pairs, pairs, rows, rows


def _aligned(size: int) -> int:
    """So many numbers that what lies behind them begins at 16 bytes, which spares Triton a variant for each way not to."""
    return -(-size // 4) * 4


def _split(saved: Tensor, pairs: int, rows: int) -> list[Tensor]:
    sizes = _sections(pairs, rows)
    return [part[:size] for part, size in zip(saved.split([*map(_aligned, sizes)]), sizes, strict=True)]


@on_device
def forward(x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor | None, num_negatives: int | None, seed: int,
            seed_at: Tensor | None, score: str, deterministic: bool = True, sizes: Tensor | None = None
            ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """side_y, side_x and the positives' logits, (P,) each, and what backward needs, (saved_elements,); float32 or float64.

    Args:
        x (P, d), y (Q, d), weight (d, d), None for score "dot": contiguous, of one dtype and device, checked.
        positive: (P,) int32 or int64; None: x_p belongs to y_p.
        seed_at: one int64 on the device, XORed to ``seed`` when a kernel draws; None: nothing is.
        deterministic: False adds the sums of "bilinear_sigmoid" in-batch by atomics.
        sizes: (2,) int64, how many pairs and rows of y exist, read by the kernels; None: all do.

    Raises:
        IndexError: what an earlier kernel found in its indices.
    """
    if x.is_cuda:
        raise_pending()
    if not x.numel():
        sides = x.new_zeros((3, x.shape[0]), dtype=sum_dtype(x.dtype)).unbind()
        return *(side.clone() for side in sides), sides[0].new_zeros(saved_elements(x.shape[0], y.shape[0], num_negatives))
    run = _in_batch_forward if num_negatives is None else _sampled_forward
    *of_pairs, saved = run(x, y, weight, positive, num_negatives, seed, seed_at, score, deterministic, sizes)
    return *_of_existing(sizes, *of_pairs), saved


@on_device
def backward(grad_side_y: Tensor, grad_side_x: Tensor, x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor | None,
             saved: Tensor, num_negatives: int | None, seed: int, seed_at: Tensor | None, score: str, deterministic: bool = True,
             sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, y and weight (None without it), in their dtypes; the same bits every time. As `forward`."""
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(y), None if weight is None else torch.zeros_like(weight)
    run = _in_batch_backward if num_negatives is None else _sampled_backward
    grads = _of_existing(sizes, grad_side_y, grad_side_x)
    return run(*grads, x, y, weight, positive, saved, num_negatives, seed, seed_at, score, sizes)


def _of_existing(sizes: Tensor | None, *of_pairs: Tensor) -> tuple[Tensor, ...]:
    """What pairs (P,) have, 0 where they do not exist."""
    if sizes is None:
        return of_pairs
    exist = torch.arange(of_pairs[0].shape[0], device=sizes.device) < sizes[0]
    return tuple(torch.where(exist, x, 0) for x in of_pairs)


def _pair_of(x: Tensor, positive: Tensor | None) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) if positive is None else positive


def _padded(x: Tensor, depth: int) -> Tensor:
    return x if x.shape[1] == depth else F.pad(x, (0, depth - x.shape[1]))


def _projected(x: Tensor, weight: Tensor | None, depth: int) -> Tensor:
    """x W, padded to ``depth``."""
    return _padded(x, depth) if weight is None else x @ _padded(weight, depth)


def _sides(sum_y: Tensor, peak_y: Tensor, sum_x: Tensor, peak_x: Tensor, logit: Tensor, dot: bool) -> tuple[Tensor, Tensor]:
    """From the sums of exp(S - peak) over the negatives; peaks count for "dot" alone."""
    if dot:  # log(exp a + exp b) - b
        return tuple(F.softplus((peak - logit) + total.log(), threshold=40) for total, peak in ((sum_y, peak_y), (sum_x, peak_x)))
    relative = torch.exp(-torch.sigmoid(logit))
    return torch.log1p(sum_y * relative), torch.log1p(sum_x * relative)


def _pair_weights(total: Tensor, peak: Tensor, logit: Tensor, grad: Tensor, dot: bool) -> tuple[Tensor, Tensor]:
    """What exp(S - peak) is multiplied by in the gradient of S, and the positive's gradient of S; (P,) each."""
    if dot:
        share = grad * torch.sigmoid((peak - logit) + total.log())
        return (share / total).masked_fill(total == 0, 0), -share
    weight = grad / (torch.sigmoid(logit).exp() + total)
    return weight, -weight * total


def _slope(logit: Tensor, dot: bool) -> Tensor | float:
    """dS / dz."""
    if dot:
        return 1.0
    s = torch.sigmoid(logit)
    return s * (1 - s)


def _to_inputs(grad_xw: Tensor, x: Tensor, weight: Tensor | None, grad_weight: Tensor | None) -> Tensor:
    """The gradient of these rows of x from that of x W; that of W is added to ``grad_weight``."""
    grad_xw = grad_xw.to(x.dtype)
    if weight is None:
        return grad_xw
    grad_weight += product(x.T, grad_xw, grad_weight.dtype)
    return grad_xw @ weight.T


# ---- in-batch


def _in_batch_forward(x, y, weight, positive, num_negatives, seed, seed_at, score, deterministic, sizes):
    (pairs, dim), rows, dot = x.shape, y.shape[0], score == "dot"
    shared = tiles(pairs, rows, dim, x.dtype)
    xw, padded = _projected(x, weight, shared["DEPTH"]), _padded(y, shared["DEPTH"])
    pair = _pair_of(x, positive)
    atomic = not (deterministic or dot)
    full = sum_dtype(x.dtype)
    saved = torch.zeros(saved_elements(pairs, rows, None), dtype=full, device=x.device)
    sum_y, peak_y, logit, by_column, peaks = _split(saved, pairs, rows)
    logit.fill_(float("nan"))  # of a positive that is no row of y
    for first in range(0, pairs, BLOCK_ROWS):
        chunk = slice(first, min(first + BLOCK_ROWS, pairs))
        size = chunk.stop - first
        grid = (triton.cdiv(size, shared["BLOCK_P"]), triton.cdiv(rows, shared["BLOCK_Q"]))
        if atomic:
            row_sum, column_sum = sum_y[chunk], by_column
        else:
            row_sum, column_sum = saved.new_empty((grid[1], size)), saved.new_empty((grid[0], rows))
        row_peak, column_peak = (torch.empty_like(part) if dot else part for part in (row_sum, column_sum))
        sum_tiles[grid](xw[chunk], padded, pair[chunk], logit[chunk], row_sum, row_peak, column_sum, column_peak,
                        device_flag(), size, rows, first, sizes, DOT=dot, ATOMIC=atomic, **shared)
        if dot:
            sum_y[chunk], peak_y[chunk] = _added(row_sum, row_peak)
            if first:
                column_sum = torch.cat([column_sum, by_column.unsqueeze(0)])
                column_peak = torch.cat([column_peak, peaks.masked_fill(by_column == 0, -float("inf")).unsqueeze(0)])
            by_column[:], peaks[:] = _added(column_sum, column_peak)
        elif not atomic:
            torch.sum(row_sum, 0, out=sum_y[chunk])
            by_column += column_sum.sum(0)
    sum_x, peak_x = _of_pairs(positive, by_column, peaks)
    return *_sides(sum_y, peak_y, sum_x, peak_x, logit, dot), logit.clone(), saved


def _added(parts: Tensor, peaks: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over tiles relative to the largest peak; 0 and 0 of nothing."""
    peak = peaks.amax(0)
    peak = peak.masked_fill(peak == -float("inf"), 0)
    return (parts * (peaks - peak).exp()).sum(0), peak


def _of_pairs(positive: Tensor | None, *by_column: Tensor) -> tuple[Tensor, ...]:
    """What each pair's row of y has."""
    if positive is None:
        return by_column
    c = positive.long().clamp(0, by_column[0].shape[0] - 1)
    return tuple(x[c] for x in by_column)


def _in_batch_backward(grad_side_y, grad_side_x, x, y, weight, positive, saved, num_negatives, seed, seed_at, score, sizes):
    (pairs, dim), rows, dot = x.shape, y.shape[0], score == "dot"
    shared = tiles(pairs, rows, dim, x.dtype)
    xw, padded = _projected(x, weight, shared["DEPTH"]), _padded(y, shared["DEPTH"])
    pair = _pair_of(x, positive)
    sum_y, peak_y, logit, by_column, peaks = _split(saved, pairs, rows)
    (logit,) = _of_existing(sizes, logit)
    sum_x, peak_x = _of_pairs(positive, by_column, peaks)
    row_weight, own_y = _pair_weights(sum_y, peak_y, logit, grad_side_y, dot)
    of_pair, own_x = _pair_weights(sum_x, peak_x, logit, grad_side_x, dot)
    own = (own_y + own_x) * _slope(logit, dot)
    column_weight = of_pair
    if positive is not None:
        column_weight = saved.new_empty(rows)
        group_sums[triton.cdiv(rows, 64),](of_pair, positive, column_weight, pairs, rows, BLOCK=64, ACC=shared["ACC"])

    grad_x, grad_y = torch.empty_like(x), saved.new_zeros(y.shape)
    grad_weight = None if weight is None else saved.new_zeros(weight.shape)
    at_once = min(BLOCK_ROWS, pairs)
    wide_tile = shared["BLOCK_Q"]
    width = min(rows, max(1, BLOCK_BYTES // (at_once * x.element_size() * wide_tile)) * wide_tile)
    block = x.new_empty((at_once, triton.cdiv(width, wide_tile) * wide_tile))
    for first in range(0, pairs, at_once):
        chunk = slice(first, min(first + at_once, pairs))
        size = chunk.stop - first
        grad_xw = saved.new_zeros((size, dim))
        for left in range(0, rows, width):
            columns = slice(left, min(left + width, rows))
            wide = columns.stop - left
            grid = (triton.cdiv(size, shared["BLOCK_P"]), triton.cdiv(wide, wide_tile))
            gradient_tiles[grid](xw[chunk], padded[columns], pair[chunk], row_weight[chunk], peak_y[chunk],
                                 column_weight[columns], peaks[columns], own[chunk], block, device_flag(), size, wide, left,
                                 rows, block.shape[1], first, sizes, DOT=dot, **shared)
            gradient = block[:size, :wide]
            grad_xw += product(gradient, y[columns], saved.dtype)
            grad_y[columns] += product(gradient.T, xw[chunk, :dim], saved.dtype)
        grad_x[chunk] = _to_inputs(grad_xw, x[chunk], weight, grad_weight)
    return grad_x, grad_y.to(y.dtype), None if weight is None else grad_weight.to(weight.dtype)


# ---- sampled


def _drawn(x: Tensor, positive: Tensor | None, rows: int, num_negatives: int, seed: int, seed_at: Tensor | None,
           sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs' rows of y (P,), and the rows drawn of y and of x (P, k); -1 where there are none to draw."""
    pairs, pair = x.shape[0], _pair_of(x, positive)
    if positive is None:
        members, start = pair, torch.arange(rows + 1, device=x.device)
    else:
        if sizes is not None:  # the others lie behind all groups
            pair = torch.where(torch.arange(pairs, device=x.device) < sizes[0], pair, rows)
        ordered, members = torch.sort(pair, stable=True)
        start = torch.searchsorted(ordered, torch.arange(rows + 1, device=x.device, dtype=pair.dtype))
    over_y, over_x = (torch.empty((pairs, num_negatives), dtype=torch.int64, device=x.device) for _ in range(2))
    draw_rows[pairs,](
        pair, members, start, over_y, over_x, device_flag(), pairs, rows, num_negatives, pairs.bit_length(),
        seed, seed_at, sizes, BLOCK=min(128, triton.next_power_of_2(num_negatives)),
    )
    return pair, over_y, over_x


def _sampled_sums(z: Tensor, dot: bool) -> tuple[Tensor, Tensor, Tensor]:
    """exp(S - peak) (P, k), its sums (P,) and the peaks (P,), 0 but for "dot"; z is -inf where there was no row to draw."""
    none = z == -float("inf")
    peak = z.amax(1).masked_fill(none[:, 0], 0) if dot else torch.zeros_like(z[:, 0])
    weight = (z - peak.unsqueeze(1) if dot else torch.sigmoid(z)).exp().masked_fill(none, 0)
    return weight, weight.sum(1), peak


def _sampled_forward(x, y, weight, positive, num_negatives, seed, seed_at, score, deterministic, sizes):
    (pairs, dim), rows, dot = x.shape, y.shape[0], score == "dot"
    xw = _projected(x, weight, dim)
    pair, over_y, over_x = _drawn(x, positive, rows, num_negatives, seed, seed_at, sizes)
    z = torch.empty((pairs, 1 + 2 * num_negatives), dtype=sum_dtype(x.dtype), device=x.device)
    sampled_scores[pairs,](xw, y, pair, over_y, over_x, z, rows, num_negatives,
                           BLOCK_S=min(16, triton.next_power_of_2(num_negatives)), **row_options(dim, x.dtype))
    logit, z_y, z_x = z[:, 0], z[:, 1 : 1 + num_negatives], z[:, 1 + num_negatives :]
    sides = _sides(*_sampled_sums(z_y, dot)[1:], *_sampled_sums(z_x, dot)[1:], logit, dot)
    return *sides, logit.clone(), z.view(-1)


def _sampled_backward(grad_side_y, grad_side_x, x, y, weight, positive, saved, num_negatives, seed, seed_at, score, sizes):
    (pairs, dim), rows, dot = x.shape, y.shape[0], score == "dot"
    xw = _projected(x, weight, dim)
    pair, over_y, over_x = _drawn(x, positive, rows, num_negatives, seed, seed_at, sizes)
    z = saved.view(pairs, 1 + 2 * num_negatives)
    (logit,) = _of_existing(sizes, z[:, 0])
    gradients, own = [], 0.0
    for grad, scores in ((grad_side_y, z[:, 1 : 1 + num_negatives]), (grad_side_x, z[:, 1 + num_negatives :])):
        weight_of, total, peak = _sampled_sums(scores, dot)
        pair_weight, of_own = _pair_weights(total, peak, logit, grad, dot)
        own = own + of_own
        gradients.append(weight_of * _slope(scores, dot) * pair_weight.unsqueeze(1))
    gradient = torch.cat([(own * _slope(logit, dot)).unsqueeze(1), *gradients], 1).view(-1)
    # every score is of a row of x and a row of y; a row that could not be drawn stands for row 0 with gradient 0
    own_y, own_x = pair.long().clamp(0, rows - 1).unsqueeze(1), torch.arange(pairs, device=x.device).unsqueeze(1)
    of_y = torch.cat([own_y, over_y.clamp(min=0), own_y.expand_as(over_x)], 1).view(-1)
    of_x = torch.cat([own_x, own_x.expand_as(over_y), over_x.clamp(min=0)], 1).view(-1)
    shared = row_options(dim, x.dtype)

    def collected(target: Tensor, count: int, other: Tensor, source: Tensor, dtype: torch.dtype) -> Tensor:
        ordered, order = torch.sort(target, stable=True)
        start = torch.searchsorted(ordered, torch.arange(count + 1, device=x.device))
        out = torch.empty((count, dim), dtype=dtype, device=x.device)
        collect_rows[count, triton.cdiv(dim, shared["BLOCK_K"])](order, start, other, gradient, source, out, BLOCK_E=16, **shared)
        return out

    grad_xw = collected(of_x, pairs, of_y, y, saved.dtype)
    grad_y = collected(of_y, rows, of_x, xw, y.dtype)
    grad_weight = None if weight is None else saved.new_zeros(weight.shape)
    grad_x = _to_inputs(grad_xw, x, weight, grad_weight)
    return grad_x, grad_y, None if weight is None else grad_weight.to(weight.dtype)
