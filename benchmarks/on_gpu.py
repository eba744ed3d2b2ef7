"""What each family says of itself to `benchmarks.gpu`, in `<family>_gpu.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class OnGpu:
    """What of a family is run on a GPU."""

    ours: dict[str, Callable[[], AbstractContextManager]]  # the ways to run our kernels, and what switches each on
    peers: Sequence[str]
    sizes: Sequence[str]
    small: Callable[[], None]  # every kernel on small inputs: what compute-sanitizer watches


@contextmanager
def backend(name: str) -> Iterator[None]:
    """CASE_FAST_BACKEND for a while."""
    before = os.environ.get("CASE_FAST_BACKEND")
    os.environ["CASE_FAST_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("CASE_FAST_BACKEND")
        if before is not None:
            os.environ["CASE_FAST_BACKEND"] = before
