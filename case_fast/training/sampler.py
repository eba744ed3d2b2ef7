"""The order of the training examples: a pure function of (seed, epoch, position).

So a resumed run needs no iterator's state, and the order does not depend on how many processes share the work.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from case_fast.errors import ConfigError

BATCHINGS = ("shuffled", "bucketed", "balanced")
WINDOW = 64  # batches of the shuffle that are sorted by cost together


def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """(examples,) a random permutation: examples sorted by one word each of Philox(key = seed, counter = epoch << 128).

    The words of a bit generator are fixed for good by numpy; the methods of its Generator are not.
    """
    words = np.random.Philox(key=seed, counter=epoch << 128).random_raw(examples)
    return np.argsort(words, kind="stable")


def step_seed(seed: int, step: int) -> int:
    """The seed of all that is drawn in a step by counter (`Batch.seed`): 63 bits of Philox, on counters that no epoch uses."""
    return int(np.random.Philox(key=seed, counter=1 << 255 | step << 128).random_raw()) >> 1


class Sampler:
    """Batches of training examples; every epoch holds each example once.

    Args:
        batching: how the shuffle of an epoch is cut. "shuffled": as it comes. Else each `WINDOW` batches of it are sorted by cost
            and cut anew, and their batches shuffled: "bucketed": examples of about one cost together; "balanced": every batch has
            its share of cheap and of costly ones, so that all cost about the same.
        costs: (examples,) of each example (`Store.costs`); not needed for "shuffled".
    """

    def __init__(self, examples: int, batch_size: int, seed: int, batching: str = "shuffled", costs: np.ndarray | None = None):
        if examples < 1:
            raise ConfigError("the training split holds no examples")
        if batching not in BATCHINGS:
            raise ConfigError(f"batching must be one of {', '.join(BATCHINGS)}, not {batching!r}")
        if batching != "shuffled" and (costs is None or len(costs) != examples):
            raise ConfigError(f"batching {batching!r} needs the cost of each example")
        self.examples, self.batch_size, self.seed, self.batching, self.costs = examples, batch_size, seed, batching, costs
        self.steps_per_epoch = math.ceil(examples / batch_size)
        self._batches = lru_cache(maxsize=2)(self._cut)  # two epochs: the next batch may lie in the next one

    def indices(self, step: int) -> list[int]:
        """The examples of step 0, 1, ..., counted across epochs and phases."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._batches(epoch)[place].tolist()

    def _cut(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch: the last one, or those of the last window, may be short."""
        order, size = epoch_order(self.seed, epoch, self.examples), self.batch_size
        if self.batching == "shuffled":
            return [order[start : start + size] for start in range(0, self.examples, size)]
        words = np.random.Philox(key=self.seed, counter=1 << 254 | epoch << 128).random_raw(self.steps_per_epoch)
        batches: list[np.ndarray] = []
        for start in range(0, self.examples, WINDOW * size):
            window = order[start : start + WINDOW * size]
            window = window[np.argsort(self.costs[window], kind="stable")]
            count = math.ceil(len(window) / size)
            if self.batching == "bucketed":
                cut = [window[first : first + size] for first in range(0, len(window), size)]
            else:  # dealt to and fro: who got a cheaper one gets a costlier one next
                turn, place = np.divmod(np.arange(len(window)), count)
                taker = np.where(turn % 2, count - 1 - place, place)
                cut = [window[taker == batch] for batch in range(count)]
            shuffle = np.argsort(words[len(batches) : len(batches) + count], kind="stable")
            batches += [cut[batch] for batch in shuffle]
        return batches
