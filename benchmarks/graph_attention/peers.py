"""Every way to compute relation-biased graph attention that we measure ourselves against.

A peer is given its inputs in the layout it likes best (padded where it is dense); turning packed into padded is not timed, and
neither is what a data loader would prepare once for it: the row of each edge, the dense matrix of relations. No peer has a
row without neighbours to care for, and none handles parallel edges unless it works on edges; the cases have neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.graph_attention.cases import GraphCase
from benchmarks.measure import OURS, Unfit, Work
from case_fast import equations, ops

MOST_BYTES = 2 << 30  # a dense peer that would need more is left out, and the table says what it would need
FAR = -1e30  # of a vertex pair without an edge, before the softmax


def ours(case: GraphCase) -> Work:
    def attend(query: Tensor, key: Tensor, value: Tensor, *relations: Tensor) -> Tensor:
        return ops.graph_attention(query, key, value, case.graphs.indptr, case.graphs.indices, case.relation, *relations)

    return _packed(case, attend)


def equation(case: GraphCase) -> Work:
    """The fallback of case_fast, in plain torch."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *relations: Tensor) -> Tensor:
        return equations.graph_attention(query, key, value, case.graphs.indptr, case.graphs.indices, case.relation, *relations)

    return _packed(case, attend)


def _packed(case: GraphCase, function: Callable[..., Tensor]) -> Work:
    return Work(function, case.inputs, case.grad_out)


# ---- on edges: gather both ends, scatter to rows


def gather_scatter(case: GraphCase, compiled: bool = False) -> Work:
    """Eager at its best on edges: q . k of gathered rows, the relation terms from tables (V, R, H), scatter to rows."""
    indices = case.graphs.indices.long()
    row = equations.segment_ids(case.graphs.indptr, case.edges)
    relation = None if case.relation is None else case.relation.long()
    function = _compile(_gather_scatter) if compiled else _gather_scatter
    return _packed(case, lambda *leaves: function(row, indices, relation, *leaves))


def _gather_scatter(row: Tensor, neighbour: Tensor, relation: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
                    relation_query: Tensor | None = None, relation_key: Tensor | None = None) -> Tensor:
    vertices, heads, dimension = query.shape
    query = query * dimension**-0.5
    score = (query.index_select(0, row) * key.index_select(0, neighbour)).sum(-1)
    if relation is not None:
        of_query = torch.einsum("vhd,rhd->vrh", query, relation_key)
        of_key = torch.einsum("vhd,rhd->vrh", key, relation_query * dimension**-0.5)
        of_both = (relation_query * relation_key).sum(-1) * dimension**-0.5
        kinds = relation_query.shape[0]
        score = score + of_query.flatten(0, 1).index_select(0, row * kinds + relation)
        score = score + (of_key + of_both).flatten(0, 1).index_select(0, neighbour * kinds + relation)
    index = row[:, None].expand(-1, heads)
    peak = torch.full_like(query[..., 0], FAR).scatter_reduce(0, index, score.detach(), "amax")
    weight = (score - peak.index_select(0, row)).exp()
    total = torch.zeros_like(peak).index_add(0, row, weight)
    weight = weight / total.index_select(0, row)
    return torch.zeros_like(value).index_add(0, row, weight.unsqueeze(-1) * value.index_select(0, neighbour))


# ---- dense: padded to the largest graph, (B, n, n) pairs


@dataclass
class Padded:
    """The case as dense matrices. place: (V,) of each vertex in B * n rows; relation, mask: (B, n, n)."""

    place: Tensor
    relation: Tensor
    mask: Tensor

    @property
    def graphs(self) -> int:
        return self.mask.shape[0]

    @property
    def width(self) -> int:
        return self.mask.shape[1]


def _pad(case: GraphCase, bytes_of_a_pair: int) -> Padded:
    sizes = case.graphs.cu_vertices.diff()
    count, width = sizes.numel(), int(sizes.max())
    needed = count * width**2 * bytes_of_a_pair
    if needed > MOST_BYTES:
        raise Unfit(f"needs about {needed / 2**30:,.0f} GiB")
    device = case.query.device
    first = case.graphs.cu_vertices[:-1].repeat_interleave(sizes)
    within = torch.arange(case.vertices, device=device) - first
    row = equations.segment_ids(case.graphs.indptr, case.edges)
    cell = (case.graphs.dialogue[row] * width + within[row]) * width + within[case.graphs.indices.long()]
    if cell.unique().numel() != cell.numel():
        raise Unfit("has no parallel edges")
    relation = torch.zeros(count * width * width, dtype=torch.int64, device=device)
    relation[cell] = case.graphs.relation.long()
    mask = torch.zeros(count * width * width, dtype=torch.bool, device=device)
    mask[cell] = True
    shape = (count, width, width)
    return Padded(case.graphs.dialogue * width + within, relation.view(shape), mask.view(shape))


def _dense(case: GraphCase, padded: Padded, function: Callable[..., Tensor], trains: bool = True, **more: Any) -> Work:
    """Work on (H, B, n, D) leaves."""
    count, width = padded.graphs, padded.width

    def pad(x: Tensor) -> Tensor:
        full = x.new_zeros(count * width, *x.shape[1:])
        full[padded.place] = x
        return full.view(count, width, *x.shape[1:]).permute(2, 0, 1, 3).contiguous()

    def pack(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # out, query, key, value; the relations as they are
        return *(x.permute(1, 2, 0, 3).flatten(0, 1)[padded.place] for x in results[:4]), *results[4:]

    relations = case.inputs[3:]
    leaves = (pad(case.query), pad(case.key), pad(case.value), *relations)
    return Work(function, leaves, pad(case.grad_out), pack, trains, **more)


def pairs(case: GraphCase) -> Work:
    """The formula as it is usually coded: the relation embedded for each pair of vertices, a softmax over masked rows."""
    padded = _pad(case, bytes_of_a_pair=6 * 4 * case.query[0].numel())
    apart = ~padded.mask

    def attend(query: Tensor, key: Tensor, value: Tensor, *relations: Tensor) -> Tensor:
        query, key = query.unsqueeze(3), key.unsqueeze(2)  # (H, B, n, 1, D), (H, B, 1, n, D)
        if relations:
            of_query, of_key = (F.embedding(padded.relation, x.flatten(1)).unflatten(-1, x.shape[1:]) for x in relations)
            query = query + of_query.permute(3, 0, 1, 2, 4)
            key = key + of_key.permute(3, 0, 1, 2, 4)
        score = (query * key).sum(-1) / math.sqrt(query.shape[-1])
        return score.masked_fill(apart, FAR).softmax(-1) @ value

    return _dense(case, padded, attend)


def dense_products(case: GraphCase, compiled: bool = False) -> Work:
    """Eager at its best on small graphs: dense q k^T and weights v, the relation terms of edges alone added to the former."""
    padded = _pad(case, bytes_of_a_pair=4 * 4 * case.query.shape[1])
    heads = case.query.shape[1]
    cell = padded.mask.flatten().nonzero().squeeze(1)  # (E,) of B * n * n
    relation = padded.relation.flatten()[cell]
    pair_row = cell // padded.width
    pair_column = cell // padded.width**2 * padded.width + cell % padded.width
    kinds = 0 if case.relation_query is None else case.relation_query.shape[0]
    head = torch.arange(heads, device=cell.device)[:, None]
    rows = padded.graphs * padded.width
    of_row = ((head * rows + pair_row) * kinds + relation).flatten()
    of_column = ((head * rows + pair_column) * kinds + relation).flatten()
    cells = (head * padded.mask.numel() + cell).flatten()
    far = torch.zeros(padded.mask.shape, device=cell.device).masked_fill(~padded.mask, FAR).expand(heads, -1, -1, -1)
    if kinds:
        function = _compile(_dense_relations) if compiled else _dense_relations
        return _dense(case, padded, lambda *leaves: function(of_row, of_column, cells, *leaves))
    mask = far.contiguous()
    function = _compile(_dense_plain) if compiled else _dense_plain
    return _dense(case, padded, lambda *leaves: function(mask, *leaves))


def _dense_relations(of_row: Tensor, of_column: Tensor, cells: Tensor, query: Tensor, key: Tensor, value: Tensor,
                     relation_query: Tensor, relation_key: Tensor) -> Tensor:
    heads, graphs, width, dimension = query.shape
    query = query * dimension**-0.5
    relation_query = (relation_query * dimension**-0.5).permute(1, 2, 0)  # (H, D, R)
    relation_key = relation_key.permute(1, 2, 0)
    both = (relation_query * relation_key).sum(1, keepdim=True)
    table_query = query.flatten(1, 2).bmm(relation_key) + both
    table_key = key.flatten(1, 2).bmm(relation_query)
    bias = table_query.flatten().index_select(0, of_row) + table_key.flatten().index_select(0, of_column)
    bias = query.new_full((heads * graphs * width * width,), FAR).index_copy(0, cells, bias).view(-1, width, width)
    score = torch.baddbmm(bias, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2))
    return score.softmax(-1).bmm(value.flatten(0, 1)).view_as(value)


def _dense_plain(mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


# ---- libraries


def flex_attention(case: GraphCase, kept: bool = False) -> Work:
    """torch's FlexAttention, compiled, relation terms from tables in its score_mod. On CPU it has no backward. ``kept``: its mask
    is made beforehand, as for several layers over the same graphs, and not in each call."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    padded = _pad(case, bytes_of_a_pair=32)
    if padded.width > 4096:
        raise Unfit("its mask is dense")  # every block of a random graph holds an edge
    flex, make_mask, relation = _compile(flex), _compile(create_block_mask), padded.relation.int()

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return padded.mask[b, i, j]

    def build() -> Any:
        return make_mask(mask_mod, padded.graphs, None, padded.width, padded.width, device=case.query.device.type)

    mask = build() if kept else None

    def attend(query: Tensor, key: Tensor, value: Tensor, *relations: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        score_mod = None
        if relations:
            relation_query, relation_key = (x.permute(1, 2, 0) for x in relations)  # (H, D, R)
            relation_query = relation_query * query.shape[-1] ** -0.5
            of_query = query @ relation_key * query.shape[-1] ** -0.5 + (relation_query * relation_key).sum(1)[:, None]
            of_key = key @ relation_query  # (B, H, n, R)

            def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                r = relation[b, i, j]
                return score + of_query[b, h, i, r] + of_key[b, h, j, r]

        return flex(query, key, value, score_mod=score_mod, block_mask=mask or build()).transpose(0, 1)

    trains = case.query.device.type != "cpu"
    note = "" if trains else "no backward on CPU"
    part = {} if kept else {"part": build, "part_name": "mask building"}
    return _dense(case, padded, attend, trains, note=note, **part)


def pyg_transformer_conv(case: GraphCase) -> Work:
    """PyG's TransformerConv with its message changed to our score; relations projected beforehand, gathered per edge."""
    try:
        from torch_geometric.nn import TransformerConv
        from torch_geometric.utils import softmax
    except ImportError as error:
        raise Unfit("torch_geometric is not installed: pip install case_fast[bench]") from error

    class Conv(TransformerConv):  # PyG generates code from these names; it does not know the annotations of today
        def message(self, query_i, key_j, value_j, of_query, of_key, index, ptr, size_i):
            if of_query is not None:
                query_i, key_j = query_i + of_query, key_j + of_key
            score = (query_i * key_j).sum(-1) * query_i.shape[-1] ** -0.5
            return value_j * softmax(score, index, ptr, size_i).unsqueeze(-1)

    heads, dimension = case.query.shape[1:]
    conv = Conv(dimension, dimension, heads=heads, root_weight=False, bias=False).to(case.query.device)
    row = equations.segment_ids(case.graphs.indptr, case.edges)
    edge_index = torch.stack([case.graphs.indices.long(), row])
    relation = None if case.relation is None else case.relation.long()

    def attend(query: Tensor, key: Tensor, value: Tensor, *relations: Tensor) -> Tensor:
        of_query, of_key = (x.index_select(0, relation) for x in relations) if relations else (None, None)
        return conv.propagate(edge_index, query=query, key=key, value=value, of_query=of_query, of_key=of_key)

    return _packed(case, attend)


def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)


PEERS: dict[str, Callable[[GraphCase], Work]] = {
    OURS: ours,
    "equations.py, eager": equation,
    "dense, relation embedded per pair, eager": pairs,
    "dense products, edge bias, eager": dense_products,
    "dense products, edge bias, torch.compile": lambda case: dense_products(case, compiled=True),
    "gather/scatter, relation tables, eager": gather_scatter,
    "gather/scatter, relation tables, torch.compile": lambda case: gather_scatter(case, compiled=True),
    "FlexAttention, torch.compile": flex_attention,
    "FlexAttention, torch.compile, mask made beforehand": lambda case: flex_attention(case, kept=True),
    "PyG TransformerConv, relations per edge": pyg_transformer_conv,
}
