"""The flag that kernels on a GPU set when the contents of `indptr`, `indices` or `relation` were out of range.

A kernel never follows such an index: it skips the read, makes the row NaN and sets the flag. The flag lies in pinned host
memory, which the GPU can write and the host can read without waiting for it; like CUDA's own errors, it is seen at the next
call or at `torch.cuda.synchronize()` followed by `raise_pending()`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BAD_INDPTR, BAD_INDICES, BAD_RELATION = 1, 2, 3  # enum case_fast_status of csrc/graph_attention/graph_attention.h
_SAID = {
    BAD_INDPTR: (IndexError, "indptr must start with 0, never fall, and end with the number of indices"),
    BAD_INDICES: (IndexError, "indices holds a vertex outside [0, vertices)"),
    BAD_RELATION: (IndexError, "relation holds a value outside [0, relations)"),
}


@functools.cache
def device_flag() -> Tensor:
    """(1,) int32 on the host, 0 while all is well; pinned where a GPU is there, so that kernels may write it."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=torch.cuda.is_available())


@functools.cache
def _words() -> memoryview:
    return memoryview(device_flag().numpy())  # read without a torch call: this stands before every launch


def raise_pending() -> None:
    """Raises what an earlier kernel found, and clears it; costs one read of host memory.

    Raises:
        IndexError: naming the argument.
    """
    found = _words()[0]
    if found:
        device_flag().zero_()
        error, said = _SAID[found]
        raise error(f"graph_attention: {said} (found on the GPU during an earlier call; validate=True checks before each)")
