"""Which backend runs the ops, and why.

    reference   case_fast.equations: plain torch on any device
    native      case_fast._native: C++ and CUDA
    triton      Triton kernels

CASE_FAST_BACKEND=native|triton|reference overrides the choice. This version has the reference alone.
"""

from __future__ import annotations

import functools
import logging
import os

from case_fast import __version__
from case_fast.errors import ConfigError

BACKENDS = ("native", "triton", "reference")
_log = logging.getLogger("case_fast")

try:
    import case_fast._native as _native  # not `from case_fast import`, which hides why it failed

    _native_missing = ""
    if _native.__version__ != __version__:
        _native_missing = f"it is version {_native.__version__}, the package is {__version__}; install case_fast again"
except ModuleNotFoundError:
    _native_missing = "it is not built for this Python; pip install -e . builds it"
except ImportError as error:
    _native_missing = f"it cannot be loaded ({error}); install case_fast again"


def native_report() -> dict:
    """The native module's state: ``available``, ``reason`` (why not, else empty) and, where available, its own report:
    ``version``, ``simd``, ``cuda``, ``cuda_architectures``, ``cuda_runtime``, ``cuda_devices``, ``cuda_status``.

    With CUDA compiled in, counting devices starts the CUDA driver in this process: do not call it before a fork.
    """
    if _native_missing:
        return {"available": False, "reason": _native_missing}
    return {"available": True, "reason": "", **_native.report()}


def backend_name() -> str:
    """The backend that runs the ops: "reference" in this version. The first call logs which and why.

    Raises:
        ConfigError: CASE_FAST_BACKEND names no backend, or one without kernels in this version.
    """
    return _choose(os.environ.get("CASE_FAST_BACKEND", ""))


@functools.cache
def _choose(asked: str) -> str:
    if asked and asked not in BACKENDS:
        raise ConfigError(f"CASE_FAST_BACKEND={asked!r} names no backend; use {', '.join(BACKENDS)}, or unset it")
    if asked in ("native", "triton"):
        raise ConfigError(
            f"CASE_FAST_BACKEND={asked}: no {asked} kernel exists in this version yet; use reference, or unset it"
        )
    why = "CASE_FAST_BACKEND asks for it" if asked else "no native or triton kernel exists in this version yet"
    native = f"not used: {_native_missing}" if _native_missing else f"built, {_native.simd}"
    _log.info("backend: reference (%s); native module: %s", why, native)
    return "reference"
