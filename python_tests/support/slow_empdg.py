"""EmpDG's generator once more, slowly: one dialogue at a time, in float64, from the definitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from slow_parts import SlowParts, softmax
from torch import Tensor

from case_fast.data.featurizer import Example, TextTable
from case_fast.data.text import stop_words
from case_fast.data.vocabulary import CLS, EOS, SEP, SPEAKER


class SlowEmpDG(SlowParts):
    def dialogue(self, e: Example, texts: TextTable) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-log P of each target word, the emotions' probabilities, the decoder's memory, and the words' probabilities."""
        roles = torch.stack([self.word(r) for r in [SPEAKER, *e.context_role.tolist()]])
        context = self.encoder("encoder", self.embed([CLS, *e.context.tolist()]) + roles)
        emotional = [word for word, intensity in zip(e.context.tolist(), e.context_intensity.tolist(), strict=True)
                     if intensity and texts.vocabulary.words[word] not in stop_words()]
        felt = self.encoder("emotional_encoder", self.embed([SEP, *emotional]))
        summary = torch.cat([felt[0], context[0]])
        logits = torch.stack([(row * summary).sum() for row in self.weights["w_emo"]])
        memory = torch.cat([context, felt])
        places = self.embed([0] * (1 + len(e.response))) - self.word(0)
        first = self.linear("first_word", logits)
        hidden = self.decoder(torch.stack([first, *(self.word(word) for word in e.response.tolist())]) + places, [memory])
        words, target = softmax(self.linear("output", hidden)), [*e.response.tolist(), EOS]
        nll = torch.stack([-row[word].log() for row, word in zip(words, target, strict=True)])
        return nll, softmax(logits), memory, words

    def forward(self, examples: Sequence[Example], texts: TextTable) -> dict[str, Tensor]:
        """Losses of a batch, "loss" the whole, without label smoothing, and "nll", "emotions" and "memory" of all of it."""
        found = self.found = [self.dialogue(e, texts) for e in examples]
        nll, emotions = torch.cat([row[0] for row in found]), torch.stack([row[1] for row in found])
        losses = {
            "generation": nll.mean(),
            "emotion": -sum(emotions[b, e.emotion].log() for b, e in enumerate(examples)) / len(examples),
        }
        scale = {"one": 1.0, "batch": 1 / len(nll), "dialogue": len(examples) / len(nll)}[self.c.emotion_scale]
        losses["loss"] = losses["generation"] + scale * losses["emotion"]
        return losses | {"nll": nll, "emotions": emotions, "memory": torch.cat([row[2] for row in found])}
