"""linear_cross_entropy and top_words in Triton: what runs them on GPUs.

    nll_m = log sum_v exp z_tv - z_ty,  z = hidden weight^T + bias,  y = target[m] of row t
    d loss / d z_tv = sum over the targets m of t of grad_nll_m (exp(z_tv - lse_t) - [target_m = v])

Forward makes z tile by tile, and keeps of each row the greatest z of the tile, its word and the sum of exp(z - greatest); the
tiles of a row are joined in their order. A target's z comes from its tile, or for rows with any number of targets from a product
of its own. Where z is to be kept, torch multiplies hidden by weight, and tiles are read. Backward makes z again, or reads it,
writes the gradient of z in blocks of at most BLOCK_BYTES, and multiplies these by weight and hidden with torch's own products.

`top_words` keeps the k greatest z of each tile in order, and merges the tiles of a row by their heads.

No float atomics: equal inputs give equal bits. Products run in the inputs' dtype and add in float32 (float64 for float64);
float32 is not rounded to TF32 unless torch is told so for its own products.
"""
# Triton reads annotations as they stand, so this file has no `from __future__ import annotations`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from case_fast.ops import device_flag as flags
from case_fast.ops.device_flag import device_flag, raise_pending
from case_fast.ops.triton_launch import on_device
from case_fast.ops.triton_tiles import finite, product, products, row_options, row_products, sum_dtype, tile_of, tile_options

BLOCK_ROWS = 4096  # rows at once in backward
BLOCK_BYTES = 16 << 20  # of the gradient of z at once, and of what forward's tiles give
SPREAD = 8  # programs that share the targets of a row
_HALF_TILES = (64, 128), (16, 128)
TILES = {  # (rows, words), the largest first: none spills, and of the largest two blocks or more fit an SM of sm_90
    torch.float16: _HALF_TILES, torch.bfloat16: _HALF_TILES, torch.float32: ((64, 64), (16, 128)), torch.float64: ((32, 32),),
}
KEPT_TILES = ((16, 128),)  # where z is read
BEST_TILES = (32, 64), (16, 64)  # of top_words: few rows
BAD_TARGET, BAD_CU_TARGET = tl.constexpr(flags.BAD_TARGET), tl.constexpr(flags.BAD_CU_TARGET)
NO_WORD = tl.constexpr(2**31 - 1)


# ------------------------------------------------------------------------------------------------------------------- pieces


@triton.jit
def _words(target, m, here, words, flag):
    """The words of targets m, int32; -1 where that is no word, and where there is no target."""
    y = tl.load(target + m, mask=here, other=-1).to(tl.int64)
    good = (y >= 0) & (y < words)
    tl.store(flag, BAD_TARGET, mask=tl.sum((here & ~good).to(tl.int32), axis=0) > 0)
    return tl.where(good, y, -1).to(tl.int32)


@triton.jit
def _targets_of(cu_target, t, targets, flag):
    """Where the targets of row t begin and end; 0 and 0 where cu_target is wrong there."""
    begin, end = tl.load(cu_target + t).to(tl.int64), tl.load(cu_target + t + 1).to(tl.int64)
    good = (begin >= 0) & (begin <= end) & (end <= targets)
    tl.store(flag, BAD_CU_TARGET, mask=~good)
    return tl.where(good, begin, 0), tl.where(good, end, 0)


@triton.jit
def _scores(hidden, weight, bias, kept, t, v, rows, words, KEPT: tl.constexpr, DIM: tl.constexpr, BLOCK_T: tl.constexpr,
            BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """(BLOCK_T, BLOCK_V): z of rows t and words v; -inf past the last word. kept (rows, words): the products, where KEPT."""
    if KEPT:
        at = t.to(tl.int64)[:, None] * words + v[None, :]
        z = tl.load(kept + at, mask=(t < rows)[:, None] & (v < words)[None, :], other=0.0)
    else:
        z = products(hidden, weight, t, v, rows, words, DIM, BLOCK_T, BLOCK_V, BLOCK_K, PRECISION, ACC)
    z += tl.load(bias + v, mask=v < words, other=0.0).to(ACC)[None, :]
    return tl.where((v < words)[None, :], z, -float("inf"))


@triton.jit
def _target_scores(hidden, weight, bias, t, y, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
                   ACC: tl.constexpr):
    """(BLOCK_M,): z of row t and words y; 0 where y is -1."""
    z = row_products(hidden + t * DIM, weight, y.to(tl.int64), tl.arange(0, BLOCK_K), DIM, BLOCK_M, BLOCK_K, ACC)
    return z + tl.load(bias + y, mask=y >= 0, other=0.0).to(ACC)


@triton.jit
def _peak(z):
    """The greatest z of each row but for NaN, which a compiled maximum passes over."""
    peak = tl.max(z, axis=1)
    return tl.where(peak == peak, peak, -float("inf"))


# ------------------------------------------------------------------------------------------------------------------ forward


@triton.jit(do_not_specialize=["rows"])
def sum_tiles(hidden, weight, bias, target, score, peak, total, word, kept, flag, rows, words, ONE: tl.constexpr,
              KEPT: tl.constexpr, DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
              PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Of one tile, (tiles of words, rows): the greatest z, its word, and the sum of exp(z - greatest).

    peak is NaN where a z is, and word then the first such. score (rows,): z of the target, ONE a row.
    """
    tile = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    here = t < rows
    z = _scores(hidden, weight, bias, kept, t, v, rows, words, KEPT, DIM, BLOCK_T, BLOCK_V, BLOCK_K, PRECISION, ACC)
    if ONE:
        y = _words(target, t, here, words, flag)
        mine = (y >= tile * BLOCK_V) & (y < (tile + 1) * BLOCK_V)
        if tl.sum(mine.to(tl.int32), axis=0) > 0:
            own = tl.sum(tl.where(y[:, None] == v[None, :], z, 0.0), axis=1)
            tl.store(score + t, own, mask=mine)  # one tile of each row has it
    top = _peak(z)
    found = tl.min(tl.where(z == top[:, None], v[None, :], NO_WORD), axis=1)
    sums = tl.sum(tl.exp(z - finite(top)[:, None]), axis=1)
    if tl.sum((sums != sums).to(tl.int32), axis=0) > 0:  # a NaN, or +inf
        odd = tl.min(tl.where(z != z, v[None, :], NO_WORD), axis=1)
        found = tl.where(odd < NO_WORD, odd, found)
        top = tl.where(odd < NO_WORD, float("nan"), top)
    at = tile.to(tl.int64) * rows + t
    tl.store(peak + at, top, mask=here)
    tl.store(total + at, sums, mask=here)
    tl.store(word + at, found, mask=here)


@triton.jit(do_not_specialize=["rows", "tiles"])
def join_tiles(peak, total, word, target, nll, prediction, state, rows, words, tiles, ONE: tl.constexpr, BLOCK_T: tl.constexpr,
               BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """prediction (rows,), state (rows, 2): the greatest z of a row, and lse less that; nll from the targets' z, ONE a row."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = t < rows
    top = tl.full((BLOCK_T,), -float("inf"), ACC)
    sums = tl.zeros((BLOCK_T,), ACC)
    found = tl.zeros((BLOCK_T,), tl.int32)
    odd = tl.full((BLOCK_T,), NO_WORD, tl.int32)
    for first in range(0, tiles, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        at = c.to(tl.int64)[:, None] * rows + t[None, :]
        mask = (c < tiles)[:, None] & here[None, :]
        peaks = tl.load(peak + at, mask=mask, other=-float("inf"))
        parts = tl.load(total + at, mask=mask, other=0.0)
        places = tl.load(word + at, mask=mask, other=NO_WORD)
        nan = peaks != peaks  # then `parts` is NaN too
        odd = tl.minimum(odd, tl.min(tl.where(nan, places, NO_WORD), axis=0))
        peaks = tl.where(nan, -float("inf"), peaks)
        new = tl.max(peaks, axis=0)
        best = tl.min(tl.where(peaks == new[None, :], places, NO_WORD), axis=0)
        found = tl.where(new > top, best, found)
        new = tl.maximum(top, new)
        sums = sums * tl.exp(top - finite(new)) + tl.sum(parts * tl.exp(peaks - finite(new)[None, :]), axis=0)
        top = new
    log_sum = tl.log(sums)
    tl.store(prediction + t, tl.where(odd < NO_WORD, odd, found).to(tl.int64), mask=here)
    tl.store(state + 2 * t.to(tl.int64), top, mask=here)
    tl.store(state + 2 * t.to(tl.int64) + 1, log_sum, mask=here)
    if ONE:
        y = tl.load(target + t, mask=here, other=0).to(tl.int64)
        z = tl.load(nll + t, mask=here, other=0.0)
        good = (y >= 0) & (y < words)
        tl.store(nll + t, tl.where(good, (top - z) + log_sum, float("nan")), mask=here)


@triton.jit(do_not_specialize=["rows", "targets"])
def target_losses(hidden, weight, bias, target, cu_target, state, nll, flag, rows, words, targets, DIM: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPREAD: tl.constexpr, ACC: tl.constexpr):
    """nll of the targets of one row; of those that are no word it stays as it was."""
    t = tl.program_id(0).to(tl.int64)
    begin, end = _targets_of(cu_target, t, targets, flag)
    tl.store(flag, BAD_CU_TARGET, mask=(t == 0) & (tl.load(cu_target) != 0))
    tl.store(flag, BAD_CU_TARGET, mask=(t == 0) & (tl.load(cu_target + rows) != targets))
    top, log_sum = tl.load(state + 2 * t), tl.load(state + 2 * t + 1)
    for first in range(begin + tl.program_id(1) * BLOCK_M, end, SPREAD * BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        y = _words(target, m, m < end, words, flag)
        z = _target_scores(hidden, weight, bias, t, y, DIM, BLOCK_M, BLOCK_K, ACC)
        tl.store(nll + m, (top - z) + log_sum, mask=y >= 0)


# ----------------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["targets"])
def row_gradients(hidden, weight, bias, target, cu_target, state, grad_nll, scale, active, own, flag, words, targets,
                  DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPREAD: tl.constexpr,
                  ACC: tl.constexpr):
    """Of one row with any number of targets: the sum of their grad_nll, whether one is not 0, and own_m, the gradient of z at
    target m: the same number for each of several equal targets."""
    t = tl.program_id(0).to(tl.int64)
    begin, end = _targets_of(cu_target, t, targets, flag)
    sums = tl.zeros((BLOCK_M,), ACC)
    some = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(begin, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        g = tl.load(grad_nll + m, mask=m < end, other=0.0)
        sums += g
        some += (g != 0).to(tl.int32)
    all_of_row, any_of_row = tl.sum(sums, axis=0), tl.sum(some, axis=0) > 0
    tl.store(scale + t, all_of_row)  # by each program of the row, the same
    tl.store(active + t, any_of_row.to(tl.int8))
    top, log_sum = tl.load(state + 2 * t), tl.load(state + 2 * t + 1)
    for first in range(begin + tl.program_id(1) * BLOCK_M, end, SPREAD * BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        y = _words(target, m, m < end, words, flag)
        z = _target_scores(hidden, weight, bias, t, y, DIM, BLOCK_M, BLOCK_K, ACC)
        equal = tl.zeros((BLOCK_M,), ACC)
        for other in range(begin, end, BLOCK_M):
            n = other + tl.arange(0, BLOCK_M)
            g = tl.load(grad_nll + n, mask=n < end, other=0.0)
            same = y[:, None] == tl.load(target + n, mask=n < end, other=-1)[None, :]
            equal += tl.sum(tl.where(same, g[None, :], 0.0), axis=1)
        gradient = all_of_row * tl.exp((z - top) - log_sum) - equal
        tl.store(own + m, tl.where(any_of_row, gradient, 0.0), mask=y >= 0)


@triton.jit(do_not_specialize=["rows"])
def gradient_tiles(hidden, weight, bias, target, state, scale, active, kept, out, flag, rows, words, left, stride,
                   ONE: tl.constexpr, KEPT: tl.constexpr, DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
                   BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """out (rows, stride): the gradient of z at words from ``left`` on, of which ``words`` are in all; 0 in rows not active.

    scale_t exp(z - lse), less scale_t at the target where it is ONE a row. kept (rows, words): z less bias, else z is made again.
    stride, a multiple of BLOCK_V, has room for whole tiles: their columns are stored without a mask.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    v = left + column
    row = t.to(tl.int64)
    z = _scores(hidden, weight, bias, kept, t, v, rows, words, KEPT, DIM, BLOCK_T, BLOCK_V, BLOCK_K, PRECISION, ACC)
    top = tl.load(state + 2 * row, mask=t < rows, other=0.0)
    log_sum = tl.load(state + 2 * row + 1, mask=t < rows, other=0.0)
    amount = tl.load(scale + t, mask=t < rows, other=0.0)[:, None]
    gradient = amount * tl.exp((z - top[:, None]) - log_sum[:, None])
    if ONE:
        y = _words(target, t, t < rows, words, flag)
        gradient = tl.where(y[:, None] == v[None, :], gradient - amount, gradient)
    takes_part = tl.load(active + t, mask=t < rows, other=0) != 0
    gradient = tl.where(takes_part[:, None], gradient, 0.0)
    tl.store(out + row[:, None] * stride + column[None, :], gradient.to(out.dtype.element_ty), mask=(t < rows)[:, None])


@triton.jit(do_not_specialize=["targets", "wide"])
def place_targets(target, cu_target, own, out, flag, words, targets, left, wide, stride, BLOCK_M: tl.constexpr,
                  SPREAD: tl.constexpr):
    """out_t,y = own_m for the targets of one row among words [left, left + wide)."""
    t = tl.program_id(0).to(tl.int64)
    begin, end = _targets_of(cu_target, t, targets, flag)
    for first in range(begin + tl.program_id(1) * BLOCK_M, end, SPREAD * BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        y = _words(target, m, m < end, words, flag)
        mine = (y >= left) & (y < left + wide)
        gradient = tl.load(own + m, mask=mine, other=0.0)
        tl.store(out + t * stride + (y - left), gradient.to(out.dtype.element_ty), mask=mine)


# ---------------------------------------------------------------------------------------------------------------- top_words


@triton.jit
def _least(like):
    """Below the number of any z."""
    if like.dtype == tl.int64:
        least = tl.full((), -(2**63), tl.int64)
    else:
        least = tl.full((), -(2**31), tl.int32)
    return least


@triton.jit
def _numbers(z):
    """Whole numbers in the order of z, of its size; NaN has the greatest."""
    z = tl.where(z == 0, 0.0, z)  # -0 is no less than 0
    if z.dtype == tl.float64:
        bits = z.to(tl.int64, bitcast=True)
        number = tl.where(z != z, 2**63 - 1, bits ^ ((bits >> 63) & (2**63 - 1)))
    else:
        bits = z.to(tl.int32, bitcast=True)
        number = tl.where(z != z, 2**31 - 1, bits ^ ((bits >> 31) & (2**31 - 1)))
    return number


@triton.jit
def _numbered(number):
    """The z of a number."""
    if number.dtype == tl.int64:
        z = (number ^ ((number >> 63) & (2**63 - 1))).to(tl.float64, bitcast=True)
    else:
        z = (number ^ ((number >> 31) & (2**31 - 1))).to(tl.float32, bitcast=True)
    return z


@triton.jit(do_not_specialize=["rows", "tiles", "k"])
def best_of_tiles(hidden, weight, bias, peak, total, number, word, rows, words, tiles, k, DIM: tl.constexpr,
                  BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
                  ACC: tl.constexpr):
    """Of one tile: peak, total (rows, tiles), as `sum_tiles`; number, word (rows, tiles, k): its greatest z in order, as whole
    numbers. Where it has fewer words than k, the rest have the least number."""
    tile = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    here = t < rows
    z = _scores(hidden, weight, bias, hidden, t, v, rows, words, False, DIM, BLOCK_T, BLOCK_V, BLOCK_K, PRECISION, ACC)
    top = _peak(z)
    at = t.to(tl.int64) * tiles + tile
    tl.store(peak + at, top, mask=here)
    tl.store(total + at, tl.sum(tl.exp(z - finite(top)[:, None]), axis=1), mask=here)
    numbers = _numbers(z)
    least = _least(numbers)
    numbers = tl.where((v < words)[None, :], numbers, least)
    for i in range(k):
        best = tl.max(numbers, axis=1)
        chosen = tl.min(tl.where(numbers == best[:, None], v[None, :], NO_WORD), axis=1)
        numbers = tl.where(v[None, :] == chosen[:, None], least, numbers)
        tl.store(number + at * k + i, best, mask=here)
        tl.store(word + at * k + i, chosen, mask=here)


@triton.jit(do_not_specialize=["tiles", "k"])
def best_of_rows(peak, total, number, word, out, out_word, tiles, k, BLOCK: tl.constexpr):
    """Of one row: its k greatest log-probabilities and their words, merged from the heads of its tiles, which are in order."""
    t = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    here = tile < tiles
    peaks = tl.load(peak + t * tiles + tile, mask=here, other=-float("inf"))
    parts = tl.load(total + t * tiles + tile, mask=here, other=0.0)
    top = tl.max(peaks, axis=0)
    log_sum = tl.log(tl.sum(parts * tl.exp(peaks - finite(top)), axis=0))
    at = (t * tiles + tile) * k
    heads = tl.load(number + at, mask=here, other=0)
    least = _least(heads)
    heads = tl.where(here, heads, least)
    names = tl.load(word + at, mask=here, other=NO_WORD)
    taken = tl.zeros((BLOCK,), tl.int32)
    for i in range(k):
        best = tl.max(heads, axis=0)
        chosen = tl.min(tl.where(heads == best, names, NO_WORD), axis=0)
        tl.store(out + t * k + i, (_numbered(best) - top) - log_sum)
        tl.store(out_word + t * k + i, chosen.to(tl.int64))
        mine = (heads == best) & (names == chosen)
        taken += mine.to(tl.int32)
        more = mine & (taken < k)
        following = tl.load(number + at + taken, mask=more, other=0)
        heads = tl.where(mine, tl.where(more, following, least), heads)
        names = tl.where(mine, tl.load(word + at + taken, mask=more, other=NO_WORD), names)


# ------------------------------------------------------------------------------------------------------------------ launches


def tiles(rows: int, words: int, dim: int, dtype: torch.dtype, choices: tuple[tuple[int, int], ...] | None = None) -> dict:
    """The compile-time arguments that the kernels over tiles share. A function of shapes alone: so is the order of sums."""
    block_t, block_v = tile_of(rows, words, choices or TILES[dtype])
    return {"DIM": dim, "BLOCK_T": block_t, "BLOCK_V": block_v} | tile_options(block_t, block_v, dim, dtype)


def of_targets(dim: int, dtype: torch.dtype) -> dict:
    """The compile-time arguments that the kernels over the targets of a row share."""
    return row_options(dim, dtype) | {"BLOCK_M": 16, "SPREAD": SPREAD}


@on_device
def forward(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, cu_target: Tensor | None, keep: bool
            ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll (M,), prediction (T,), state (T, 2): the greatest z of a row and lse less that, kept (T * V,): z less bias, or empty.

    Args:
        hidden (T, d), weight (V, d), bias (V,): contiguous, of one dtype and device, checked.
        target (M,), cu_target (T + 1,) or None: int32 or int64.

    Raises:
        IndexError: what an earlier kernel found in its indices.
    """
    if hidden.is_cuda:
        raise_pending()
    (rows, dim), words, targets = hidden.shape, weight.shape[0], target.shape[0]
    full = {"dtype": sum_dtype(hidden.dtype), "device": hidden.device}
    one = cu_target is None
    nll = torch.empty(targets, **full) if one else torch.full((targets,), float("nan"), **full)
    prediction = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    state, kept = torch.empty((rows, 2), **full), torch.empty(0, **full)
    if not rows:
        if targets:
            raise IndexError(f"cu_target of no rows must end at 0; there are {targets} targets")
        return nll, prediction, state, kept
    if keep:
        kept = product(hidden, weight.T, full["dtype"])
    shared = tiles(rows, words, dim, hidden.dtype, KEPT_TILES if keep else None)
    count = triton.cdiv(words, shared["BLOCK_V"])
    at_once = min(rows, max(64, BLOCK_BYTES // (count * (2 * state.element_size() + 4)) // 64 * 64))
    peak, total = (torch.empty(count * at_once, **full) for _ in range(2))
    word = torch.empty(count * at_once, dtype=torch.int32, device=hidden.device)
    for first in range(0, rows, at_once):
        chunk = slice(first, min(first + at_once, rows))
        size = chunk.stop - first
        own = chunk if one else slice(None)
        grid = (triton.cdiv(size, shared["BLOCK_T"]), count)
        sum_tiles[grid](hidden[chunk], weight, bias, target[own], nll[own], peak, total, word, kept[chunk] if keep else hidden,
                        device_flag(), size, words, ONE=one, KEPT=keep, **shared)
        join_tiles[triton.cdiv(size, 16),](peak, total, word, target[own], nll[own], prediction[chunk], state[chunk], size, words,
                                           count, ONE=one, BLOCK_T=16, BLOCK_C=64, ACC=shared["ACC"])
    if not one:
        target_losses[rows, SPREAD](hidden, weight, bias, target, cu_target, state, nll, device_flag(), rows, words, targets,
                                    **of_targets(dim, hidden.dtype))
    kept = kept.view(-1)
    return nll, prediction, state, kept


@on_device
def backward(grad_nll: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, cu_target: Tensor | None,
             state: Tensor, kept: Tensor, wanted: list[bool]) -> list[Tensor]:
    """Those gradients of hidden, weight and bias that are wanted, in their dtypes; the same bits every time. As `forward`."""
    rows, words = hidden.shape[0], weight.shape[0]
    grads = [torch.empty_like(x) if w else None for x, w in zip((hidden, weight, bias), wanted, strict=True)]
    if rows and any(wanted):
        kept = kept.view(rows, words) if kept.numel() else None
        _backward(grad_nll, hidden, weight, bias, target, cu_target, state, kept, *grads)
    else:
        for grad in grads:
            if grad is not None:
                grad.zero_()
    return [grad for grad in grads if grad is not None]


def _backward(grad_nll, hidden, weight, bias, target, cu_target, state, kept, grad_hidden, grad_weight, grad_bias):
    (rows, dim), words, targets = hidden.shape, weight.shape[0], target.shape[0]
    full = {"dtype": sum_dtype(hidden.dtype), "device": hidden.device}
    one = cu_target is None
    scale, own = grad_nll, None
    if one:
        active = (grad_nll != 0).view(torch.int8)
    else:
        scale, own = torch.empty(rows, **full), torch.empty(targets, **full)
        active = torch.empty(rows, dtype=torch.int8, device=hidden.device)
        row_gradients[rows, SPREAD](hidden, weight, bias, target, cu_target, state, grad_nll, scale, active, own, device_flag(),
                                    words, targets, **of_targets(dim, hidden.dtype))
    takes_part = active.view(torch.bool).unsqueeze(1)
    left_factor = torch.where(takes_part, hidden, 0)  # a NaN in a row that takes no part would come through 0 * NaN

    at_once = min(BLOCK_ROWS, rows)
    several = rows > at_once
    wide = _width(at_once, words, hidden.element_size())
    shared = tiles(at_once, wide, dim, hidden.dtype, None if kept is None else KEPT_TILES)
    block = hidden.new_empty((at_once, triton.cdiv(wide, shared["BLOCK_V"]) * shared["BLOCK_V"]))
    hidden_sum = None if grad_hidden is None else torch.empty(hidden.shape, **full)
    for left in range(0, words, wide):
        columns = slice(left, min(left + wide, words))
        count = columns.stop - left
        weight_sum = None if grad_weight is None or not several else torch.zeros((count, dim), **full)
        bias_sum = None if grad_bias is None else torch.zeros(count, **full)
        for first in range(0, rows, at_once):
            chunk = slice(first, min(first + at_once, rows))
            size = chunk.stop - first
            grid = (triton.cdiv(size, shared["BLOCK_T"]), triton.cdiv(count, shared["BLOCK_V"]))
            gradient_tiles[grid](hidden[chunk], weight, bias, target[chunk] if one else target, state[chunk], scale[chunk],
                                 active[chunk], hidden if kept is None else kept[chunk], block, device_flag(), size, words, left,
                                 block.shape[1], ONE=one, KEPT=kept is not None, **shared)
            if not one:
                place_targets[size, SPREAD](target, cu_target[first:], own, block, device_flag(), words, targets, left, count,
                                            block.shape[1], BLOCK_M=16, SPREAD=SPREAD)
            gradient = block[:size, :count]
            if grad_hidden is not None:
                _add_product(hidden_sum[chunk], gradient, weight[columns], first_time=left == 0)
            if grad_weight is not None:
                if several:
                    _add_product(weight_sum, gradient.T, left_factor[chunk], first_time=False)
                else:
                    _add_product(grad_weight[columns], gradient.T, left_factor, first_time=True)
            if grad_bias is not None:
                bias_sum += gradient.sum(0, dtype=full["dtype"])
        if weight_sum is not None:
            grad_weight[columns] = weight_sum
        if bias_sum is not None:
            grad_bias[columns] = bias_sum
    if grad_hidden is not None:
        grad_hidden.copy_(hidden_sum.masked_fill_(~takes_part, 0))  # 0 * NaN in weight


def _width(rows: int, words: int, size: int) -> int:
    """Words at once: equal blocks of at most BLOCK_BYTES, each a multiple of 64, so that rows begin where wide loads may."""
    most = max(64, BLOCK_BYTES // (rows * size) // 64 * 64)
    blocks = triton.cdiv(words, most)
    return triton.cdiv(triton.cdiv(words, blocks), 64) * 64


def _add_product(total: Tensor, a: Tensor, b: Tensor, first_time: bool) -> None:
    """total += a b, which is all of it the first time."""
    if total.dtype == a.dtype and (total.is_cuda or total.dtype == sum_dtype(total.dtype)):
        torch.mm(a, b, out=total) if first_time else total.addmm_(a, b)
    elif first_time:
        total.copy_(product(a, b, sum_dtype(a.dtype)))
    else:
        total += product(a, b, sum_dtype(a.dtype))


@on_device
def top_words(hidden: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest log-probabilities of each row (T, k), the greatest first, and their words, int64. As `forward`."""
    (rows, dim), words = hidden.shape, weight.shape[0]
    full = {"dtype": sum_dtype(hidden.dtype), "device": hidden.device}
    out, out_word = torch.empty((rows, k), **full), torch.empty((rows, k), dtype=torch.int64, device=hidden.device)
    if not rows:
        return out, out_word
    shared = tiles(rows, words, dim, hidden.dtype, BEST_TILES)
    count = triton.cdiv(words, shared["BLOCK_V"])
    peak, total = (torch.empty((rows, count), **full) for _ in range(2))
    of_number = torch.int64 if full["dtype"] == torch.float64 else torch.int32
    number = torch.empty((rows, count, k), dtype=of_number, device=hidden.device)
    word = torch.empty((rows, count, k), dtype=torch.int32, device=hidden.device)
    grid = (triton.cdiv(rows, shared["BLOCK_T"]), count)
    best_of_tiles[grid](hidden, weight, bias, peak, total, number, word, rows, words, count, k, **shared)
    block = triton.next_power_of_2(count)
    best_of_rows[rows,](peak, total, number, word, out, out_word, count, k, BLOCK=block, num_warps=8 if block > 1024 else 4)
    return out, out_word
