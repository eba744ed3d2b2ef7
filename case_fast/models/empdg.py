"""EmpDG (Li et al., COLING 2020), its generator: what is emotional of the context is read a second time, by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_fast import equations as eq
from case_fast import equations_baselines as eqb
from case_fast.batch import Batch
from case_fast.models.base import Reading, no_autocast
from case_fast.models.layers import Encoder, Memory, seed_at
from case_fast.models.transformer import MultiTRS, MultiTRSConfig


@dataclass(frozen=True)
class EmpDGConfig(MultiTRSConfig):
    """The settings of `EmpDG`, those of `MultiTRSConfig`; the defaults are those that its published figures come from."""

    kind = "empdg"

    layers: int = 1
    emotion_scale: Literal["one", "dialogue", "batch"] = "dialogue"


class EmpDG(MultiTRS, paper_url="https://aclanthology.org/2020.coling-main.394"):
    """H = Enc(X), Z = Enc_e of [SEP] and the context's emotional words; l = W [z; c] with z and c their first rows. The decoder
    starts from W_l l + b instead of BOS and reads H and Z as one memory. The discriminators, which need the turn after the reply,
    are a model of their own: `case_fast.models.empdg_adversarial`.
    """

    Config = EmpDGConfig
    needs = ("dialogue", "emotional")
    published = {
        "": {"source": "Zhou et al. (ACL 2023), Table 1 (recipe: released)", "ppl_geometric": 37.77, "dist_1": 0.53,
             "dist_2": 2.26, "acc_1": 0.314},
    }
    shared = ("encoder", "emotional_encoder")
    sources = (("context", "emotional"),)

    def _add_parts(self) -> None:
        c, d = self.config, self.config.d_model
        self.emotional_encoder = Encoder(c.layers, d, c.heads, c.ffn, c.encoder_dropout, width=c.attention_width)
        self.w_emo = nn.Parameter(torch.empty(c.emotions, 2 * d))
        self.first_word = nn.Linear(c.emotions, d)

    def _words(self, batch: Batch) -> dict[str, Tensor]:
        return super()._words(batch) | {"emotional": batch.emotional.word}

    def _read(self, batch: Batch, words: dict[str, Tensor]) -> Reading:
        context, of = self._encoded(batch, words), batch.emotional
        felt = self.place(words["emotional"], of.position, batch.longest)
        felt = self.emotional_encoder(felt, of.cu, seed=seed_at(batch.seed, "emotional words"))
        summary = torch.cat([eq.take(felt, of.cu[:-1]), eq.take(context, batch.cu_context[:-1])], dim=-1)
        with no_autocast(summary):
            logits = F.linear(eq.full_precision(summary), eq.full_precision(self.w_emo))
            start = self.first_word(logits)
        memory = Memory(*eqb.interleave(context, batch.cu_context, batch.context_segment, felt, of.cu, of.segment))
        return Reading(memories=[memory], emotion_logits=logits.log_softmax(-1), start=start)
