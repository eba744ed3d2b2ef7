"""Every op in plain torch: the backend "reference", the oracle of the tests and the baseline of the benchmarks at once.

No parameters, no state, any float dtype (float64 included). Ragged collections lie end to end: ``segment`` (n,) names the
sequence that each row belongs to, ``cu`` (s + 1,) holds where each sequence starts. Empty collections are legal everywhere and
give zeros; nothing here divides by a count that can be 0. Half-precision inputs are reduced in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from case_fast.ops import transforms

# -------------------------------------------------------------------------------------------------------------------- ragged rows


def full_precision(x: Tensor) -> Tensor:
    """float32 for half-precision tensors, else the tensor itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` (n, ...) at ``index`` (...): as ``x[index]``, whose backward is several times slower on CPU."""
    return x.index_select(0, index.reshape(-1)).unflatten(0, index.shape)


def segment_ids(cu: Tensor, total: int) -> Tensor:
    """(total,) int64: the sequence that each row belongs to, from offsets ``cu`` (s + 1,)."""
    sequences = torch.arange(cu.numel() - 1, device=cu.device)
    return torch.repeat_interleave(sequences, cu[1:].long() - cu[:-1].long(), output_size=total)


def segment_positions(cu: Tensor, total: int) -> Tensor:
    """(total,) int64: the place of each row within its sequence, from 0."""
    return torch.arange(total, device=cu.device) - cu[:-1].long()[segment_ids(cu, total)]


def segment_sum(x: Tensor, segment: Tensor, size: int) -> Tensor:
    """(size, ...): rows of ``x`` (n, ...) summed by segment; an empty segment gives zeros."""
    full = full_precision(x)
    return full.new_zeros((size, *x.shape[1:])).index_add_(0, segment, full).to(x.dtype)


def segment_mean(x: Tensor, segment: Tensor, size: int, segment_sum: Callable = segment_sum) -> Tensor:
    """(size, ...): rows averaged by segment; an empty segment gives zeros. segment_sum: what sums them."""
    full = full_precision(x)
    count = segment_sum(full.new_ones(x.shape[0]), segment, size).clamp(min=1)
    return (segment_sum(full, segment, size) / count.view(-1, *[1] * (x.dim() - 1))).to(x.dtype)


def segment_log_softmax(score: Tensor, segment: Tensor, size: int, segment_sum: Callable = segment_sum, take: Callable = take
                        ) -> Tensor:
    """Log-softmax of ``score`` (n, ...) over the rows of each segment. segment_sum, take: what sums and what takes rows."""
    score = full_precision(score)
    index = segment.view(-1, *[1] * (score.dim() - 1)).expand_as(score)
    peak = score.new_full((size, *score.shape[1:]), -math.inf).scatter_reduce(0, index, score.detach(), "amax")
    shifted = score - take(peak, segment)
    total = segment_sum(shifted.exp(), segment, size).clamp(min=1)  # at least 1 where there are rows; no log(0) where not
    return shifted - take(total.log(), segment)


# ------------------------------------------------------------------------------------------------------------------- random words


def philox4x32(counter: Tensor, key: tuple[int | Tensor, int | Tensor]) -> Tensor:
    """Philox4x32-10 (Salmon et al., 2011): (n, 4) words from ``counter`` (n, 4) and a key of two; 32-bit values in int64."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = (counter[:, i] & mask for i in range(4))
    k0, k1 = key[0] & mask, key[1] & mask

    def multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
        # 32 x 32 -> 64 bits by 16-bit halves of the word: a product of 48 bits never overflows int64
        low, high = (word & 0xFFFF) * constant, (word >> 16) * constant
        middle = high + (low >> 16)
        return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)

    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack([c0, c1, c2, c3], dim=1)


def seed_of(seed: int, seed_at: Tensor | None) -> int | Tensor:
    """What an op's pair of a number and a tensor stands for; see `case_fast.ops.common.seed_pair`."""
    return seed if seed_at is None else seed_at ^ seed


def key_of(seed: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """Both halves of a seed as the key of Philox. A tensor's value is taken modulo 2^63, and is not known here."""
    seed = seed & 2**63 - 1 if isinstance(seed, Tensor) else seed
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


def dropout_keep(edges: int | Tensor, heads: int, dropout_p: float, seed: int | Tensor, device: torch.device | None = None
                 ) -> Tensor:
    """(..., H) bool: the attention weights that dropout keeps; a function of (seed, edge, head) alone, on every backend.

    keep(e, h): word 0 of Philox(counter = (e low, e high, h, 0), key = seed) >= floor(p 2^32).

    Args:
        edges: the numbers e (...) of the weights, or how many there are from 0.
        seed: in [0, 2^63), or an int64 tensor of one element on ``device``, taken modulo 2^63.
        device: of the answer; that of ``edges`` where they are a tensor.
    """
    number = torch.arange(edges, device=device) if isinstance(edges, int) else edges
    edge = number.reshape(-1).repeat_interleave(heads)
    head = torch.arange(heads, device=edge.device).repeat(number.numel())
    counter = torch.stack([edge & 0xFFFFFFFF, edge >> 32, head, torch.zeros_like(head)], dim=1)
    word = philox4x32(counter, key_of(seed))[:, 0]
    return (word >= math.floor(dropout_p * 2**32)).view(*number.shape, heads)


def source_seed(seed: int | Tensor, place: int, part: int) -> int | Tensor:
    """The seed of dropout on the attention weights (part 0) or on the output (part 1) of the source at ``place``: apart in
    the highest of 63 bits, so that a caller who counts seeds up meets none of them again."""
    return seed ^ (2 * place + part) << 47


# ---------------------------------------------------------------------------------------------------------------- graph_attention


def graph_attention(query: Tensor, key: Tensor, value: Tensor, indptr: Tensor, indices: Tensor,
                    relation: Tensor | None = None, relation_query: Tensor | None = None,
                    relation_key: Tensor | None = None, scale: float | None = None,
                    dropout_p: float = 0.0, seed: int | Tensor = 0) -> Tensor:
    """Eq. 1-2: relation-enhanced multi-head attention of each vertex over its neighbours.

    score(i, k) = scale * (q_i + relation_query[r]) . (k_k + relation_key[r]), softmax over the neighbours of i. Without
    ``relation`` it is the vanilla graph attention that G_EC uses. A vertex without neighbours gives zeros; parallel edges
    count separately.

    Args:
        query, key, value: (V, H, D).
        indptr, indices: CSR, (V + 1,) and (E,) integers.
        relation: (E,) integers in [0, R); relation_query, relation_key: (R, H, D), l of Eq. 2 after projection.
        scale: default D ** -0.5.
        dropout_p, seed: dropout on the attention weights, by counter (`dropout_keep`).

    Returns:
        (V, H, D).
    """
    vertices, heads, dimension = query.shape
    row = segment_ids(indptr, indices.numel())
    neighbour = indices.long()
    q, k = take(query, row), take(key, neighbour)
    if relation is not None:
        if relation_query is None or relation_key is None:
            raise ValueError("relation needs relation_query and relation_key")
        q = q + take(relation_query, relation.long())
        k = k + take(relation_key, relation.long())
    score = full_precision((q * k).sum(-1)) * (dimension**-0.5 if scale is None else scale)
    weight = segment_log_softmax(score, row, vertices).exp().to(value.dtype)
    if dropout_p > 0:
        weight = weight * dropout_keep(indices.numel(), heads, dropout_p, seed, weight.device) / (1 - dropout_p)
    return segment_sum(weight.unsqueeze(-1) * take(value, neighbour), row, vertices)


# --------------------------------------------------------------------------------------------------------------- packed_attention


def packed_attention(query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor, causal: bool = False,
                     scale: float | None = None, dropout_p: float = 0.0, seed: int | Tensor = 0, key_of: Tensor | None = None,
                     key_length: Tensor | None = None) -> Tensor:
    """Multi-head attention of packed sequences: each query of sequence s attends to the keys of s (Vaswani et al., 2017).

    Plain torch: sequences are padded to the next power of two of their own length, never to their batch mates', so a
    sequence's result does not depend on the batch it is in. A query that sees no key gives zeros.

    Args:
        query: (Tq, H, D); key, value: (Tk, H, D); cu_query (s + 1,), cu_key: where each sequence starts.
        causal: the last query sees all keys, the one before it all but the last, and so on.
        scale: default D ** -0.5.
        dropout_p, seed: dropout on the attention weights, by counter (`dropout_keep`): the weight of query row i and the
            j-th key of its sequence has the number e = i * (the longest key sequence by cu_key) + j.
        key_of: (s,) the sequence of keys that each sequence of queries attends to; default: its own.
        key_length: how many rows of each sequence of keys are keys, from its first; the others are never read. Default: all.

    Returns:
        (Tq, H, D).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    start_k, size_k = cu_key[:-1].long(), cu_key.long().diff()
    longest = max(transforms.listed(size_k), default=0) if dropout_p > 0 else 0
    if key_length is not None:
        size_k = key_length.long()
    if key_of is not None:
        start_k, size_k = start_k[key_of.long()], size_k[key_of.long()]
    start_q, size_q = cu_query[:-1].long(), cu_query.long().diff()
    buckets: dict[tuple[int, int], list[int]] = {}
    for s, (n, m) in enumerate(zip(transforms.listed(size_q), transforms.listed(size_k), strict=True)):
        if n:
            buckets.setdefault(((n - 1).bit_length(), (m - 1).bit_length() if m else -1), []).append(s)
    parts, rows = [query[:0]], [torch.zeros(0, dtype=torch.int64, device=query.device)]
    for (log_q, log_k), members in buckets.items():
        chosen = torch.tensor(members, device=query.device)
        q_index, q_real = _padded(start_q[chosen], size_q[chosen], 1 << log_q)
        rows.append(q_index[q_real])
        if log_k < 0:
            parts.append(torch.zeros_like(query[q_index[q_real]]))
            continue
        k_index, k_real = _padded(start_k[chosen], size_k[chosen], 1 << log_k)
        seen = k_real[:, None, None, :]  # (n, 1, queries, keys)
        if causal:
            place_q, place_k = torch.arange(1 << log_q, device=query.device), torch.arange(1 << log_k, device=query.device)
            later = (size_k - size_q)[chosen, None, None] + place_q[:, None] - place_k
            seen = seen & (later >= 0).unsqueeze(1)
        some = seen.any(-1, keepdim=True)  # where none is seen, any finite weights will do: they are replaced by zeros
        keep = None
        if dropout_p > 0:
            number = q_index[:, :, None] * longest + torch.arange(1 << log_k, device=query.device)
            keep = dropout_keep(number, query.shape[1], dropout_p, seed).permute(0, 3, 1, 2)
        attended = _padded_attention(take(query, q_index).transpose(1, 2), take(key, k_index).transpose(1, 2),
                                     take(value, k_index).transpose(1, 2), seen | ~some, scale, keep, dropout_p)
        attended = torch.where(some, attended, 0)
        parts.append(take(attended.transpose(1, 2).flatten(0, 1), q_real.flatten().nonzero().squeeze(1)))
    out = take(torch.cat(parts), torch.argsort(torch.cat(rows)))
    # where no one has a key, key and value would drop out of the graph; they stay in it, with zero gradient
    return out if any(log_k >= 0 for _, log_k in buckets) else out + (key[:0].sum() + value[:0].sum())


def _padded(start: Tensor, size: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Row numbers (n, width) of sequences (n,), and which of them are real; the others repeat the first row."""
    place = torch.arange(width, device=start.device)
    real = place < size.unsqueeze(1)
    return start.unsqueeze(1) + place * real, real


def _padded_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, keep: Tensor | None,
                      dropout_p: float) -> Tensor:
    """(n, H, queries, D); ``mask`` (n, 1, 1 or queries, keys) holds what is seen, ``keep`` what dropout leaves."""
    score = full_precision(query @ key.transpose(2, 3)) * scale
    weight = score.masked_fill(~mask, -math.inf).softmax(-1).to(value.dtype)
    return (weight if keep is None else weight * keep / (1 - dropout_p)) @ value


# --------------------------------------------------------------------------------------------------------------- pooled_attention


def pooled_attention(query: Tensor, rows: Tensor, cu: Tensor, scale: float, dropout_p: float = 0.0, seed: int | Tensor = 0
                     ) -> Tensor:
    """One query a sequence and head over rows that all heads share, keys and values at once: `packed_attention` with the rows
    expanded over heads.

    Args:
        query: (s, H, d); rows: (T, d); cu (s + 1,): where each sequence of rows starts.
        scale: that of a head's own dimension, which is not d.
        dropout_p, seed: as of `packed_attention`, which drops the same weights.

    Returns:
        (s, H, d): softmax averages of the rows of each sequence. A sequence without rows gives zeros.
    """
    shared = rows.unsqueeze(1).expand(-1, query.shape[1], -1)
    one_each = torch.arange(cu.numel(), dtype=cu.dtype, device=cu.device)
    return packed_attention(query, shared, shared, one_each, cu, False, scale, dropout_p, seed)


# ---------------------------------------------------------------------------------------------------------------- cross_attention


def cross_attention(hidden: Tensor, cu_hidden: Tensor, sources: Sequence[Any], eps: float = 1e-5, dropout_p: float = 0.0,
                    output_dropout_p: float = 0.0, seed: int | Tensor = 0) -> Tensor:
    """The decoder's attention to its sources in turn, pre-LN, without biases: for each source

    hidden <- hidden + dropout( attention( layer_norm(hidden) W_query^T, key, value ) W_output^T )

    Args:
        hidden: (T, d) packed states of the sequences cu_hidden (B + 1,).
        sources: objects with the fields of `case_fast.ops.Source`, keys and values projected already.
        eps: of the layer norms.
        dropout_p: on the attention weights, as `packed_attention`; output_dropout_p: on what is added to hidden, element
            (row, column) numbered e = row * d + column, as of head 0. Both with a seed of their own (`source_seed`).

    Returns:
        (T, d). A sequence without keys in a source gets 0 from it.
    """
    rows, width = hidden.shape
    for place, source in enumerate(sources):
        normed = F.layer_norm(hidden, (width,), source.norm_weight, source.norm_bias, eps)
        query = F.linear(normed, source.query_weight).unflatten(-1, source.key.shape[1:])
        attended = packed_attention(query, source.key, source.value, cu_hidden, source.cu_keys, dropout_p=dropout_p,
                                    seed=source_seed(seed, place, 0), key_of=source.key_of)
        added = F.linear(attended.flatten(-2), source.output_weight)
        if output_dropout_p > 0:
            keep = dropout_keep(rows * width, 1, output_dropout_p, source_seed(seed, place, 1), hidden.device)
            added = added * keep.view(rows, width) / (1 - output_dropout_p)
        hidden = hidden + added
    return hidden


# ------------------------------------------------------------------------------------------------------------------ residual_norm


def residual_keep(rows: int, width: int, dropout_p: float, seed: int | Tensor, device: torch.device | None = None) -> Tensor:
    """(rows, width) bool: what of an update dropout keeps; a function of (seed, row, column) alone, on every backend.

    keep(i, j): half word >= floor(p 2^16), of Philox(counter = (i low, i high, j div 8, 1), key = seed) the low half of word
    (j div 2) mod 4 where j is even, else the high one. So a counter serves eight neighbours, where `dropout_keep` takes one for
    each: an eighth of the rounds, which would be most of the work. The counter's 1 keeps these draws apart from those of
    attention weights under the same seed.
    """
    eights = (width + 7) // 8
    row = torch.arange(rows, device=device).repeat_interleave(eights)
    eight = torch.arange(eights, device=device).repeat(rows)
    words = philox4x32(torch.stack([row & 0xFFFFFFFF, row >> 32, eight, torch.ones_like(row)], dim=1), key_of(seed))
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=2).view(rows, 8 * eights)[:, :width]
    return halves >= math.floor(dropout_p * 2**16)


def residual(x: Tensor, update: Tensor, dropout_p: float = 0.0, seed: int | Tensor = 0) -> Tensor:
    """x + dropout(update), both (n, d); what is kept (`residual_keep`) is divided by 1 - p, p in whole 2^-16."""
    if dropout_p > 0:
        keep = residual_keep(*update.shape, dropout_p, seed, update.device)
        update = update * keep / (1 - math.floor(dropout_p * 2**16) / 2**16)
    return x + update


def residual_norm(x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5, dropout_p: float = 0.0,
                  seed: int | Tensor = 0) -> tuple[Tensor, Tensor]:
    """A layer's end and the next one's beginning: total = x + dropout(update) (`residual`), normed = layer_norm(total).

    Args:
        x: (n, d); update: (n, d), or None: nothing is added.
        weight, bias: (d,) of the layer norm; eps: of it.

    Returns:
        total and normed, (n, d) each.
    """
    total = x if update is None else residual(x, update, dropout_p, seed)
    full = full_precision(total)
    normed = F.layer_norm(full, full.shape[1:], weight.to(full.dtype), bias.to(full.dtype), eps)
    return total, normed.to(x.dtype)


# ------------------------------------------------------------------------------------------------------------------- bilinear_mim

SCORES = ("bilinear_sigmoid", "dot")  # f of Eq. 10 and 12 as the paper prints it, and as the authors' code computes it


def bilinear_mim(x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor | None = None, num_negatives: int | None = None,
                 seed: int | Tensor = 0, reduction: str = "mean", score: str = "bilinear_sigmoid", sizes: Tensor | None = None
                 ) -> Tensor:
    """Eq. 9 and 11, negated: mutual information maximisation with a bilinear, sigmoid score (Eq. 10, 12) or a dot product.

    loss_p = -2 S[p, c] + log sum_q exp S[p, q] + log( exp S[p, c] + sum_{p': positive[p'] != c} exp S[p', c] ), c = positive[p].
    The positive is part of both sums (Appendix A). Without any negative the loss and its gradient are exactly 0.

    Args:
        x (P, d), y (Q, d), weight (d, d); score: "bilinear_sigmoid", or "dot", which has no weight.
        positive: (P,) row of y that pairs with x_p; default arange (then P == Q).
        num_negatives: k draws with replacement a pair and side, in place of all other rows.
        reduction: "mean" (0 when there is no pair), "sum" or "none".
        sizes: see `mim_sides`; "mean" is over the pairs that exist.

    Raises:
        ValueError: P != Q without ``positive``, an unknown reduction or score, or a weight that does not go with the score.
    """
    if positive is None:
        if x.shape[0] != y.shape[0]:
            raise ValueError(f"x has {x.shape[0]} rows and y {y.shape[0]}: positive must say which belong together")
        positive = torch.arange(x.shape[0], device=x.device)
    side_y, side_x, _ = mim_sides(x, y, weight, positive, num_negatives, seed, score, sizes)
    return reduced(side_y + side_x, reduction, None if sizes is None else sizes[0])


def mim_sides(x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor, num_negatives: int | None = None,
              seed: int | Tensor = 0, score: str = "bilinear_sigmoid", sizes: Tensor | None = None
              ) -> tuple[Tensor, Tensor, Tensor]:
    """Both bracketed sums of Eq. 9 / 11 with a score S, each as log(sum over its set of exp S) - S(positive).

    "bilinear_sigmoid": S = sigmoid(z) with z = x^T W y; as 0 < S < 1, its sums need no maximum. "dot": S = z = x . y.

    Args:
        x (P, d), y (Q, d), weight (d, d), None for "dot"; positive (P,) names the row of y that pairs with x_p.
        num_negatives: draw so many negatives a pair and side (`draw_negatives`) in place of all (`mim_negatives`).
        sizes: (2,) how many of the P pairs and of the Q rows of y exist, the first ones; default all. The others are in no sum,
            their results and gradients are 0.

    Returns:
        side over rows of y (P,), side over rows of x (P,), z of the positive pair (P,).
    """
    if score not in SCORES or (score == "dot") != (weight is None):
        raise ValueError(f"score must be bilinear_sigmoid with a weight or dot without, not {score!r}")
    x, y, positive = full_precision(x), full_precision(y), positive.long()
    if sizes is not None:
        exist_x, exist_y = (torch.arange(len(rows), device=rows.device) < size for rows, size in zip((x, y), sizes, strict=True))
        x, y = torch.where(exist_x.unsqueeze(1), x, 0), torch.where(exist_y.unsqueeze(1), y, 0)
        positive = torch.where(exist_x, positive, 0)
    projected = x if weight is None else x @ full_precision(weight)
    logit = (projected * take(y, positive)).sum(-1)
    if num_negatives is None:
        z = projected @ y.T  # (P, Q)
        # own[p, q]: row q of y is the positive of x_p, so neither is a negative of the other
        own = positive.unsqueeze(1) == torch.arange(y.shape[0], device=y.device)
        if sizes is not None:
            own = own | ~(exist_x.unsqueeze(1) & exist_y)
        absent_y = absent_x = own
    else:
        over_y, over_x, found_y, found_x = draw_negatives(positive, y.shape[0], num_negatives, seed, sizes)
        z_y = torch.einsum("pd,pkd->pk", projected, take(y, over_y))
        z_x = torch.einsum("pkd,pd->pk", take(projected, over_x), take(y, positive))
        absent_y, absent_x = ((~found).unsqueeze(1).expand_as(over_y) for found in (found_y, found_x))
    if score == "dot":
        if num_negatives is None:
            (peak_y, rest_y), (peak_x, rest_x) = _log_sum(z, absent_y, 1), _log_sum(z, absent_x, 0)
            peak_x, rest_x = take(peak_x, positive), take(rest_x, positive)
        else:
            (peak_y, rest_y), (peak_x, rest_x) = _log_sum(z_y, absent_y, 1), _log_sum(z_x, absent_x, 1)
        # log(exp a + exp b) - b = softplus(a - b); beyond the threshold it is a - b, exact in float64 too
        side_y, side_x = (F.softplus((peak - logit) + rest, threshold=40) for peak, rest in ((peak_y, rest_y), (peak_x, rest_x)))
    else:
        if num_negatives is None:
            exponential = torch.sigmoid(z).exp().masked_fill(own, 0)
            sum_y, sum_x = exponential.sum(1), take(exponential.sum(0), positive)
        else:
            sum_y, sum_x = (torch.sigmoid(z).exp().masked_fill(absent, 0).sum(1)
                            for z, absent in ((z_y, absent_y), (z_x, absent_x)))
        relative = torch.exp(-torch.sigmoid(logit))
        side_y, side_x = torch.log1p(sum_y * relative), torch.log1p(sum_x * relative)
    if sizes is not None:
        side_y, side_x, logit = (torch.where(exist_x, of_pair, 0) for of_pair in (side_y, side_x, logit))
    return side_y, side_x, logit


def _log_sum(z: Tensor, absent: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """log of the sum of exp z over ``dim`` without the ``absent`` ones, as the largest z plus the rest: large scores have no
    digits left for both. Where nothing is left, -inf and 0, without gradient."""
    none = absent.all(dim)
    left = z.masked_fill(absent, -math.inf).masked_fill(none.unsqueeze(dim), 0)
    peak = left.detach().amax(dim) if left.shape[dim] else left.detach().sum(dim)
    rest = (left - peak.unsqueeze(dim)).exp().sum(dim).log()
    return peak.masked_fill(none, -math.inf), rest.masked_fill(none, 0)


def group_sizes(positive: Tensor, rows_of_y: int) -> Tensor:
    """(Q,) int64: how many pairs each row of y belongs to. As ``bincount``, whose length is known to a compiler."""
    return positive.new_zeros(rows_of_y).index_add(0, positive, torch.ones_like(positive))


def mim_negatives(positive: Tensor, rows_of_y: int, num_negatives: int | None = None) -> tuple[Tensor, Tensor]:
    """(P,), (P,) int64: how many negatives each pair has over rows of y, and over rows of x, in `mim_sides`."""
    over_y = torch.full_like(positive, rows_of_y - 1)
    over_x = positive.numel() - take(group_sizes(positive, rows_of_y), positive)
    if num_negatives is None:
        return over_y, over_x
    return (over_y > 0) * num_negatives, (over_x > 0) * num_negatives


def draw_negatives(positive: Tensor, rows_of_y: int, num_negatives: int, seed: int | Tensor, sizes: Tensor | None = None
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sampled sets of Eq. 9 / 11: k uniform draws with replacement for each pair and side, by counter.

    Draw ``slot`` of pair p on side s: u = word 0 of Philox(counter = (slot, p, s, 0), key = seed), r = (u * n) >> 32.
    Side 0 draws rows of y other than c = positive[p]: n = Q - 1, row r + (r >= c). Side 1 draws rows p' of x with
    positive[p'] != c: row = the r-th of these, ascending. ``sizes``: see `mim_sides`; P and Q are these.

    Returns:
        rows of y (P, k), rows of x (P, k), and (P,) bool each: whether that side has any eligible row.
    """
    pairs = positive.numel()
    device = positive.device
    pair = torch.arange(pairs, device=device).repeat_interleave(num_negatives)
    slot = torch.arange(num_negatives, device=device).repeat(pairs)

    def draw(side: int, eligible: Tensor) -> Tensor:
        counter = torch.stack([slot, pair, torch.full_like(pair, side), torch.zeros_like(pair)], dim=1)
        word = philox4x32(counter, key_of(seed))[:, 0].view(pairs, num_negatives)
        n = eligible.view(-1, 1)
        return ((word >> 16) * n + (((word & 0xFFFF) * n) >> 16)) >> 16  # (word * n) >> 32 for n < 2^31

    if sizes is not None:  # pairs that do not exist are a group of their own, behind all others
        pair_count, row_count = sizes
        exist = torch.arange(pairs, device=device) < pair_count
        positive = torch.where(exist, positive, rows_of_y)
        others_y = (row_count - 1) * exist
    else:
        others_y = torch.full((pairs,), rows_of_y - 1, device=device)
    r = draw(0, others_y)
    over_y = r + (r >= positive.unsqueeze(1)).long()
    size = group_sizes(positive, rows_of_y + (sizes is not None))
    others_x = (pairs if sizes is None else pair_count * exist) - size[positive]
    r = draw(1, others_x)
    # The r-th row outside group c is r + (number of rows of c that come before it). Within a group the keys
    # (row - its rank) ascend, so one search over all groups finds that number.
    order = torch.argsort(positive, stable=True)
    start = torch.cumsum(size, 0) - size
    rank = torch.arange(pairs, device=device) - start[positive[order]]
    group_key = positive[order] * (pairs + 1) + (order - rank)
    found = torch.searchsorted(group_key, positive.unsqueeze(1) * (pairs + 1) + r, right=True)
    over_x = r + found - start[positive].unsqueeze(1)
    none_y, none_x = (others_y <= 0).unsqueeze(1), (others_x <= 0).unsqueeze(1)
    return over_y.masked_fill(none_y, 0), over_x.masked_fill(none_x, 0), others_y > 0, others_x > 0


def reduced(loss: Tensor, reduction: str, count: Tensor | None = None) -> Tensor:
    """``loss`` (n,) as it is ("none"), or its "sum" or "mean" (0 of no rows). ``count``: () how many rows the mean is over."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / (max(loss.numel(), 1) if count is None else count.clamp(min=1))
    raise ValueError(f"reduction must be mean, sum or none, not {reduction!r}")


# ------------------------------------------------------------------------------------------------------------------------- linear

ACTIVATIONS = (None, "relu", "gelu", "tanh")


def linear(x: Tensor, weight: Tensor | Sequence[Tensor], bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """f(W x + b) of rows ``x`` (n, K), with ``weight`` (N, K) or several end to end, (N,) of ``bias``: (n, N); or of each of G
    groups, with x (n, G, K), weights (G, N, K) and bias (G, N): (n, G, N)."""
    whole = weight if isinstance(weight, Tensor) else weight[0] if len(weight) == 1 else torch.cat(list(weight), -2)
    if x.dim() == 2:
        z = F.linear(x, whole, bias)
    else:
        z = torch.bmm(x.transpose(0, 1), whole.mT).transpose(0, 1).contiguous()
        z = z if bias is None else z + bias
    return z if activation is None else F.gelu(z) if activation == "gelu" else z.relu() if activation == "relu" else z.tanh()


# ----------------------------------------------------------------------------------------------------------- linear_cross_entropy


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, cu_target: Tensor | None = None
                         ) -> tuple[Tensor, Tensor]:
    """Eq. 8 and 19 before their sums: -log P(y | row) of each target word, P = softmax(weight hidden + bias).

    Args:
        hidden (T, d), weight (V, d), bias (V,), target (M,).
        cu_target: (T + 1,): row t has the targets target[cu_target[t]:cu_target[t + 1]]; None: row t has target t alone.

    Returns:
        negative log-likelihood (M,), the most probable word (T,) (lowest index on ties).
    """
    logits = full_precision(F.linear(hidden, weight, bias))
    log_probability, prediction = F.log_softmax(logits, dim=-1), logits.argmax(dim=-1)
    if cu_target is None:
        return F.nll_loss(log_probability, target.long(), reduction="none"), prediction
    return -log_probability[segment_ids(cu_target, target.numel()), target.long()], prediction


def greatest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of ``values`` (n, m) and their places, best first, the lowest place first among equals."""
    if k < values.shape[1] and not transforms.is_any():  # torch.vmap has no branch on what a tensor holds
        top, place = values.topk(k + 1, dim=1)
        if not (top[:, k] == top[:, k - 1]).any():  # else topk leaves open which of the equals at the edge it takes
            place = place[:, :k].sort(dim=1).values
            top, order = values.gather(1, place).sort(dim=1, descending=True, stable=True)
            return top, place.gather(1, order)
    top, place = values.sort(dim=1, descending=True, stable=True)
    return top[:, :k], place[:, :k]


def top_words(hidden: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable words of each row, the best first: log-probabilities (T, k) and words (T, k). hidden (T, d)."""
    logits = full_precision(F.linear(hidden, weight, bias))
    score, word = greatest(logits, k)
    return score - logits.logsumexp(dim=1, keepdim=True), word
