"""How well a model predicts the replies and emotions that people gave: the one pass behind validation and evaluation."""

from __future__ import annotations

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from case_fast.batch import Batch
from case_fast.models.base import DialogueModel, Output, evaluating


@dataclass(frozen=True)
class References:
    """What the pass found about n replies.

    Attributes:
        nll: -log P of the target words of each reply, EOS included.
        emotion: (n, emotions) log-probabilities, None where the model predicts no emotion; label: (n,), -1 where unknown.
        sums: of each loss, "loss" the whole, its mean over each batch times the batch's replies. Empty where not asked for.
    """

    nll: list[np.ndarray]
    emotion: np.ndarray | None
    label: np.ndarray
    sums: dict[str, list[float]]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """What several passes over batches found, as one pass over all of them would have."""
        parts = [part for part in parts if part.nll] or list(parts[:1])
        emotion = None if parts[0].emotion is None else np.concatenate([part.emotion for part in parts])
        sums = {name: [total for part in parts for total in part.sums[name]] for name in parts[0].sums}
        return cls([row for part in parts for row in part.nll], emotion, np.concatenate([part.label for part in parts]), sums)

    @property
    def losses(self) -> dict[str, float]:
        """Mean of each loss over the replies; of a word for "generation"."""
        found = {name: functools.reduce(operator.add, totals, 0.0) / len(self.nll) for name, totals in self.sums.items()}
        return found | ({"generation": self.mean_nll} if found else {})

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
    sums: dict[str, list[float]] = defaultdict(list)
    with evaluating(model):
        for batch in batches:
            if forward is not None:
                output = forward(batch)
                values, logits = output.nll, output.emotion_logits
                for name, value in (("loss", output.loss), *output.losses.items()):
                    sums[name].append(value.item() * batch.size)
            else:
                reading = model.read(batch)
                values = model.reply_nll(batch.decoder_input, batch.cu_target, reading, batch.target)
                logits = reading.emotion_logits
            nll += np.split(values.double().cpu().numpy(), batch.cu_target[1:-1].cpu().numpy())
            label.append(batch.emotion.cpu().numpy())
            if logits is not None:
                emotion.append(logits.double().cpu().numpy())
    labels = np.concatenate([np.zeros(0, np.int64), *label])  # there is no batch where validation was stopped at once
    return References(nll, np.concatenate(emotion) if emotion else None, labels, dict(sums))
