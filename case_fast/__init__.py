"""CASE (empathetic dialogue with aligned cognition and affection), fast.

Names are loaded on first use, so that `import case_fast.ops` needs nothing but torch and numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:  # the same names for type checkers; a test holds the two lists equal
    from case_fast import ops  # noqa: F401
    from case_fast.batch import Batch  # noqa: F401
    from case_fast.data import Store, open_store  # noqa: F401
    from case_fast.errors import CaseFastError  # noqa: F401
    from case_fast.models import CASE, CASEConfig, CASEOutput  # noqa: F401
    from case_fast.serving import Reply, load  # noqa: F401

_HOME = {
    "CASE": "models",
    "CASEConfig": "models",
    "CASEOutput": "models",
    "open_store": "data",
    "Store": "data",
    "Batch": "batch",
    "load": "serving",
    "Reply": "serving",
    "CaseFastError": "errors",
}
__all__ = ["ops", *_HOME]


def __getattr__(name: str):
    if name == "ops":
        return importlib.import_module("case_fast.ops")
    if name not in _HOME:
        raise AttributeError(f"module 'case_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"case_fast.{_HOME[name]}"), name)
    globals()[name] = value  # so that this function is asked once a name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
