"""MoEL once more, slowly: one dialogue at a time, in float64, from the definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from slow_parts import SlowParts, softmax
from torch import Tensor

from case_fast.data.featurizer import Example
from case_fast.data.vocabulary import BOS, CLS, EOS, SPEAKER


class SlowMoEL(SlowParts):
    def gates(self, score: Tensor) -> Tensor:
        best = sorted(range(len(score)), key=lambda e: (-score[e].item(), e))[: self.c.top_k]
        return softmax(torch.stack([score[e] if e in best else score[e] * 0 - math.inf for e in range(len(score))]))

    def dialogue(self, e: Example, forced: bool) -> dict[str, Tensor]:
        roles = torch.stack([self.word(r) for r in [SPEAKER, *e.context_role.tolist()]])
        context = self.encoder("encoder", self.embed([CLS, *e.context.tolist()]) + roles)
        score = self.weights["w_emo"] @ context[0]
        gates = self.gates(score)
        if forced:
            gates = torch.tensor([float(label == e.emotion) for label in range(len(score))], dtype=torch.float64)
        x = self.embed([BOS, *e.response.tolist()])
        mixed = self.decoder_layer("decoder.listeners.0", x, [context])
        for label in gates.nonzero().flatten().tolist():
            mixed = mixed + gates[label] * self.decoder_layer(f"decoder.listeners.{label + 1}", x, [context])
        scores, target = self.linear("output", self.decoder(mixed, [context])), [*e.response.tolist(), EOS]
        nll = torch.stack([-softmax(row)[word].log() for row, word in zip(scores, target, strict=True)])
        return {"nll": nll, "emotion": -softmax(score)[e.emotion].log(), "gates": gates}

    def forward(self, examples: Sequence[Example], forced: bool) -> dict[str, Tensor]:
        """Losses of a batch, "loss" the whole, without label smoothing; "gates" (B, K). ``forced``: those of gold emotions."""
        found = [self.dialogue(e, forced) for e in examples]
        nll, count = torch.cat([row["nll"] for row in found]), len(examples)
        losses = {"generation": nll.mean(), "emotion": sum(row["emotion"] for row in found) / count}
        scale = {"one": 1.0, "batch": 1 / len(nll), "dialogue": count / len(nll)}[self.c.emotion_scale]
        losses["loss"] = losses["generation"] + scale * losses["emotion"]
        return losses | {"nll": nll, "gates": torch.stack([row["gates"] for row in found])}
