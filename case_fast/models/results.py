"""What a model gives: what it understood of a batch, its losses, its reasons, and what can be looked at inside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from case_fast.models.layers import Memory


@dataclass(kw_only=True)
class Output:
    """What a forward pass gives.

    Attributes:
        loss: the scalar to minimise. losses: its parts by name, before their weights.
        hidden: (M, d) what the model's ``output`` makes next-word scores of; nll, prediction (M,): -log P of the target, argmax.
        emotion_logits: (B, emotions) log-probabilities; None where the model predicts no emotion.
        diagnostics: numbers worth a line in the log.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    hidden: Tensor | None = None
    nll: Tensor | None = None
    prediction: Tensor | None = None
    emotion_logits: Tensor | None = None
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class Reading:
    """What a model understood of a batch of contexts, before a reply is known: all that decoding needs.

    Attributes:
        memories: what the decoder attends to, in order.
        emotion_logits: (B, emotions) log-probabilities, or None.
        start: (B, d) takes the place of the scaled word BOS, or None.
        gates: (B, n) weights of a model's own decoders, or None.
        added: (B, d) what each decoder layer adds to all rows of a dialogue after its sources, or None.
        watched: gets what the last decoder layer reads its sources with, (M, d), where a loss is about its attention; or None.
    """

    memories: list[Memory]
    emotion_logits: Tensor | None = None
    start: Tensor | None = None
    gates: Tensor | None = None
    added: Tensor | None = None
    watched: list[Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.memories[0].rows.device

    @property
    def size(self) -> int:
        """B."""
        return self.memories[0].cu.numel() - 1

    def repeat(self, dialogue: int, count: int) -> Reading:
        """One dialogue of it, ``count`` times: for the hypotheses of an uncached search."""

        def row(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[dialogue].expand(count, *x.shape[1:])

        memories = [memory.repeat(dialogue, count) for memory in self.memories]
        return Reading(memories=memories, emotion_logits=row(self.emotion_logits), start=row(self.start), gates=row(self.gates),
                       added=row(self.added))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which of its knowledge a dialogue reads: ``prior`` and ``posterior`` (n,), probabilities before and after the reply is
    known, the latter None where it is not asked for or there is none; ``dialogue`` (n,) the dialogue that each row belongs to."""

    prior: Tensor
    dialogue: Tensor
    posterior: Tensor | None = None


@dataclass(kw_only=True)
class Why:
    """What a model can say of its reasons; None or empty where it has no such thing.

    Attributes:
        emotion: (B, emotions) probabilities.
        choices: "inferences", over the batch's ``case.knowledge``; "concepts", over the vertices of G_EC: [CLS], words, concepts.
        gate: (B,) share of the first of the two sides that `DialogueModel.balance` names.
    """

    emotion: Tensor | None = None
    choices: dict[str, Choice] = field(default_factory=dict)
    gate: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """What an alignment loss compares: ``scores`` (P, Q) of all pairs of P rows of x and Q of y; ``positive`` (P,) the row of y
    that belongs to each row of x. Rows of x with one positive are no negatives of each other."""

    scores: Tensor
    positive: Tensor


@dataclass(kw_only=True)
class Inside:
    """What can be looked at inside a model that has read a batch, by name; empty or None where it has no such thing.

    Attributes:
        vectors: (n, d) each, what has to be told apart by who reads it.
        choices: distributions over the knowledge of each dialogue.
        alignments: what its alignment losses compare, switched on or not.
        gate: (B,) in [0, 1].
    """

    vectors: dict[str, Tensor] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    alignments: dict[str, Alignment] = field(default_factory=dict)
    gate: Tensor | None = None
