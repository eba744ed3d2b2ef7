"""KEMP once more, slowly: one dialogue at a time, in float64, from the definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from slow_parts import SlowParts, softmax
from torch import Tensor

from case_fast.data.featurizer import Example
from case_fast.data.vocabulary import CLS, EOS, SPEAKER


class SlowKEMP(SlowParts):
    def vertices(self, e: Example) -> Tensor:
        """[CLS], the words and the concepts, as the graph leaves them."""
        roles = [self.word(r) for r in [SPEAKER, *e.context_role.tolist()]]
        words, concepts = [CLS, *e.context.tolist()], e.concept.tolist()
        x = self.embed(words + concepts, [*range(len(words)), *e.concept_position.tolist()])
        x = x + torch.stack(roles + [self.weights["concept_state"]] * len(concepts))
        q, k, v = (self.linear(f"graph.attention.{part}", x) for part in ("query", "key", "value"))
        size, rows, graph = self.c.d_model // self.c.heads, [], e.concept_graph
        for i in range(len(words)):
            near = graph.indices[graph.indptr[i] : graph.indptr[i + 1]].tolist()
            heads = []
            for h in range(self.c.heads):
                part = slice(h * size, (h + 1) * size)
                heads.append(softmax(k[near, part] @ q[i, part] / math.sqrt(size)) @ v[near, part])
            rows.append(self.norm("graph.norm", x[i] + self.linear("graph.attention.output", torch.cat(heads))))
        return torch.stack(rows + [x[i] for i in range(len(words), len(x))])

    def dialogue(self, e: Example) -> dict[str, Tensor]:
        c = self.c
        intensity = [0.0, *e.context_intensity.tolist()]
        if c.concepts:
            rows, intensity = self.vertices(e), intensity + e.concept_intensity.tolist()
        else:
            roles = torch.stack([self.word(r) for r in [SPEAKER, *e.context_role.tolist()]])
            rows = self.embed([CLS, *e.context.tolist()]) + roles
        memory = self.encoder("encoder", rows)
        share = softmax(torch.tensor(intensity, dtype=torch.float64))
        signal = sum(w * row for w, row in zip(share, memory, strict=True))
        logits = self.weights["w_emo"] @ signal
        emotion = softmax(logits)
        places = self.embed([0] * (1 + len(e.response))) - self.word(0)
        first = self.linear("first_word", logits)
        x = torch.stack([first, *(self.word(word) for word in e.response.tolist())]) + places
        alpha = None
        for place in range(c.layers):
            layer = f"decoder.layers.{place}"
            normed = self.norm(f"{layer}.self_norm", x)
            x = x + self.attention(f"{layer}.self_attention", normed, normed, causal=True)
            normed = self.norm(f"{layer}.cross_norm.0", x)
            alpha = self.weights_of(f"{layer}.cross_attention.0", normed, memory)
            read = self.attention(f"{layer}.cross_attention.0", normed, memory)
            x = x + (self.linear(f"{layer}.mix", torch.cat([read, signal.expand(len(read), -1)], 1)) if c.emotion_dependency
                     else read)
            x = x + self.feed_forward(f"{layer}.ffn", self.norm(f"{layer}.ffn_norm", x))
        scores, target = self.linear("output", self.norm("decoder.norm", x)), [*e.response.tolist(), EOS]
        nll = torch.stack([-softmax(row)[word].log() for row, word in zip(scores, target, strict=True)])
        return {"nll": nll, "emotion": -emotion[e.emotion].log(), "attention": ((alpha - share) ** 2).mean()}

    def weights_of(self, name: str, rows: Tensor, memory: Tensor) -> Tensor:
        """How much each row of the memory is attended to, over heads and rows."""
        q, k = self.linear(f"{name}.query", rows), self.linear(f"{name}.key", memory)
        size = q.shape[1] // self.c.heads
        parts = [slice(h * size, (h + 1) * size) for h in range(self.c.heads)]
        return torch.cat([softmax(q[:, part] @ k[:, part].T / math.sqrt(size)) for part in parts]).mean(0)

    def forward(self, examples: Sequence[Example], training: bool) -> dict[str, Tensor]:
        """Losses of a batch, "loss" the whole, without label smoothing."""
        found = [self.dialogue(e) for e in examples]
        nll, count = torch.cat([row["nll"] for row in found]), len(examples)
        losses = {"generation": nll.mean(), "emotion": sum(row["emotion"] for row in found) / count}
        scales = {"one": 1.0, "batch": 1 / len(nll), "dialogue": count / len(nll)}
        losses["loss"] = losses["generation"] + scales[self.c.emotion_scale] * losses["emotion"]
        if training and self.c.emotion_dependency:
            losses["attention"] = sum(row["attention"] for row in found) / count
            losses["loss"] = losses["loss"] + self.c.gamma_attention * scales[self.c.attention_scale] * losses["attention"]
        return losses | {"nll": nll}
