"""The paper in its order: one plain-torch function per equation of CASE (Zhou et al., ACL 2023).

No parameters, no state, any float dtype (float64 included). Those equations that have kernels are in
`case_fast.ops.reference`, and stand here by name where the paper has them; rows are summed and taken by the ops of
`case_fast.ops.segment_sum`. Ragged collections lie end to end: ``segment`` (n,) names the dialogue (or sequence) that each row
belongs to, ``cu`` (s + 1,) holds where each sequence starts. Empty collections are legal everywhere and give zeros; nothing here
divides by a count that can be 0. Half-precision inputs are reduced in float32. Losses are means as weighted sums: the weights,
1 over the number of rows that the mean is over, come with the batch, so that rows that only fill it up have none.

Deviations from the paper's print, as the project defines them: Eq. 9 and 11 are negated (a loss is minimised); Eq. 11 and 19
are averaged; the posterior is detached in Eq. 7 by the caller. The products of Eq. 4-6 may be scaled, Eq. 7 be averaged over
vertices, the vectors of Eq. 10 and 12 be standardized: settings of `CASEConfig` (docs/paper.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from case_fast.ops import reference, segment_log_softmax, segment_sum, take
from case_fast.ops import segment_mean as segment_mean
from case_fast.ops.reference import full_precision
from case_fast.ops.reference import segment_ids as segment_ids
from case_fast.ops.reference import segment_positions as segment_positions

# -------------------------------------------------------------------------------------------------- 3.1 Graph encoding, Eq. 1-2


def sinusoidal_position(position: Tensor, dimension: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n, d) position embedding of Vaswani et al. (2017): sines in the first half of the columns, cosines in the second."""
    half = (dimension + 1) // 2
    frequency = torch.exp(torch.arange(half, device=position.device, dtype=torch.float64) * (-math.log(1e4) / max(half - 1, 1)))
    angle = (position.double()[:, None] * frequency).to(torch.promote_types(dtype, torch.float32))
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :dimension].to(dtype)


def superimpose_intensity(vertices: Tensor, intensity: Tensor) -> Tensor:
    """ec_i = (1 + w_i) v_i: the emotion intensity (n,) superimposed on vertex embeddings (n, d)."""
    return vertices * (1 + intensity.to(vertices.dtype)).unsqueeze(-1)


graph_attention = reference.graph_attention  # Eq. 1-2
dropout_keep = reference.dropout_keep  # which attention weights dropout leaves, there and below


# ----------------------------------------------------------------------------------------- 3.2 Coarse-to-fine alignment, Eq. 3-13


def discernment(vectors: Tensor, signal: Tensor, segment: Tensor, scale: float = 1.0) -> Tensor:
    """Eq. 4, 5 and 6: log P(i) = log softmax_i(scale vectors_i . signal) over the knowledge of each dialogue.

    Args:
        vectors: (n, d) knowledge vectors; segment (n,) their dialogues.
        signal: (B, d): phi(s_X) for the prior, s_Y for the posterior.
        scale: of the products: 1 as printed, d^-1/4, or d^-1/2, as attention's.

    Returns:
        (n,) log-probabilities, float32 at least.
    """
    vectors, signal = full_precision(vectors), full_precision(signal)
    signal = signal if scale == 1 else signal * scale
    return segment_log_softmax((vectors * take(signal, segment)).sum(-1), segment, signal.shape[0])


def expected_knowledge(log_probability: Tensor, vectors: Tensor, segment: Tensor, dialogues: int) -> Tensor:
    """Eq. 3: r = sum_i P(i) vectors_i for each dialogue, (B, d); zeros where there is no knowledge."""
    return segment_sum(log_probability.exp().unsqueeze(-1) * full_precision(vectors), segment, dialogues)


def _weighted_sum(x: Tensor, weight: Tensor | float) -> Tensor:
    """() of x (n,) and weights (n,), or one for all of them."""
    return (x * (weight.to(x.dtype) if isinstance(weight, Tensor) else weight)).sum()


def discernment_kl(log_posterior: Tensor, log_prior: Tensor, weight: Tensor | float) -> Tensor:
    """Eq. 7, one of its two terms: sum over all rows of q (log q - log p), averaged over dialogues or over rows.

    Args:
        weight: (n,) of each row's dialogue, or one of all: 1 / B; averaged over rows, as released: `shares` of these.
    """
    return _weighted_sum(log_posterior.exp() * (log_posterior - log_prior), weight)


def shares(weight: Tensor, total: Callable[[Tensor], Tensor] = lambda number: number) -> Tensor:
    """(n,) weights of a mean over the rows whose weight (n,) is above 0: 1 over their number, and 0 of the others. ``total``: of
    that number () here, what it is in the whole batch, `Batch.total`."""
    exist = weight > 0
    return exist.to(weight.dtype) / total(exist.sum()).clamp(min=1)


def bow_loss(nll: Tensor, weight: Tensor) -> Tensor:
    """Eq. 8: minus the mean log-probability of each reply's words, averaged over dialogues.

    Args:
        nll: (M,) of the words of all replies (a multiset, EOS included) under softmax(MLP([r'_cog ; r'_emo])) of their dialogue,
            see `linear_cross_entropy`; weight (M,): 1 / (B m) for a reply of m words.
    """
    return _weighted_sum(nll, weight)


def standardized(x: Tensor, count: Tensor, eps: float = 1e-5) -> Tensor:
    """Rows (n, d) of which each feature has mean 0 and variance 1 over the batch, for the score of Eq. 10 and 12: as
    ``F.batch_norm(x, None, None, training=True)`` of the rows that exist.

    What the rows have in common goes (a single row becomes 0), and their length with it, so that x^T W y / d with W ~ N(0, 1)
    has a variance of about 1 and the sigmoid a slope.

    Args:
        count: () how many rows exist, the first ones. The others are in no statistic and must be finite; what becomes of them
            is left open (`mim_sides` reads over them), and their gradient is 0 if that of their result is.
    """
    x = full_precision(x)
    weight = (torch.arange(x.shape[0], device=x.device) < count).to(x.dtype) / count.clamp(min=1)
    centred = x - weight @ x
    return centred * (weight @ centred.square() + eps).rsqrt()


# Eq. 9-12: the losses, their two sides, and the negatives of each.
bilinear_mim, mim_sides, SCORES = reference.bilinear_mim, reference.mim_sides, reference.SCORES
mim_negatives, draw_negatives, group_sizes = reference.mim_negatives, reference.draw_negatives, reference.group_sizes
philox4x32, reduced = reference.philox4x32, reference.reduced


def infonce_bound(side: Tensor, negatives: Tensor, count: Tensor | None = None) -> Tensor:
    """Eq. 20: the InfoNCE lower bound of one side, log of its set's size included; mean over pairs (0 without pairs).

    Args:
        side: (P,); negatives (P,), how many each pair has; both 0 of pairs that do not exist.
        count: () how many exist; default all.
    """
    return reduced((negatives + 1).to(side.dtype).log() - side, "mean", count)


def alignment_loss(bow: Tensor, kl: Tensor, coarse: Tensor, fine: Tensor, alpha: float) -> Tensor:
    """Eq. 13."""
    return bow + kl + coarse + alpha * fine


# ------------------------------------------------------------------------------------------------- Emotion prediction, Eq. 14-17


def affect_gate(r_emo: Tensor, er_0: Tensor, w_aff: Tensor) -> Tensor:
    """Eq. 15: mu = sigmoid(w_aff^T [r_emo ; er_0]), (B,); w_aff (2d,)."""
    return torch.sigmoid(torch.cat([r_emo, er_0], dim=-1) @ w_aff)


def affect(r_emo: Tensor, er_0: Tensor, mu: Tensor) -> Tensor:
    """Eq. 14: r_aff = mu r_emo + (1 - mu) er_0, (B, d)."""
    return mu.unsqueeze(-1) * r_emo + (1 - mu).unsqueeze(-1) * er_0


def emotion_log_probability(r_aff: Tensor, w_emo: Tensor) -> Tensor:
    """Eq. 16: log P_emo, (B, emotions); w_emo (emotions, d)."""
    return F.log_softmax(full_precision(r_aff @ w_emo.T), dim=-1)


def emotion_loss(log_probability: Tensor, emotion: Tensor, weight: Tensor | float) -> Tensor:
    """Eq. 17, averaged over the batch; weight (B,), or one for all: 1 / B."""
    return _weighted_sum(F.nll_loss(log_probability, emotion, reduction="none"), weight)


# ------------------------------------------------------------------------------------ 3.3 Empathy-aware generation, Eq. 18-19


def fuse_context(context: Tensor, r_cog: Tensor, r_aff: Tensor, segment: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Eq. 18: S'_X[i] = ReLU(W [S_X[i] ; r_cog ; r_aff] + b), (T, d); weight (d, 3d)."""
    return F.relu(F.linear(torch.cat([context, take(r_cog, segment), take(r_aff, segment)], dim=-1), weight, bias))


packed_attention = reference.packed_attention  # of encoders and of the decoder, to its own words
cross_attention, source_seed = reference.cross_attention, reference.source_seed  # of the decoder, to its sources in turn


def source_attention(hidden: Tensor, source: Any, eps: float = 1e-5) -> Tensor:
    """How much rows (M, d) of one reply read each row of a source in `cross_attention`: softmax_j(q . k_j D^-1/2) with
    q = W_query layer_norm(hidden), averaged over heads, (M, S). ``source``: as of `cross_attention`, of one dialogue."""
    normed = F.layer_norm(hidden, hidden.shape[1:], source.norm_weight, source.norm_bias, eps)
    key = full_precision(source.key)
    query = full_precision(F.linear(normed, source.query_weight)).unflatten(-1, key.shape[1:])
    return (torch.einsum("mhd,shd->hms", query, key) * key.shape[-1] ** -0.5).softmax(-1).mean(0)


linear_cross_entropy = reference.linear_cross_entropy  # Eq. 8 and 19 before their sums
greatest, top_words = reference.greatest, reference.top_words  # the most probable words, for decoding


def generation_loss(nll: Tensor, weight: Tensor | float) -> Tensor:
    """Eq. 19, averaged over all target words of the batch; weight (M,), or one for all: 1 / M."""
    return _weighted_sum(nll, weight)


def diversity_weights(counts: Tensor) -> Tensor:
    """(V,) word weights of Sabour et al. (2022): 1 - RF_i / max RF of the model's own running word counts, mean 1.

    No counts yet: all 1. Equal counts of every word leave no contrast: all 1.
    """
    counts = counts.double()
    weights = 1 - counts / counts.max().clamp(min=1)
    mean = weights.mean()
    return torch.where(mean > 0, weights / mean.clamp(min=1e-12), torch.ones_like(weights))


def diversity_loss(nll: Tensor, target: Tensor, word_weights: Tensor, weight: Tensor | float) -> Tensor:
    """Negative log-likelihood, weighted by word (V,), averaged over all target words as in `generation_loss`."""
    return _weighted_sum(take(word_weights.to(nll.dtype), target) * nll, weight)


def total_loss(alignment: Tensor, emotion: Tensor, generation: Tensor, diversity: Tensor,
               gammas: tuple[float, float, float, float]) -> Tensor:
    """L = g1 L_align + g2 L_emo + g3 L_gen + g4 L_div."""
    g1, g2, g3, g4 = gammas
    return g1 * alignment + g2 * emotion + g3 * generation + g4 * diversity
