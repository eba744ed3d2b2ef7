"""How large each step is, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass


def noam(step: int, d_model: int, warmup: int, scale: float = 1.0) -> float:
    """Learning rate of step s = 1, 2, ... (Vaswani et al., 2017): scale * d^-0.5 * min(s^-0.5, s * warmup^-1.5)."""
    return scale * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


def cooling(step: int, steps: int | None, cooldown: int) -> float:
    """The factor on the learning rate of a phase's step (1, 2, ...): 1, and over the last ``cooldown`` of its ``steps`` falling
    linearly to 1 / cooldown, so that the weights settle (Hägele et al., 2024, "Scaling laws and compute-optimal training
    beyond fixed training durations")."""
    return min(1.0, (steps - step + 1) / cooldown) if cooldown and steps is not None else 1.0


@dataclass
class EarlyStopping:
    """Counts validations in a row that were no better than the best one.

    Attributes:
        patience: so many of them end training; min_steps: those before this step are not counted.
        best: lowest value so far, at ``best_step``; failures: validations since then that count.
    """

    patience: int
    min_steps: int
    best: float | None = None
    best_step: int = 0
    failures: int = 0

    def update(self, step: int, value: float) -> bool:
        """Take in the value of a validation at ``step``; whether it is the best so far."""
        if self.best is None or value < self.best:
            self.best, self.best_step, self.failures = value, step, 0
            return True
        self.failures += step >= self.min_steps
        return False

    @property
    def stop(self) -> bool:
        return self.failures >= self.patience

    def earliest_stop(self, step: int, every: int) -> int:
        """The first step that could end training, seen from ``step``, with a validation every ``every`` steps: that of the
        validation ceil(min_steps / every) + patience - 1 when nothing has been validated. For the paper's recipe (13 000 steps, 3
        validations, every 2 000) that is the ninth, at step 18 000: those at 14 000, 16 000 and 18 000 are the first that count.
        """
        if self.stop:
            return step
        done = step // every + (self.best is None)  # the very first validation is the best so far, whatever it finds
        first = max(done + 1, -(-self.min_steps // every))  # the next validation that can count
        return (first + self.patience - self.failures - 1) * every
