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
    sizes.cumsum(out=offsets[1:])
    return offsets


def spans(starts: np.ndarray | int, offsets: np.ndarray) -> np.ndarray:
    """starts[i], starts[i] + 1, ... for each row i of these offsets, end to end."""
    return (starts - offsets[:-1]).repeat(offsets[1:] - offsets[:-1]) + np.arange(offsets[-1])


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
        places, offsets = places_of(self.offsets, rows)
        return Ragged(self.values.take(places), offsets)


def places_of(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the values of these rows lie in arrays of these offsets, and the offsets of the rows themselves."""
    starts = offsets.take(rows)
    taken = offsets_of(offsets.take(rows + 1) - starts)
    return spans(starts, taken), taken


class Beside:
    """Row i of several ragged arrays beside each other, as row i of one.

    Args:
        sizes: of each array, (n,) or 1 for an array of one value a row.

    Attributes:
        offsets, sizes: (n + 1,) and (n,) of the joined rows.
    """

    def __init__(self, *sizes: np.ndarray | int):
        self.sizes: np.ndarray = sum(sizes)
        self.offsets = offsets_of(self.sizes)
        self._places = []
        start = self.offsets[:-1]
        for size in sizes:
            self._places.append(start if isinstance(size, int) else spans(start, offsets_of(size)))
            start = start + size

    def __call__(self, *values: np.ndarray | float, dtype: type = np.int64) -> np.ndarray:
        """The joined rows of these arrays' values, or of one value for every place of an array."""
        joined = np.empty(self.offsets[-1], dtype=dtype)
        for place, value in zip(self._places, values, strict=True):
            joined[place] = value
        return joined
