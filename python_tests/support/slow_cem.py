"""CEM once more, slowly: one dialogue at a time, in float64, from the definitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from slow_parts import SlowParts, sigmoid, softmax
from torch import Tensor

from case_fast.data.featurizer import Example, TextTable
from case_fast.data.vocabulary import BOS, CLS, EOS, SPEAKER


class SlowCEM(SlowParts):
    def said(self, ids: Sequence[int], texts: TextTable) -> list[int]:
        """The words of these texts end to end, but for "to" and "none"."""
        words = [word for text in ids for word in texts.tokens(text).tolist()]
        return [word for word in words if texts.vocabulary.words[word] not in ("to", "none")]

    def dialogue(self, e: Example, texts: TextTable) -> tuple[Tensor, Tensor, Tensor]:
        """-log P of each target word, the emotions' probabilities, and the decoder's memory."""
        roles = torch.stack([self.word(r) for r in [SPEAKER, *e.context_role.tolist()]])
        context = self.encoder("encoder", self.embed([CLS, *e.context.tolist()]) + roles)
        parts = []
        if self.c.cognition:
            for kind in range(4):
                own = [int(text) for text, sub, relation in zip(e.knowledge, e.knowledge_sub, e.knowledge_relation, strict=True)
                       if sub == 0 and relation == kind]
                known = self.encoder("cognition_encoder", self.embed([CLS, *self.said(own, texts)]))[0]
                fused = torch.stack([self.linear("cognition_fusion", torch.cat([row, known])) for row in context])
                parts.append(self.encoder("cognition_refiner", fused))
        if self.c.affection:
            own = [int(text) for text, sub in zip(e.reaction, e.reaction_sub, strict=True) if sub == 0]
            rows = self.encoder("affection_encoder", self.embed(self.said(own, texts)))
            felt = sum(rows) / len(rows) if len(rows) else torch.zeros(self.c.d_model, dtype=torch.float64)
            fused = torch.stack([self.linear("affection_fusion", torch.cat([row, felt])) for row in context])
            parts.append(self.encoder("affection_refiner", fused))
        summary = parts[-1][0] if self.c.affection else context[0]
        emotion = softmax(torch.stack([(row * summary).sum() for row in self.weights["w_emo"]]))
        if self.c.cognition:
            joined = torch.cat(parts, 1)
            memory = self.linear("selection.1", self.linear("selection.0", sigmoid(joined) * joined).clamp(min=0))
        else:
            memory = parts[0]
        hidden = self.decoder(self.embed([BOS, *e.response.tolist()]), [memory])
        scores, target = self.linear("output", hidden), [*e.response.tolist(), EOS]
        nll = torch.stack([-softmax(row)[word].log() for row, word in zip(scores, target, strict=True)])
        return nll, emotion, memory

    def forward(self, examples: Sequence[Example], texts: TextTable) -> dict[str, Tensor]:
        """The losses of a batch, "loss" the whole, and "nll" and "emotions" of all its words and dialogues."""
        found = [self.dialogue(e, texts) for e in examples]
        nll, emotions = torch.cat([row[0] for row in found]), torch.stack([row[1] for row in found])
        weights = self.word_weights()
        targets = [word for e in examples for word in [*e.response.tolist(), EOS]]
        losses = {
            "generation": nll.mean(),
            "emotion": -sum(emotions[b, e.emotion].log() for b, e in enumerate(examples)) / len(examples),
        }
        losses["loss"] = losses["generation"] + losses["emotion"]
        if self.c.gamma_diversity:
            weighted = [weights[word] * loss for word, loss in zip(targets, nll, strict=True)]
            losses["diversity"] = sum(weighted) / len(targets)
            losses["loss"] = losses["loss"] + self.c.gamma_diversity * losses["diversity"]
        return losses | {"nll": nll, "emotions": emotions}
