"""The order of the training examples: a pure function of (seed, epoch, position).

So a resumed run needs no iterator's state, and the order does not depend on how many processes share the work.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from case_fast.errors import ConfigError


@lru_cache(maxsize=2)  # two epochs: the next batch may lie in the next one
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """(examples,) a random permutation: examples sorted by one word each of Philox(key = seed, counter = epoch << 128).

    The words of a bit generator are fixed for good by numpy; the methods of its Generator are not.
    """
    words = np.random.Philox(key=seed, counter=epoch << 128).random_raw(examples)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False  # it is shared by all who ask
    return order


def step_seed(seed: int, step: int) -> int:
    """The seed of all that is drawn in a step by counter (`Batch.seed`): 63 bits of Philox, on counters that no epoch uses."""
    return int(np.random.Philox(key=seed, counter=1 << 255 | step << 128).random_raw()) >> 1


class Sampler:
    """Batches of training examples; every epoch holds each example once, its last batch may be short."""

    def __init__(self, examples: int, batch_size: int, seed: int):
        if examples < 1:
            raise ConfigError("the training split holds no examples")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.steps_per_epoch = math.ceil(examples / batch_size)

    def indices(self, step: int) -> list[int]:
        """The examples of step 0, 1, ..., counted across epochs and phases."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.batch_size
        return epoch_order(self.seed, epoch, self.examples)[start : start + self.batch_size].tolist()
