"""CEM (Sabour et al., AAAI 2022): the context seen in the light of each kind of inference, what serves selected by a gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_fast import equations as eq
from case_fast.batch import Batch
from case_fast.errors import ConfigError
from case_fast.models.base import Output, Reading
from case_fast.models.layers import Encoder, Linear, Memory, product, product_of_parts, seed_at
from case_fast.models.transformer import MultiTRS, MultiTRSConfig

KINDS = 4  # relations of cognition, sequences of a dialogue in `RelationsPart.cognition`


@dataclass(frozen=True)
class CEMConfig(MultiTRSConfig):
    """The settings of `CEM`, on top of `MultiTRSConfig`; the defaults are those that its published figures come from.

    Attributes:
        cognition: the four relations of cognition are read.
        affection: the reactions are read; without them the emotion comes from the context alone.
        gamma_diversity: weight of L_div.
    """

    kind = "cem"
    ablations = {"w/o Aff": {"affection": False}, "w/o Cog": {"cognition": False}, "w/o Div": {"gamma_diversity": 0.0}}

    layers: int = 1
    label_smoothing: float = 0.0
    emotion_scale: Literal["one", "dialogue", "batch"] = "one"
    cognition: bool = True
    affection: bool = True
    gamma_diversity: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.cognition or self.affection):
            raise ConfigError("cognition and affection cannot both be off: nothing is left for the decoder to read")


class CEM(MultiTRS, paper_url="https://doi.org/10.1609/aaai.v36i10.21373"):
    """H = Enc(X); U_r = Enc_cog(W_c [H; h_r]) for the inferences h_r of each relation of cognition, U_a = Enc_aff(W_a [H; h_a])
    for the mean of the reactions; with C = [U_1 .. U_4; U_a] and S = sigmoid(C) C the decoder reads W_2 ReLU(W_1 S), and the
    emotion is that of U_a's [CLS] row. L = L_emo + L_gen + 1.5 L_div.
    """

    Config = CEMConfig
    needs = ("dialogue", "relations")
    published = {
        "": {"source": "Zhou et al. (ACL 2023), Table 1 (recipe: released)", "ppl_geometric": 36.86, "dist_1": 0.64,
             "dist_2": 2.84, "acc_1": 0.373},
    }
    shared = ("encoder",)

    def _add_parts(self) -> None:
        super()._add_parts()
        c, d = self.config, self.config.d_model

        def encoder() -> Encoder:
            return Encoder(c.layers, d, c.heads, c.ffn, c.encoder_dropout, width=c.attention_width)

        if c.cognition:
            self.cognition_encoder, self.cognition_refiner = encoder(), encoder()
            self.cognition_fusion = Linear(2 * d, d, bias=False)
            parts, inner = (KINDS + 1, 3) if c.affection else (KINDS, 2)
            self.selection = nn.Sequential(Linear(parts * d, inner * d, bias=False), Linear(inner * d, d, bias=False))
        if c.affection:
            self.affection_encoder, self.affection_refiner = encoder(), encoder()
            self.affection_fusion = Linear(2 * d, d, bias=False)
        self.count_words()

    def _words(self, batch: Batch) -> dict[str, Tensor]:
        c, of = self.config, batch.relations
        return (super()._words(batch) | ({"cognition": of.cognition} if c.cognition else {})
                | ({"reaction": of.reaction} if c.affection else {}))

    def _read(self, batch: Batch, words: dict[str, Tensor]) -> Reading:
        context = self._encoded(batch, words)
        parts = self._cognition(batch, words, context) if self.config.cognition else []
        if self.config.affection:
            parts.append(self._affection(batch, words, context))
        summary = parts[-1] if self.config.affection else context
        emotion = self._emotion(eq.take(summary, batch.cu_context[:-1]))
        memory = self._selected(parts) if self.config.cognition else parts[0]
        return Reading(memories=[Memory(memory, batch.cu_context)], emotion_logits=emotion)

    def _cognition(self, batch: Batch, words: dict[str, Tensor], context: Tensor) -> list[Tensor]:
        """U_r, (T, d) for each relation; the four are refined by one call."""
        of, rows = batch.relations, context.shape[0]
        known = self.place(words["cognition"], of.cognition_position, batch.longest)
        known = self.cognition_encoder(known, of.cu_cognition, first_only=True, seed=seed_at(batch.seed, "cognition"))
        of_context, of_known = product_of_parts(self.cognition_fusion.weight, context, known)
        sequence = torch.cat([KINDS * batch.context_segment + kind for kind in range(KINDS)])
        fused = of_context.repeat(KINDS, 1) + eq.take(of_known, sequence)
        starts = torch.cat([batch.cu_context[:-1] + kind * rows for kind in range(KINDS)])
        cu = torch.cat([starts, batch.cu_context[-1:] + (KINDS - 1) * rows])
        return list(self.cognition_refiner(fused, cu, seed=seed_at(batch.seed, "context with cognition")).split(rows))

    def _affection(self, batch: Batch, words: dict[str, Tensor], context: Tensor) -> Tensor:
        """U_a, (T, d)."""
        of = batch.relations
        felt = self.place(words["reaction"], of.reaction_position, batch.longest)
        felt = self.affection_encoder(felt, of.cu_reaction, seed=seed_at(batch.seed, "affection"))
        average = eq.segment_mean(felt, of.reaction_segment, batch.size)
        of_context, of_felt = product_of_parts(self.affection_fusion.weight, context, average)
        fused = of_context + eq.take(of_felt, batch.context_segment)
        return self.affection_refiner(fused, batch.cu_context, seed=seed_at(batch.seed, "context with affection"))

    def _selected(self, parts: list[Tensor]) -> Tensor:
        """W_2 ReLU(W_1 S), (T, d); sigmoid(C) C is SiLU."""
        first, second = self.selection
        return second(product(F.silu(torch.cat(parts, dim=1)), first.weight, activation="relu"))

    def _add_losses(self, batch: Batch, reading: Reading, out: Output) -> None:
        if self.config.gamma_diversity:
            out.losses["diversity"] = self.diversity_loss(batch, out.nll, out.prediction)
            out.loss = out.loss + self.config.gamma_diversity * out.losses["diversity"]
