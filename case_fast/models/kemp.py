"""KEMP (Li et al., AAAI 2022): concepts join the context as a graph, emotional words say what is felt, and the decoder attends as
they weigh."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_fast import equations as eq
from case_fast import equations_baselines as eqb
from case_fast.batch import Batch
from case_fast.models.base import no_autocast
from case_fast.models.layers import (
    AnySeed,
    Attention,
    Decoder,
    DecoderLayer,
    Dropping,
    Linear,
    Memory,
    normalized,
    product,
    seed_at,
)
from case_fast.models.results import Choice, Output, Reading, Why
from case_fast.models.transformer import MultiTRS, MultiTRSConfig
from case_fast.ops import RowSource, graph_attention


@dataclass(frozen=True)
class KEMPConfig(MultiTRSConfig):
    """The settings of `KEMP`, on top of `MultiTRSConfig`; the defaults are those that its published figures come from.

    Attributes:
        concepts: the context is read with its concepts and their graph; off, alone.
        emotion_dependency: the emotional signal enters each decoder layer, and L_att is part of the objective.
        graph_dropout: of the graph's attention.
        gamma_attention: weight of L_att, times what attention_scale says.
        attention_scale: "one", "dialogue" or "batch", as emotion_scale.
    """

    kind = "kemp"
    ablations = {"w/o ECE": {"concepts": False}, "w/o EDD": {"emotion_dependency": False}}

    layers: int = 1
    emotion_scale: Literal["one", "dialogue", "batch"] = "dialogue"
    concepts: bool = True
    emotion_dependency: bool = True
    graph_dropout: float = 0.2
    gamma_attention: float = 0.1
    attention_scale: Literal["one", "dialogue", "batch"] = "batch"


class ContextGraph(Dropping):
    """LN(v + W_o attention over the neighbours in G_EC), without feed-forward; concepts keep their rows."""

    def __init__(self, d_model: int, heads: int, dropout: float):
        super().__init__(dropout)
        self.attention, self.norm = Attention(d_model, heads, dropout), nn.LayerNorm(d_model)

    def forward(self, x: Tensor, indptr: Tensor, indices: Tensor, is_concept: Tensor, seed: AnySeed) -> Tensor:
        """x (V, d), is_concept (V,) -> (V, d)."""
        dropout_p, own_seed = self.drop(seed)
        attended = graph_attention(*self.attention.projected(x), indptr, indices, dropout_p=dropout_p, seed=own_seed)
        _, seen = self.added(x, self.attention.output(attended.flatten(-2)), self.norm, seed_at(seed, "attended"))
        return torch.where(is_concept.unsqueeze(1), x, seen)


class EmotionDecoderLayer(DecoderLayer):
    """h <- h + W_x [W_o attention; g] in place of h + W_o attention: one source, and what is added is g, the emotional signal."""

    def __init__(self, d_model: int, heads: int, ffn: int, dropout: float, sources: int, width: int | None = None):
        super().__init__(d_model, heads, ffn, dropout, sources, width)
        self.mix = Linear(2 * d_model, d_model, bias=False)

    def sources(self, memories: list[Memory]) -> list[RowSource]:
        of_attended, _ = self.mix.weight.chunk(2, dim=1)
        return [replace(source, output_weight=of_attended @ source.output_weight) for source in super().sources(memories)]

    def addition(self, added: Tensor) -> Tensor:
        return product(added, self.mix.weight.chunk(2, dim=1)[1])


@dataclass(kw_only=True)
class KEMPReading(Reading):
    """What KEMP understood.

    Attributes:
        share (V,): w_i, how much of the emotional signal each row of the memory gives; dialogue (V,) its dialogue.
    """

    share: Tensor
    dialogue: Tensor


class KEMP(MultiTRS, paper_url="https://doi.org/10.1609/aaai.v36i10.21347"):
    """V = vertices of G_EC through one graph attention, G = Enc(V); g = sum_i w_i G_i with w the softmax of their emotion
    intensities, l = W g. The decoder starts from W_l l + b instead of BOS, reads G, and adds g; L_att draws the attention of its
    last layer to w.
    """

    Config = KEMPConfig
    needs = ("dialogue", "concept")
    presets = {**MultiTRS.presets, "frame": {"model": {**MultiTRS.presets["frame"]["model"], "attention_scale": "one"}}}
    published = {
        "": {"source": "Zhou et al. (ACL 2023), Table 1 (recipe: released)", "ppl_geometric": 37.32, "dist_1": 0.55,
             "dist_2": 2.31, "acc_1": 0.341},
    }
    shared = ("encoder",)

    def _add_parts(self) -> None:
        super()._add_parts()
        c, d = self.config, self.config.d_model
        if c.concepts:
            self.graph = ContextGraph(d, c.heads, c.graph_dropout)
            self.concept_state = nn.Parameter(torch.empty(d))
        if c.emotion_dependency:
            self.decoder = Decoder(c.layers, d, c.heads, c.ffn, c.decoder_dropout, 1, c.attention_width, EmotionDecoderLayer)
        self.first_word = nn.Linear(c.emotions, d)
        self.sources = (("concepts",) if c.concepts else ("context",),)

    def _initialize(self) -> None:
        super()._initialize()
        if self.config.concepts:
            nn.init.normal_(self.concept_state)  # as large as a scaled word

    def _words(self, batch: Batch) -> dict[str, Tensor]:
        if not self.config.concepts:
            return super()._words(batch)
        return {"concept": batch.concept.word, "context_role": batch.context_role}

    def _read(self, batch: Batch, words: dict[str, Tensor]) -> KEMPReading:
        part, size = batch.concept, batch.size
        if self.config.concepts:
            rows, cu, dialogue = self._vertices(batch, words), part.graph.cu_vertices, part.graph.dialogue
            intensity = part.intensity
        else:
            rows = self.place(words["context"] + words["context_role"], batch.context_position, batch.longest)
            cu, dialogue = batch.cu_context, batch.context_segment
            intensity = eq.take(part.intensity, part.graph.cu_vertices[dialogue] + batch.context_position)
        rows = self.encoder(rows, cu, seed=seed_at(batch.seed, "context"))
        with no_autocast(rows):
            seen = eq.full_precision(rows)
            share = eq.segment_log_softmax(intensity.to(seen.dtype), dialogue, size).exp()
            signal = eq.segment_sum(share.unsqueeze(1) * seen, dialogue, size)
            logits = F.linear(signal, eq.full_precision(self.w_emo))
            start = self.first_word(logits)
        watched = [] if self.training and self.config.emotion_dependency else None
        return KEMPReading(memories=[Memory(rows, cu)], emotion_logits=logits.log_softmax(-1), start=start,
                           added=signal.to(rows.dtype) if self.config.emotion_dependency else None, watched=watched,
                           share=share, dialogue=dialogue)

    def _vertices(self, batch: Batch, words: dict[str, Tensor]) -> Tensor:
        """The vertices of G_EC with their states, through the graph, (V, d)."""
        part, graph = batch.concept, batch.concept.graph
        is_concept = part.type == 1
        role = eq.take(words["context_role"], batch.cu_context[graph.dialogue] + part.position)  # a concept's is that of its word
        state = torch.where(is_concept.unsqueeze(1), self.concept_state.to(role.dtype), role)
        rows = self.place(words["concept"], part.position, batch.longest) + state
        return self.graph(rows, graph.indptr, graph.indices, is_concept, seed_at(batch.seed, "graph"))

    def _add_losses(self, batch: Batch, reading: KEMPReading, out: Output) -> None:
        if reading.watched is None:
            return
        with no_autocast(reading.share):
            out.losses["attention"] = self._attention_loss(batch, reading)
        scale = eqb.emotion_scale(self.config.attention_scale, *batch.sizes.to(out.loss.dtype))
        out.loss = out.loss + self.config.gamma_attention * scale * out.losses["attention"]

    def _attention_loss(self, batch: Batch, reading: KEMPReading) -> Tensor:
        """L_att, the mean over dialogues of the mean of (alpha_i - w_i)^2."""
        layer = self.decoder.layers[-1]
        attention, norm = layer.cross_attention[0], layer.cross_norm[0]
        rows, memory = eq.full_precision(reading.watched[0]), eq.full_precision(reading.memories[0].rows)
        query = attention.split(attention.query(normalized(rows, norm)[1]))
        key = attention.split(attention.key(memory))
        alpha = eqb.mean_attention(query, key, batch.target_segment, reading.dialogue, batch.size)
        missed = eq.segment_mean(((alpha - reading.share) ** 2).unsqueeze(1), reading.dialogue, batch.size).squeeze(1)
        return (missed * batch.dialogue_weight.to(missed.dtype)).sum()

    def explain(self, batch: Batch, reading: KEMPReading, posterior: bool = False) -> Why:
        """The share of each vertex of G_EC in the emotional signal; no reply changes it."""
        shares = Choice(prior=reading.share, dialogue=reading.dialogue)
        return Why(emotion=reading.emotion_logits.exp(), choices={"concepts": shares} if self.config.concepts else {})
