"""The flag that kernels on a GPU set when the contents of `indptr`, `indices`, `relation`, `positive`, `target`, `cu_target`
or `segment`, or of the offsets of packed sequences and what belongs to them, were out of range.

A kernel never follows such an index: it skips the read, makes the row NaN (`segment_sum` leaves it out) and sets the flag. The
flag lies in pinned host memory, which the GPU can write and the host can read without waiting for it; like CUDA's own errors, it
is seen at the next call or at `torch.cuda.synchronize()` followed by `raise_pending()`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BAD_INDPTR, BAD_INDICES, BAD_RELATION = 1, 2, 3  # below 64: enum case_fast_status of csrc/common/types.h
BAD_CU_QUERY, BAD_CU_KEY, BAD_KEY_OF, BAD_KEY_LENGTH = 7, 8, 9, 10
BAD_TARGET, BAD_CU_TARGET, BAD_SEGMENT, BAD_CU, BAD_POSITIVE = 11, 12, 13, 14, 64
_SAID = {
    BAD_INDPTR: "graph_attention: indptr must start with 0, never fall, and end with the number of indices",
    BAD_INDICES: "graph_attention: indices holds a vertex outside [0, vertices)",
    BAD_RELATION: "graph_attention: relation holds a value outside [0, relations)",
    BAD_CU_QUERY: "packed_attention's cu_query or cross_attention's cu_hidden must rise from 0 to the number of rows",
    BAD_CU_KEY: "packed_attention's cu_key or a cross_attention source's cu_keys must rise from 0 to the number of rows",
    BAD_KEY_OF: "packed_attention's or a cross_attention source's key_of names a sequence of keys outside [0, sequences)",
    BAD_KEY_LENGTH: "packed_attention's key_length holds a number outside [0, rows of that sequence of keys]",
    BAD_TARGET: "linear_cross_entropy: target holds a word outside [0, V)",
    BAD_CU_TARGET: "linear_cross_entropy: cu_target must start with 0, never fall, and end with the number of targets",
    BAD_SEGMENT: "segment_sum: segment names a segment, or take's index a row, that does not exist",
    BAD_CU: "pooled_attention: cu must rise from 0 to the number of rows",
    BAD_POSITIVE: "bilinear_mim: positive names a row outside [0, rows of y)",
}


@functools.cache
def device_flag() -> Tensor:
    """(1,) int32 on the host, 0 while all is well; pinned where a GPU is there, so that kernels may write it."""
    return torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=torch.cuda.is_available())


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
        raise IndexError(f"{_SAID[found]} (found on the GPU during an earlier call; validate=True checks before each)")
