"""What Triton kernels of all families share: the device that a launch goes to, the seed that it draws by, dropout by counter."""
# Triton reads annotations as they stand, so this file has no `from __future__ import annotations`.

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor


def on_device(function: Callable) -> Callable:
    """``function`` with the device of its first argument, a tensor, as the current one, which is where Triton launches."""

    @functools.wraps(function)
    def guarded(first, *rest, **named):
        if first.is_cpu:  # in Triton's interpreter
            return function(first, *rest, **named)
        with torch.get_device_module(first.device).device(first.device):
            return function(first, *rest, **named)

    return guarded


@triton.jit
def drawing_seed(seed, seed_at):
    """uint64: (seed XOR *seed_at) mod 2^63, where seed_at is not None; read when the kernel runs, not when it is launched."""
    key = seed.to(tl.uint64)
    if seed_at is not None:
        key = (key ^ tl.load(seed_at).to(tl.uint64)) & 0x7FFF_FFFF_FFFF_FFFF
    return key


@triton.jit
def dropped(weight, number, head, key, drop_below, kept_scale):
    """``weight`` after dropout, by its number (int64) and head; the same as `reference.dropout_keep` drops."""
    low = number.to(tl.uint32)
    zero = low * 0
    word, _, _, _ = tl.philox_impl(low, (number >> 32).to(tl.uint32), (zero + head).to(tl.uint32), zero,
                                   key.to(tl.uint32), (key >> 32).to(tl.uint32))
    return tl.where(word.to(tl.int64) >= drop_below, weight * tl.full((), kept_scale, weight.dtype), 0.0)


def dropout_arguments(dropout_p: float, seed: int, seed_at: Tensor | None) -> dict:
    """Those of a kernel that calls `drawing_seed` and `dropped`."""
    return {
        "seed": seed,
        "seed_at": seed_at if dropout_p > 0 else None,
        "drop_below": int(dropout_p * 2**32),  # 2^32 for p = 1, which no 32-bit word reaches
        "kept_scale": 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
        "DROPOUT": dropout_p > 0,
    }
