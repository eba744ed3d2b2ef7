"""What chooses among our own kernels, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from case_fast.ops.backend import asking as backend


def native_or_triton() -> str:
    """The backend of CUDA C++; on a machine with a GPU where that was not built, Triton, which needs no build."""
    from case_fast.ops import native_report

    return "native" if native_report().get("cuda") or not torch.cuda.is_available() else "triton"


@contextmanager
def setting(module: str, **values: Any) -> Iterator[None]:
    """Names of a module of `case_fast.ops` for a while."""
    found = import_module(f"case_fast.ops.{module}")
    before = {name: getattr(found, name) for name in values}
    vars(found).update(values)
    try:
        yield
    finally:
        vars(found).update(before)


@contextmanager
def tiles(module: str, rows: int, columns: int) -> Iterator[None]:
    """This tile of scores alone for a family's Triton kernels, of every dtype."""
    usual = import_module(f"case_fast.ops.{module}").TILES
    with backend("triton"), setting(module, TILES=dict.fromkeys(usual, ((rows, columns),))):
        yield
