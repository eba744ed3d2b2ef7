"""Layers that the models share: packed Transformer encoders, graph encoders, and a decoder with several sources.

All of them take rows of sequences that lie end to end, with offsets; none of them knows padding, but for the decoder's
one-token step, whose sources are padded once when decoding starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_fast.equations import packed_attention, superimpose_intensity, take
from case_fast.ops import graph_attention


def first_rows(cu: Tensor) -> Tensor:
    """Offsets of one row a sequence: what the [CLS] rows of packed sequences are packed by."""
    return torch.arange(cu.numel(), device=cu.device)


def draw_seed() -> int:
    """A seed for dropout by counter, from torch's CPU generator, whose state checkpoints hold."""
    return int(torch.randint(2**63 - 1, ()))


class Attention(nn.Module):
    """Multi-head attention over packed sequences; projections without bias."""

    def __init__(self, d_model: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """(..., d) to (..., H, D)."""
        return x.unflatten(-1, (self.heads, -1))

    def forward(self, rows: Tensor, memory: Tensor, cu_rows: Tensor, cu_memory: Tensor, causal: bool = False) -> Tensor:
        """rows (Tq, d) attend to memory (Tk, d) of the same sequence; returns (Tq, d)."""
        q, k, v = self.split(self.query(rows)), self.split(self.key(memory)), self.split(self.value(memory))
        p = self.dropout if self.training else 0.0
        return self.output(packed_attention(q, k, v, cu_rows, cu_memory, causal, dropout_p=p).flatten(-2))


class FeedForward(nn.Sequential):
    def __init__(self, d_model: int, width: int, activation: type[nn.Module] = nn.ReLU):
        super().__init__(nn.Linear(d_model, width), activation(), nn.Linear(width, d_model))


class EncoderLayer(nn.Module):
    """Pre-LN Transformer encoder layer."""

    def __init__(self, d_model: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = Attention(d_model, heads, dropout)
        self.ffn = FeedForward(d_model, ffn)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cu: Tensor, first_only: bool = False) -> Tensor:
        """x (T, d) -> (T, d), or with ``first_only`` the first row of each sequence alone, (s, d)."""
        normed = self.attention_norm(x)
        rows, cu_rows = normed, cu
        if first_only:
            x, rows, cu_rows = take(x, cu[:-1]), take(normed, cu[:-1]), first_rows(cu)
        x = x + self.dropout(self.attention(rows, normed, cu_rows, cu))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Encoder(nn.Module):
    """Pre-LN Transformer encoder with a final layer norm."""

    def __init__(self, layers: int, d_model: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(d_model, heads, ffn, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, cu: Tensor, first_only: bool = False) -> Tensor:
        """x (T, d) -> (T, d). ``first_only``: only the [CLS] rows (s, d), for which the last layer computes nothing else."""
        for place, layer in enumerate(self.layers):
            x = layer(x, cu, first_only and place == len(self.layers) - 1)
        return self.norm(x)


class GraphEncoderLayer(nn.Module):
    """Post-LN graph Transformer layer (Eq. 1-2); with relations the relation-enhanced one of G_CS."""

    def __init__(self, d_model: int, heads: int, ffn: int, dropout: float, relations: bool):
        super().__init__()
        self.heads, self.dropout_p = heads, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.relation = nn.Linear(d_model, 2 * d_model, bias=False) if relations else None
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.ffn = FeedForward(d_model, ffn, nn.GELU)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, indptr: Tensor, indices: Tensor, relation: Tensor | None, relation_embedding: Tensor | None,
                intensity: Tensor | None = None) -> Tensor:  # fmt: skip
        """x (V, d) -> (V, d). ``intensity`` (V,) scales the input of the closing layer norm."""
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.query, self.key, self.value))
        relation_query = relation_key = None
        if self.relation is not None and relation_embedding is not None:
            # projected once for the R types, never per edge
            relation_query, relation_key = (
                half.unflatten(-1, (self.heads, -1)) for half in self.relation(relation_embedding).chunk(2, dim=-1)
            )
        dropout = self.dropout_p if self.training else 0.0
        attended = graph_attention(
            q, k, v, indptr, indices, relation if relation_query is not None else None, relation_query, relation_key,
            dropout_p=dropout, seed=draw_seed() if dropout else 0,
        )  # fmt: skip
        x = self.attention_norm(x + self.dropout(self.output(attended.flatten(-2))))
        x = x + self.dropout(self.ffn(x))
        return self.ffn_norm(x if intensity is None else superimpose_intensity(x, intensity))


class GraphEncoder(nn.Module):
    """Stack of graph layers; ``relations`` types of edges, or None for the vanilla graph Transformer."""

    def __init__(self, layers: int, d_model: int, heads: int, ffn: int, dropout: float, relations: int | None = None):
        super().__init__()
        self.relation_embedding = nn.Parameter(torch.randn(relations, d_model) * d_model**-0.5) if relations else None
        self.layers = nn.ModuleList(
            GraphEncoderLayer(d_model, heads, ffn, dropout, relations is not None) for _ in range(layers)
        )

    def forward(self, x: Tensor, indptr: Tensor, indices: Tensor, relation: Tensor | None = None,
                intensity: Tensor | None = None) -> Tensor:  # fmt: skip
        for place, layer in enumerate(self.layers):
            last = place == len(self.layers) - 1
            x = layer(x, indptr, indices, relation, self.relation_embedding, intensity if last else None)
        return x


@dataclass
class Source:
    """What a decoder attends to: rows (T, d) of all dialogues end to end, and their offsets cu (B + 1,)."""

    rows: Tensor
    cu: Tensor


@dataclass
class DecoderState:
    """Key-value cache of one-token decoding for B dialogues with ``beams`` hypotheses each.

    ``past[layer]`` holds keys and values (B * beams, H, t, D) of the words so far; ``memory[layer][source]`` keys, values
    (B, H, L, D) and a mask (B, 1, 1, L), projected once and shared by all beams of a dialogue.
    """

    beams: int
    memory: list[list[tuple[Tensor, Tensor, Tensor]]]
    past: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)

    def reorder(self, origin: Tensor) -> None:
        """Keep the hypotheses ``origin`` (B * beams,), in that order."""
        self.past = [pair and (pair[0][origin], pair[1][origin]) for pair in self.past]

    def keep(self, dialogues: Tensor) -> None:
        """Go on with these dialogues (n,) only."""
        rows = (dialogues[:, None] * self.beams + torch.arange(self.beams, device=dialogues.device)).flatten()
        self.reorder(rows)
        self.memory = [[tuple(t[dialogues] for t in source) for source in layer] for layer in self.memory]  # type: ignore[misc]


class DecoderLayer(nn.Module):
    """Pre-LN decoder layer: causal self-attention, one cross-attention for each source in turn, feed-forward."""

    def __init__(self, d_model: int, heads: int, ffn: int, dropout: float, sources: int):
        super().__init__()
        self.self_norm, self.self_attention = nn.LayerNorm(d_model), Attention(d_model, heads, dropout)
        self.cross_norm = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(sources))
        self.cross_attention = nn.ModuleList(Attention(d_model, heads, dropout) for _ in range(sources))
        self.ffn_norm, self.ffn = nn.LayerNorm(d_model), FeedForward(d_model, ffn)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cu: Tensor, sources: Sequence[Source]) -> Tensor:
        normed = self.self_norm(x)
        x = x + self.dropout(self.self_attention(normed, normed, cu, cu, causal=True))
        for norm, attention, source in zip(self.cross_norm, self.cross_attention, sources, strict=True):
            x = x + self.dropout(attention(norm(x), source.rows, cu, source.cu))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))

    def memory(self, sources: Sequence[Source]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Keys, values and masks of the sources, padded (see `DecoderState`)."""
        found = []
        for attention, source in zip(self.cross_attention, sources, strict=True):
            lengths = (source.cu[1:] - source.cu[:-1]).tolist()
            keys, values = (
                torch.nn.utils.rnn.pad_sequence(attention.split(project(source.rows)).split(lengths), batch_first=True)
                for project in (attention.key, attention.value)
            )
            real = torch.arange(keys.shape[1], device=keys.device) < torch.tensor(lengths, device=keys.device)[:, None]
            found.append((keys.transpose(1, 2), values.transpose(1, 2), real[:, None, None, :]))
        return found

    def step(self, x: Tensor, past: tuple[Tensor, Tensor] | None, memory: list[tuple[Tensor, Tensor, Tensor]], beams: int
             ) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
        """One word for each hypothesis: x (B * beams, d) -> (B * beams, d) and the longer cache."""
        attention = self.self_attention
        normed = self.self_norm(x)
        q, k, v = (attention.split(p(normed)).unsqueeze(2) for p in (attention.query, attention.key, attention.value))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        x = x + attention.output(F.scaled_dot_product_attention(q, k, v).flatten(1))
        for norm, cross, (keys, values, mask) in zip(self.cross_norm, self.cross_attention, memory, strict=True):
            if keys.shape[2] == 0:
                continue  # no dialogue has this source
            q = cross.split(cross.query(norm(x))).unflatten(0, (-1, beams)).transpose(1, 2)  # beams as rows of one query
            attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            attended = torch.where(mask.any(-1, keepdim=True), attended, torch.zeros_like(attended))
            x = x + cross.output(attended.transpose(1, 2).flatten(0, 1).flatten(1))
        return x + self.ffn(self.ffn_norm(x)), (k, v)


class Decoder(nn.Module):
    """Pre-LN Transformer decoder over several sources, for whole replies (`forward`) and word by word (`start`, `step`)."""

    def __init__(self, layers: int, d_model: int, heads: int, ffn: int, dropout: float, sources: int):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(d_model, heads, ffn, dropout, sources) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, cu: Tensor, sources: Sequence[Source]) -> Tensor:
        """x (M, d) packed decoder inputs, cu (B + 1,); returns (M, d)."""
        for layer in self.layers:
            x = layer(x, cu, sources)
        return self.norm(x)

    def start(self, sources: Sequence[Source], beams: int = 1) -> DecoderState:
        return DecoderState(beams, [layer.memory(sources) for layer in self.layers], [None] * len(self.layers))

    def step(self, x: Tensor, state: DecoderState) -> Tensor:
        """x (B * beams, d), the embedded newest words; returns (B * beams, d) and lengthens the cache in ``state``."""
        for place, layer in enumerate(self.layers):
            x, state.past[place] = layer.step(x, state.past[place], state.memory[place], state.beams)
        return self.norm(x)
