"""graph_attention in Triton, forward and backward: for GPUs that the native CUDA code does not serve.

    out_i = sum_k dropout(softmax_k(scale (q_i + rq_r) . (k_k + rk_r)))_ik v_k     over the neighbours k of i

One program serves one (vertex, head). Its neighbours come in blocks of BLOCK_E with a running maximum, so rows of any degree
work. Backward is one pass over rows (dscore, dq) and one over columns (dk, dv). Both also sum dscore by relation into
(V, H, R) tables, from which the relation gradients are two products with q and k, added in a fixed order. There are no atomics:
the same inputs give the same bits. A row of D numbers is a masked block of the next power of two (150 occupies 256).

Sums run in float32, in float64 for float64 tensors. Indices out of range are never followed (`device_flag`).
"""
# Triton reads annotations as they stand, so this file has no `from __future__ import annotations`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from case_fast.ops import device_flag as flags
from case_fast.ops.device_flag import device_flag, raise_pending
from case_fast.ops.triton_launch import drawing_seed, dropout_arguments, dropped, on_device

MAX_DIM = 256
BAD_INDPTR = tl.constexpr(flags.BAD_INDPTR)
BAD_INDICES = tl.constexpr(flags.BAD_INDICES)
BAD_RELATION = tl.constexpr(flags.BAD_RELATION)


# ------------------------------------------------------------------------------------------------------------------- pieces


@triton.jit
def _span(indptr, row, edges, flag):
    """The places [begin, end) of a row's edges, whatever stands in indptr."""
    begin = tl.load(indptr + row).to(tl.int64)
    end = tl.load(indptr + row + 1).to(tl.int64)
    tl.store(flag, BAD_INDPTR, mask=(begin < 0) | (end < begin) | (end > edges))
    begin = tl.minimum(tl.maximum(begin, 0), edges)
    return begin, tl.minimum(tl.maximum(end, begin), edges)


@triton.jit
def _bounded(index, at, here, size, flag, CODE: tl.constexpr):
    """The values of ``index`` at places ``at``, and which of them may be followed."""
    i = tl.load(index + at, mask=here, other=0).to(tl.int64)
    good = here & (i >= 0) & (i < size)
    tl.store(flag, CODE, mask=tl.sum((here & ~good).to(tl.int32), axis=0) > 0)
    return i, good


@triton.jit
def _row(base, index, head, d, HEADS: tl.constexpr, DIM: tl.constexpr, ACC: tl.constexpr):
    """(BLOCK_D,): one row of a (n, HEADS, DIM) tensor."""
    return tl.load(base + (index * HEADS + head) * DIM + d, mask=d < DIM, other=0.0).to(ACC)


@triton.jit
def _rows(base, index, head, d, here, HEADS: tl.constexpr, DIM: tl.constexpr, ACC: tl.constexpr):
    """(BLOCK_E, BLOCK_D): the rows that ``index`` names."""
    at = (index[:, None] * HEADS + head) * DIM + d[None, :]
    return tl.load(base + at, mask=here[:, None] & (d[None, :] < DIM), other=0.0).to(ACC)


@triton.jit
def _relation_sums(table, at, score, order, relation, head, begin, end, edges, relations, HEADS: tl.constexpr,
                   BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, ORDERED: tl.constexpr, ACC: tl.constexpr):
    """table[at, head, r]: the sum of ``score`` over those edges of [begin, end) that have relation r."""
    for first in range(0, relations, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_R,), ACC)
        for start in range(begin, end, BLOCK_E):
            place = start + tl.arange(0, BLOCK_E)
            here = place < end
            if ORDERED:
                place = tl.load(order + place, mask=here, other=0)
            mine = tl.load(relation + place, mask=here, other=-1)
            s = tl.load(score + place * HEADS + head, mask=here, other=0.0)
            total += tl.sum(tl.where(mine[:, None] == r[None, :], s[:, None], 0.0), axis=0)
        tl.store(table + (at * HEADS + head) * relations + r, total, mask=r < relations)


# ------------------------------------------------------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=["vertices", "edges", "seed", "seed_at", "drop_below"])
def forward_rows(query, key, value, indptr, indices, relation, relation_query, relation_key, out, weights, flag,
                 vertices, edges, relations, scale: tl.float64, seed: tl.uint64, seed_at, drop_below: tl.int64,
                 kept_scale: tl.float64, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
                 RELATION: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr):
    """out (V, H, D) and the softmax weights before dropout (E, H)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    begin, end = _span(indptr, row, edges, flag)
    drawn_by = drawing_seed(seed, seed_at)
    q = _row(query, row, head, d, HEADS, DIM, ACC)
    total_out = tl.zeros((BLOCK_D,), ACC)
    peak = tl.full((), -float("inf"), ACC)
    total = tl.zeros((), ACC)
    for start in range(begin, end, BLOCK_E):
        edge = start + tl.arange(0, BLOCK_E)
        here = edge < end
        neighbour, good = _bounded(indices, edge, here, vertices, flag, BAD_INDICES)
        k = _rows(key, neighbour, head, d, good, HEADS, DIM, ACC)
        if RELATION:
            r, known = _bounded(relation, edge, here, relations, flag, BAD_RELATION)
            good = good & known
            k += _rows(relation_key, r, head, d, good, HEADS, DIM, ACC)
            left = q[None, :] + _rows(relation_query, r, head, d, good, HEADS, DIM, ACC)
            score = tl.sum(left * k, axis=1) * tl.full((), scale, ACC)
        else:
            score = tl.sum(q[None, :] * k, axis=1) * tl.full((), scale, ACC)
        score = tl.where(good, score, float("nan"))  # a bad index must show
        score = tl.where(here, score, -float("inf"))
        tl.store(weights + edge * HEADS + head, score, mask=here)  # not yet weights: the sum is not known
        new_peak = tl.maximum(peak, tl.max(score, axis=0))
        weight = tl.where(here, tl.exp(score - new_peak), 0.0)
        shrink = tl.exp(peak - new_peak)
        total = total * shrink + tl.sum(weight, axis=0)
        if DROPOUT:
            weight = dropped(weight, edge, head, drawn_by, drop_below, kept_scale)
        v = _rows(value, neighbour, head, d, good, HEADS, DIM, ACC)
        total_out = total_out * shrink + tl.sum(weight[:, None] * v, axis=0)
        peak = new_peak
    total_out = total_out / tl.where(begin < end, total, 1.0)
    tl.store(out + (row * HEADS + head) * DIM + d, total_out.to(out.dtype.element_ty), mask=d < DIM)
    tl.debug_barrier()  # the scores stored above are read by other threads of this program
    for start in range(begin, end, BLOCK_E):
        edge = start + tl.arange(0, BLOCK_E)
        here = edge < end
        score = tl.load(weights + edge * HEADS + head, mask=here, other=0.0)
        tl.store(weights + edge * HEADS + head, tl.exp(score - peak) / total, mask=here)


@triton.jit(do_not_specialize=["vertices", "edges", "seed", "seed_at", "drop_below"])
def backward_rows(grad_out, key, value, indptr, indices, relation, relation_key, weights, dscore, grad_query, table, flag,
                  vertices, edges, relations, scale: tl.float64, seed: tl.uint64, seed_at, drop_below: tl.int64,
                  kept_scale: tl.float64, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
                  BLOCK_R: tl.constexpr, RELATION: tl.constexpr, DROPOUT: tl.constexpr,
                  ACC: tl.constexpr):
    """dscore = scale p (dp - sum p dp) (E, H), grad_query (V, H, D), and dscore summed by relation (V, H, R)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    begin, end = _span(indptr, row, edges, flag)
    drawn_by = drawing_seed(seed, seed_at)
    g = _row(grad_out, row, head, d, HEADS, DIM, ACC)
    mean = tl.zeros((), ACC)
    for start in range(begin, end, BLOCK_E):
        edge = start + tl.arange(0, BLOCK_E)
        here = edge < end
        neighbour, good = _bounded(indices, edge, here, vertices, flag, BAD_INDICES)
        dp = tl.sum(g[None, :] * _rows(value, neighbour, head, d, good, HEADS, DIM, ACC), axis=1)
        if DROPOUT:
            dp = dropped(dp, edge, head, drawn_by, drop_below, kept_scale)
        p = tl.load(weights + edge * HEADS + head, mask=here, other=0.0)
        mean += tl.sum(p * dp, axis=0)
        tl.store(dscore + edge * HEADS + head, dp, mask=here)  # not yet dscore: the mean is not known
    tl.debug_barrier()  # dp stored above is read by other threads of this program
    total = tl.zeros((BLOCK_D,), ACC)
    for start in range(begin, end, BLOCK_E):
        edge = start + tl.arange(0, BLOCK_E)
        here = edge < end
        neighbour, good = _bounded(indices, edge, here, vertices, flag, BAD_INDICES)
        k = _rows(key, neighbour, head, d, good, HEADS, DIM, ACC)
        if RELATION:
            r, known = _bounded(relation, edge, here, relations, flag, BAD_RELATION)
            k += _rows(relation_key, r, head, d, known, HEADS, DIM, ACC)
        p = tl.load(weights + edge * HEADS + head, mask=here, other=0.0)
        dp = tl.load(dscore + edge * HEADS + head, mask=here, other=0.0)
        ds = tl.where(here, p * (dp - mean) * tl.full((), scale, ACC), 0.0)
        total += tl.sum(ds[:, None] * k, axis=0)
        tl.debug_barrier()  # every thread has read dp before any overwrites it
        tl.store(dscore + edge * HEADS + head, ds, mask=here)
    tl.store(grad_query + (row * HEADS + head) * DIM + d, total.to(grad_query.dtype.element_ty), mask=d < DIM)
    if RELATION:
        tl.debug_barrier()
        _relation_sums(table, row, dscore, indices, relation, head, begin, end, edges, relations, HEADS, BLOCK_E, BLOCK_R,
                       False, ACC)


@triton.jit(do_not_specialize=["vertices", "edges", "seed", "seed_at", "drop_below"])
def backward_columns(query, grad_out, column_start, column_edge, column_row, relation, relation_query, weights, dscore,
                     grad_key, grad_value, table, flag, vertices, edges, relations, seed: tl.uint64, seed_at,
                     drop_below: tl.int64, kept_scale: tl.float64, HEADS: tl.constexpr, DIM: tl.constexpr,
                     BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, RELATION: tl.constexpr,
                     DROPOUT: tl.constexpr, ACC: tl.constexpr):
    """grad_key, grad_value (V, H, D) of the vertex that the edges of a column lead to, and dscore summed by relation."""
    column = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    begin, end = _span(column_start, column, edges, flag)
    drawn_by = drawing_seed(seed, seed_at)
    total_key = tl.zeros((BLOCK_D,), ACC)
    total_value = tl.zeros((BLOCK_D,), ACC)
    for start in range(begin, end, BLOCK_E):
        place = start + tl.arange(0, BLOCK_E)
        here = place < end
        edge = tl.load(column_edge + place, mask=here, other=0)
        row, good = _bounded(column_row, place, here, vertices, flag, BAD_INDPTR)
        left = _rows(query, row, head, d, good, HEADS, DIM, ACC)
        if RELATION:
            r, known = _bounded(relation, edge, here, relations, flag, BAD_RELATION)
            left += _rows(relation_query, r, head, d, known, HEADS, DIM, ACC)
        ds = tl.load(dscore + edge * HEADS + head, mask=here, other=0.0)
        total_key += tl.sum(ds[:, None] * left, axis=0)
        p = tl.load(weights + edge * HEADS + head, mask=here, other=0.0)
        if DROPOUT:
            p = dropped(p, edge, head, drawn_by, drop_below, kept_scale)
        total_value += tl.sum(p[:, None] * _rows(grad_out, row, head, d, good, HEADS, DIM, ACC), axis=0)
    at = (column * HEADS + head) * DIM + d
    tl.store(grad_key + at, total_key.to(grad_key.dtype.element_ty), mask=d < DIM)
    tl.store(grad_value + at, total_value.to(grad_value.dtype.element_ty), mask=d < DIM)
    if RELATION:
        _relation_sums(table, column, dscore, column_edge, relation, head, begin, end, edges, relations, HEADS, BLOCK_E,
                       BLOCK_R, True, ACC)


@triton.jit(do_not_specialize=["vertices", "chunk"])
def relation_part(table, x, relation_x, part, vertices, relations, chunk, HEADS: tl.constexpr, DIM: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr):
    """part[c, r, h] = sum of table[i, h, r] (x[i, h] + relation_x[r, h]) over the vertices i of chunk c."""
    number = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    known = r < relations
    bias = _rows(relation_x, r.to(tl.int64), head, d, known, HEADS, DIM, ACC)
    total = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    for i in range(number * chunk, tl.minimum((number + 1) * chunk, vertices)):
        amount = tl.load(table + (i * HEADS + head) * relations + r, mask=known, other=0.0)
        total += amount[:, None] * (_row(x, i, head, d, HEADS, DIM, ACC)[None, :] + bias)
    at = ((number * relations + r[:, None]) * HEADS + head) * DIM + d[None, :]
    tl.store(part + at, total, mask=known[:, None] & (d[None, :] < DIM))


# ------------------------------------------------------------------------------------------------------------------ launches


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums run in, and what the weights are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shapes(query: Tensor, edges: int, relations: int) -> dict:
    """The compile-time arguments that all kernels share."""
    vertices, heads, dim = query.shape
    if dim > MAX_DIM:
        raise ValueError(f"graph_attention: head dimension {dim} is above {MAX_DIM}, the largest that the kernels take")
    degree = triton.cdiv(edges, max(vertices, 1))
    return {
        "HEADS": heads,
        "DIM": dim,
        "BLOCK_D": triton.next_power_of_2(max(dim, 1)),
        # of float64, what spills no register
        "BLOCK_E": 8 if query.dtype == torch.float64 else min(16, max(4, triton.next_power_of_2(max(degree, 1)))),
        "BLOCK_R": min(16, triton.next_power_of_2(max(relations, 1))),
        "ACC": tl.float64 if query.dtype == torch.float64 else tl.float32,
        "num_warps": 4 if dim > 64 else 1,
    }


@on_device
def forward(query: Tensor, key: Tensor, value: Tensor, indptr: Tensor, indices: Tensor, relation: Tensor | None,
            relation_query: Tensor | None, relation_key: Tensor | None, scale: float, dropout_p: float,
            seed: int, seed_at: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out (V, H, D), and the softmax weights before dropout (E, H) that backward needs.

    All tensors contiguous, of one device and checked; indptr, indices and relation of one integer dtype. seed_at: one int64 on
    the device, XORed to ``seed`` when a kernel draws; None: nothing is.

    Raises:
        ValueError: the head dimension is above 256.
        ValueError, IndexError: what an earlier kernel found in its indices.
    """
    if query.is_cuda:
        raise_pending()
    vertices, heads, _ = query.shape
    edges, relations = indices.numel(), 0 if relation is None else relation_query.shape[0]
    sizes = shapes(query, edges, relations)
    sizes.pop("BLOCK_R")
    out = torch.empty_like(query)
    weights = query.new_empty((edges, heads), dtype=sum_dtype(query.dtype))
    if out.numel():
        forward_rows[vertices, heads](
            query, key, value, indptr, indices, relation, relation_query, relation_key, out, weights, device_flag(),
            vertices, edges, relations, scale, RELATION=relation is not None,
            **dropout_arguments(dropout_p, seed, seed_at), **sizes,
        )
    return out, weights


def by_column(indptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The edges by the vertex they lead to: starts (V + 1,), and for each edge in that order its place and its row (E,).

    Ascending places within a column, so that sums over it have a fixed order. Waits for nothing on the device.
    """
    vertices = indptr.numel() - 1
    target, edge = torch.sort(indices, stable=True)
    start = torch.searchsorted(target, torch.arange(vertices + 1, device=indices.device, dtype=indices.dtype))
    row = torch.searchsorted(indptr, edge.to(indptr.dtype), right=True) - 1
    return start, edge, row


@on_device
def backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, indptr: Tensor, indices: Tensor,
             relation: Tensor | None, relation_query: Tensor | None, relation_key: Tensor | None, weights: Tensor,
             scale: float, dropout_p: float, seed: int, seed_at: Tensor | None = None,
             columns: tuple[Tensor, Tensor, Tensor] | None = None
             ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, relation_query, relation_key (the last two None without relations).

    As `forward`; ``columns`` is `by_column(indptr, indices)`, for callers that keep it.
    """
    vertices, heads, dim = query.shape
    edges, relations = indices.numel(), 0 if relation is None else relation_query.shape[0]
    sizes = shapes(query, edges, relations)
    grads = [torch.empty_like(query) for _ in range(3)]
    if not query.numel():
        return *grads, *(None if x is None else torch.zeros_like(x) for x in (relation_query, relation_key))
    shared = {"flag": device_flag(), "vertices": vertices, "edges": edges, "relations": relations}
    shared |= {"RELATION": relation is not None, **dropout_arguments(dropout_p, seed, seed_at), **sizes}
    dscore = torch.empty_like(weights)
    by_row_table, by_column_table = (weights.new_empty((vertices, heads, relations)) for _ in range(2))
    grid = (vertices, heads)
    backward_rows[grid](grad_out, key, value, indptr, indices, relation, relation_key, weights, dscore, grads[0],
                        by_row_table, scale=scale, **shared)
    start, edge, row = by_column(indptr, indices) if columns is None else columns
    backward_columns[grid](query, grad_out, start, edge, row, relation, relation_query, weights, dscore, grads[1], grads[2],
                           by_column_table, **shared)
    if relation is None:
        return *grads, None, None

    chunk = max(32, triton.cdiv(vertices, 256))
    blocks = {name: sizes[name] for name in ("HEADS", "DIM", "BLOCK_D", "BLOCK_R", "ACC", "num_warps")}

    def reduced(table: Tensor, x: Tensor, relation_x: Tensor) -> Tensor:
        part = weights.new_empty((triton.cdiv(vertices, chunk), relations, heads, dim))
        if part.numel():
            relation_part[part.shape[0], heads, triton.cdiv(relations, sizes["BLOCK_R"])](
                table, x, relation_x, part, vertices, relations, chunk, **blocks
            )
        return part.sum(0).to(query.dtype)

    return (*grads, reduced(by_column_table, key, relation_key), reduced(by_row_table, query, relation_query))
