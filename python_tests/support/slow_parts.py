"""Layers of the models once more, slowly, in float64: nothing is shared with the package but the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from helpers import same
from torch import Tensor

from case_fast.models import DialogueModel


def softmax(scores: Tensor) -> Tensor:
    terms = (scores - scores.max(-1, keepdim=True).values.detach()).exp()
    return terms / terms.sum(-1, keepdim=True)


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + (-z).exp())


class SlowParts:
    """The weights of ``model`` as float64 leaves in ``weights``, and the layers that they make, for one sequence at a time."""

    def __init__(self, model: DialogueModel):
        self.c = model.config
        self.weights = {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}
        self.counts = model.word_counts.tolist() if hasattr(model, "word_counts") else []

    def same_gradients(self, model: DialogueModel, loss: Tensor, expected: Tensor) -> None:
        """The gradients of both losses by every parameter are equal to 1e-9; one that is not reached counts as zeros."""
        ours = [model.get_parameter(name) for name in self.weights]
        mine = torch.autograd.grad(loss, ours, allow_unused=True)
        theirs = torch.autograd.grad(expected, [*self.weights.values()], allow_unused=True)
        for parameter, a, b in zip(ours, mine, theirs, strict=True):
            a, b = (torch.zeros_like(parameter) if x is None else x for x in (a, b))
            same(a, b, 1e-9)

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def embed(self, ids: Sequence[int], positions: Sequence[int] | None = None) -> Tensor:
        """word * sqrt(d) + sinusoidal position, one row a word."""
        d = self.c.d_model
        half = (d + 1) // 2
        rows = []
        for place, word in zip(positions if positions is not None else range(len(ids)), ids, strict=True):
            angles = [place / 10_000 ** (i / max(half - 1, 1)) for i in range(half)]
            large = getattr(self.c, "special_scale", 1.0) if place == 0 else 1.0
            wave = [large * wave(angle) for wave in (math.sin, math.cos) for angle in angles]
            rows.append(self.word(word) + torch.tensor(wave[:d], dtype=torch.float64))
        return torch.stack(rows) if rows else torch.zeros(0, d, dtype=torch.float64)

    def word(self, word: int) -> Tensor:
        return self.weights["embedding.weight"][word] * math.sqrt(self.c.d_model)

    def attention(self, name: str, rows: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        if len(memory) == 0:
            return torch.zeros_like(rows)
        q, k, v = (
            self.linear(f"{name}.{part}", x) for part, x in (("query", rows), ("key", memory), ("value", memory))
        )
        size = q.shape[1] // self.c.heads
        heads = []
        for h in range(self.c.heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size)
            if causal:
                later = torch.arange(len(memory))[None, :] > torch.arange(len(rows))[:, None]
                scores = torch.where(later, torch.full_like(scores, -1e300), scores)
            heads.append(softmax(scores) @ v[:, part])
        return self.linear(f"{name}.output", torch.cat(heads, 1))

    def feed_forward(self, name: str, x: Tensor, gelu: bool = False) -> Tensor:
        inner = self.linear(f"{name}.0", x)
        active = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))) if gelu else inner.clamp(min=0)
        return self.linear(f"{name}.2", active)

    def encoder(self, name: str, x: Tensor) -> Tensor:
        """Pre-LN layers and a final norm."""
        if len(x) == 0:
            return x
        for place in range(self.c.layers):
            layer = f"{name}.layers.{place}"
            normed = self.norm(f"{layer}.attention_norm", x)
            x = x + self.attention(f"{layer}.attention", normed, normed)
            x = x + self.feed_forward(f"{layer}.ffn", self.norm(f"{layer}.ffn_norm", x))
        return self.norm(f"{name}.norm", x)

    def decoder(self, x: Tensor, sources: Sequence[Tensor]) -> Tensor:
        for place in range(self.c.layers):
            x = self.decoder_layer(f"decoder.layers.{place}", x, sources)
        return self.norm("decoder.norm", x)

    def decoder_layer(self, name: str, x: Tensor, sources: Sequence[Tensor]) -> Tensor:
        normed = self.norm(f"{name}.self_norm", x)
        x = x + self.attention(f"{name}.self_attention", normed, normed, causal=True)
        for s, source in enumerate(sources):
            x = x + self.attention(f"{name}.cross_attention.{s}", self.norm(f"{name}.cross_norm.{s}", x), source)
        return x + self.feed_forward(f"{name}.ffn", self.norm(f"{name}.ffn_norm", x))

    def word_weights(self) -> list[float]:
        """w_i = 1 - RF_i / max RF, of mean 1; all 1 while nothing has been said."""
        total, most = sum(self.counts), max(self.counts)
        if not total:
            return [1.0] * len(self.counts)
        raw = [1 - (count / total) / (most / total) for count in self.counts]
        return [value * len(raw) / sum(raw) for value in raw]
