"""How well a model predicts the replies and emotions that people gave: the one pass behind validation and evaluation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from case_fast.batch import Batch
from case_fast.models.base import DialogueModel, Output, evaluating


@dataclass(frozen=True)
class References:
    """What the pass found about n replies.

    Attributes:
        nll: -log P of the target words of each reply, EOS included.
        emotion: (n, emotions) log-probabilities, None where the model predicts no emotion; label: (n,), -1 where unknown.
        losses: mean of each loss over the replies, "loss" the whole; of a word for "generation". Empty where not asked for.
    """

    nll: list[np.ndarray]
    emotion: np.ndarray | None
    label: np.ndarray
    losses: dict[str, float]

    @property
    def words(self) -> int:
        """Target words, EOS included."""
        return sum(map(len, self.nll))

    @property
    def mean_nll(self) -> float:
        return math.fsum(math.fsum(row) for row in self.nll) / self.words

    @property
    def mean_nll_of_replies(self) -> float:
        """Mean over replies of the mean of each; the mean over words weighs long replies more."""
        return math.fsum(math.fsum(row) / len(row) for row in self.nll) / len(self.nll)

    @property
    def accuracy(self) -> float | None:
        """Share of right first guesses among replies with a label; None where there is none, or no guess."""
        known = self.label >= 0
        if self.emotion is None or not known.any():
            return None
        return float((self.emotion.argmax(1) == self.label)[known].mean())


def read_references(model: DialogueModel, batches: Iterable[Batch], forward: Callable[[Batch], Output] | None = None
                    ) -> References:
    """Teacher forcing over batches that hold the replies, on the model's device.

    Args:
        forward: gives the model's `Output` of a batch, with all losses. None: they are not wanted, and what only they need, most
            of a forward pass, is left out.
    """
    nll: list[np.ndarray] = []
    emotion: list[np.ndarray] = []
    label: list[np.ndarray] = []
    sums: dict[str, float] = defaultdict(float)
    with evaluating(model):
        for batch in batches:
            if forward is not None:
                output = forward(batch)
                values, logits = output.nll, output.emotion_logits
                for name, value in (("loss", output.loss), *output.losses.items()):
                    sums[name] += value.item() * batch.size
            else:
                reading = model.read(batch)
                values = model.reply_nll(batch.decoder_input, batch.cu_target, reading, batch.target)
                logits = reading.emotion_logits
            nll += np.split(values.double().cpu().numpy(), batch.cu_target[1:-1].cpu().numpy())
            label.append(batch.emotion.cpu().numpy())
            if logits is not None:
                emotion.append(logits.double().cpu().numpy())
    losses = {name: total / len(nll) for name, total in sums.items()}
    labels = np.concatenate([np.zeros(0, np.int64), *label])  # there is no batch where validation was stopped at once
    references = References(nll, np.concatenate(emotion) if emotion else None, labels, losses)
    if losses:
        losses["generation"] = references.mean_nll
    return references
