"""What the checks of all kernel families share: bits, strides, counted calls, buffers full of NaN, and threads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from case_fast.ops import backend


def strided(x: Tensor, layout: int) -> Tensor:
    """The same values in memory laid out otherwise; 0 leaves it as it is."""
    if layout == 0 or x.dim() == 1 and layout % 2 == 0:
        return x
    if x.dim() == 1:
        return torch.stack([x, torch.full_like(x, -7)], dim=1)[:, 0]
    if layout % 3 == 0:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout % 3 == 1:
        return torch.cat([torch.full_like(x, torch.nan), x], dim=-1)[..., x.shape[-1] :]
    return x.flip(0).contiguous().flip(0).transpose(0, 1).contiguous().transpose(0, 1)


def identical(a: Tensor, b: Tensor) -> bool:
    """The same bits, NaN's included."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = kinds[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def digest(found: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for x in found.values():
        sha.update(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@contextmanager
def counted(family: str) -> Iterator[Counter]:
    """How often each native function of a family is called within."""
    calls: Counter = Counter()
    originals = {name: getattr(backend.native, name) for name in dir(backend.native) if name.startswith(f"{family}_")}

    def counting(name: str) -> Callable:
        def call(*arguments: object) -> int:
            calls[name] += 1
            return originals[name](*arguments)

        return call

    try:
        for name in originals:
            setattr(backend.native, name, counting(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(backend.native, name, original)


@contextmanager
def nan_filled(kernels: ModuleType) -> Iterator[None]:
    """Every tensor that this module of ops makes for a kernel to write is full of NaN before; of integers, of -7."""
    makers = {name: getattr(kernels, name) for name in ("_outputs", "_gradients", "_best") if hasattr(kernels, name)}

    def filled(make: Callable) -> Callable:
        def made(*arguments: object) -> list | tuple:
            found = make(*arguments)
            return type(found)(x.fill_(torch.nan if x.is_floating_point() else -7) for x in found)

        return made

    try:
        for name, make in makers.items():
            setattr(kernels, name, filled(make))
        yield
    finally:
        for name, make in makers.items():
            setattr(kernels, name, make)


def prefilled(checks: str, kernels: ModuleType, size: int, device: str) -> int:
    """Row 6 for the module `checks` with its ``digests``: outputs full of NaN, and on CPU workspaces full of 0xFE bytes
    (glibc's MALLOC_PERTURB_): the same bits."""
    digests = sys.modules[checks].digests
    clean = digests(device)
    with nan_filled(kernels):
        for _ in range(size):
            assert digests(device) == clean
    if device == "cpu" and sys.platform == "linux":
        here = Path(__file__).resolve().parent
        code = f"import {checks} as c, torch; torch.set_num_threads(1); print(*c.digests('cpu'))"
        environment = os.environ | {"MALLOC_PERTURB_": "1", "MALLOC_MMAP_MAX_": "0"}
        environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1])])
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == clean, "a workspace is read before it is written"
    return (size + 1) * len(clean)


def deterministic(digests: Callable[[str], list[str]], size: int, device: str) -> int:
    """Row 11: `size` runs, each by 1, 2 and 3 threads on CPU, give one sha256 a case."""
    threads = torch.get_num_threads()
    expected = digests(device)
    runs = 0
    try:
        for _ in range(size):
            for count in (1, 2, 3) if device == "cpu" else (threads,):
                torch.set_num_threads(count)
                assert digests(device) == expected, f"{count} threads"
                runs += len(expected)
    finally:
        torch.set_num_threads(threads)
    return runs
