"""What Triton kernels of all families share around a launch: the device that it goes to, and the seed that it draws by."""
# Triton reads annotations as they stand, so this file has no `from __future__ import annotations`.

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl


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
