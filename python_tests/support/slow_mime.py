"""MIME once more, slowly: one dialogue at a time, in float64, from the definitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from slow_parts import SlowParts, sigmoid, softmax
from torch import Tensor

from case_fast.data.empathetic_dialogues import EMOTIONS
from case_fast.data.featurizer import Example
from case_fast.data.vocabulary import BOS, CLS, EOS, SPEAKER

POSITIVE = ("caring", "confident", "content", "excited", "faithful", "grateful", "hopeful", "impressed", "joyful", "prepared",
            "proud", "surprised", "trusting")


class SlowMIME(SlowParts):
    def gaussian(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(f"{name}.mean", x), self.linear(f"{name}.log_variance", x).clamp(-10, 10)

    def dialogue(self, e: Example, noise: Sequence[Tensor] | None, training: bool) -> dict[str, Tensor]:
        """``noise``: r of each group, or None where z is its mean."""
        table, c = self.weights["w_emo"], self.c
        roles = torch.stack([self.word(r) for r in [SPEAKER, *e.context_role.tolist()]])
        context = self.encoder("encoder", self.embed([CLS, *e.context.tolist()]) + roles)
        emotion = softmax(table @ self.linear("emotion_query", context[0]))
        label = e.emotion if training else int(emotion.argmax())
        groups = [[i for i, name in enumerate(EMOTIONS) if (name in POSITIVE) == wanted] for wanted in (True, False)]
        groups = groups if c.grouping else [list(range(32))]
        hidden = self.linear("prior_hidden", context[0]).clamp(min=0)
        priors, blends = [], []
        for g, group in enumerate(groups):
            mean, log_variance = self.gaussian(f"prior.{g}", hidden)
            z = mean if noise is None else mean + (log_variance / 2).exp() * noise[g]
            priors.append((mean, log_variance))
            share = softmax(self.linear(f"choice.{g}", z))
            blends.append(sum(p * table[label] for p, label in zip(share, group, strict=True)))
        first = 0 if EMOTIONS[label] in POSITIVE or not c.mimicry or not c.grouping else 1  # whose group M has
        carried = [blends[0]] * 2 if len(groups) == 1 else [blends[first], blends[1 - first]]
        refined = [
            self.encoder(f"refiner.{i}", torch.stack([self.linear(f"fusion.{i}", torch.cat([row, blend])) for row in context]))
            for i, blend in enumerate(carried)
        ]
        joined = torch.cat(refined, 1)
        memory = self.linear("merge", sigmoid(self.linear("gate", joined)) * joined)
        kl = torch.zeros((), dtype=torch.float64)
        for g, (mean, log_variance) in enumerate(priors):
            rows = refined[0 if g == first or len(groups) == 1 else 1]
            u = self.linear(f"posterior_hidden.{g}", torch.cat([context[0], sum(rows) / len(rows)])).clamp(min=0)
            q_mean, q_log = self.gaussian(f"posterior.{g}", u)
            q, p = (torch.distributions.Normal(m, (v / 2).exp()) for m, v in ((q_mean, q_log), (mean, log_variance)))
            kl = kl + torch.distributions.kl_divergence(q, p).sum()
        hidden = self.decoder(self.embed([BOS, *e.response.tolist()]), [memory])
        scores, target = self.linear("output", hidden), [*e.response.tolist(), EOS]
        nll = torch.stack([-softmax(row)[word].log() for row, word in zip(scores, target, strict=True)])
        return {"nll": nll, "emotion": -emotion[e.emotion].log(), "kl": kl}

    def forward(self, examples: Sequence[Example], noise: Sequence[Tensor] | None, training: bool) -> dict[str, Tensor]:
        """Losses of a batch, "loss" the whole, without label smoothing; ``noise``: (B, d) of each group."""
        own = [None if noise is None else [rows[b] for rows in noise] for b in range(len(examples))]
        found = [self.dialogue(e, r, training) for e, r in zip(examples, own, strict=True)]
        nll, count = torch.cat([row["nll"] for row in found]), len(examples)
        losses = {"generation": nll.mean(), "emotion": sum(row["emotion"] for row in found) / count}
        scale = {"one": 1.0, "batch": 1 / len(nll), "dialogue": count / len(nll)}[self.c.emotion_scale]
        losses["loss"] = losses["generation"] + scale * losses["emotion"]
        if training:
            losses["kl"] = sum(row["kl"] for row in found) / count
            losses["loss"] = losses["loss"] + self.c.gamma_kl * count / len(nll) * losses["kl"]
        return losses | {"nll": nll}
