"""Rows of different lengths, end to end, and the index arithmetic that takes and joins many of them at once.

A batch is made of a dozen fields of 16 examples and some 400 texts: one Python object a row would cost five times the copying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def offsets_of(sizes: np.ndarray) -> np.ndarray:
    """(n + 1,) int64: 0, and where each of n rows of these sizes ends."""
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def spans(starts: np.ndarray | int, sizes: np.ndarray) -> np.ndarray:
    """starts[i], starts[i] + 1, ...: sizes[i] numbers for each row i, end to end."""
    ends = np.cumsum(sizes)
    return np.repeat(starts - ends + sizes, sizes) + np.arange(ends[-1] if len(ends) else 0)


@dataclass(frozen=True)
class Ragged:
    """``values[offsets[i]:offsets[i + 1]]`` is row i."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> Ragged:
        offsets = offsets_of(np.array([len(row) for row in rows], dtype=np.int64))
        return cls(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        return self.offsets[1:] - self.offsets[:-1]

    def row(self, index: int) -> np.ndarray:
        """A view."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: np.ndarray) -> Ragged:
        """These rows, copied, in this order."""
        starts = self.offsets.take(rows)
        sizes = self.offsets.take(rows + 1) - starts
        return Ragged(self.values.take(spans(starts, sizes)), offsets_of(sizes))


class Beside:
    """Row i of several ragged arrays beside each other, as row i of one.

    Args:
        sizes: of each array, (n,) or one number for all its rows.

    Attributes:
        offsets: (n + 1,) of the joined rows.
    """

    def __init__(self, *sizes: np.ndarray | int):
        self.offsets = offsets_of(sum(sizes))
        self._places = []
        start = self.offsets[:-1]
        for size in sizes:
            self._places.append(start if isinstance(size, int) and size == 1 else spans(start, size))
            start = start + size

    @property
    def sizes(self) -> np.ndarray:
        return self.offsets[1:] - self.offsets[:-1]

    def __call__(self, *values: np.ndarray | float, dtype: type = np.int64) -> np.ndarray:
        """The joined rows of these arrays' values, or of one value for each place of an array."""
        joined = np.empty(self.offsets[-1], dtype=dtype)
        for place, value in zip(self._places, values, strict=True):
            joined[place] = value
        return joined
