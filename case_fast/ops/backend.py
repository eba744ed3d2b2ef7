"""Which backend runs the ops, and why.

    native      case_fast._native: C++ on CPU, CUDA on NVIDIA GPUs
    triton      Triton kernels, on GPUs that the native module does not serve
    reference   case_fast.ops.reference: plain torch on any device

CASE_FAST_BACKEND=native|triton|reference overrides the choice; FAMILY=BACKEND does for one family of ops, and several such
parts may be joined by commas: CASE_FAST_BACKEND=native,bilinear_mim=triton.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from case_fast import __version__
from case_fast.errors import ConfigError
from case_fast.ops import transforms

BACKENDS = ("native", "triton", "reference")
GPUS = ("cuda", "xpu")  # AMD's are "cuda" to torch
_ASKED = "CASE_FAST_BACKEND asks for it"
_log = logging.getLogger("case_fast")

try:
    import case_fast._native as native  # not `from case_fast import`, which hides why it failed

    _native_missing = ""
    if native.__version__ != __version__:
        _native_missing = f"it is version {native.__version__}, the package is {__version__}; install case_fast again"
except ModuleNotFoundError:
    _native_missing = "it is not built for this Python; pip install -e . builds it"
except ImportError as error:
    _native_missing = f"it cannot be loaded ({error}); install case_fast again"


def native_report() -> dict:
    """The native module's state: ``available``, ``reason`` (why not, else empty) and, where available, its own report:
    ``version``, ``families``, ``simd``, ``cuda``, ``cuda_architectures``, ``cuda_runtime``, ``cuda_devices``, ``cuda_status``.

    With CUDA compiled in, counting devices starts the CUDA driver in this process: do not call it before a fork.
    """
    if _native_missing:
        return {"available": False, "reason": _native_missing}
    return {"available": True, "reason": "", **native.report()}


@contextmanager
def asking(name: str) -> Iterator[None]:
    """CASE_FAST_BACKEND is ``name`` inside."""
    before = os.environ.get("CASE_FAST_BACKEND")
    os.environ["CASE_FAST_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("CASE_FAST_BACKEND")
        if before is not None:
            os.environ["CASE_FAST_BACKEND"] = before


def backend_name(family: str = "graph_attention", device: str = "cpu") -> str:
    """The backend that runs a family of ops on a type of device, such as "cpu" or "cuda". The first call logs which and why.

    Raises:
        ConfigError: CASE_FAST_BACKEND names no backend, or one that cannot serve.
    """
    return choose(family, device)


@transforms.constant_when_compiled
def choose(family: str, device: str, beyond: str = "") -> str:
    """As `backend_name`; ``beyond`` says what about this call is beyond the kernels, and empty where nothing is. Transforms of
    torch always are."""
    if under := transforms.beyond_kernels():
        beyond = f"it is called under {under}, which no kernel knows"
    return _choose(family, device, beyond, os.environ.get("CASE_FAST_BACKEND", ""))


def backend_with_reason(family: str, device: str) -> tuple[str, str]:
    """The backend that runs a family of ops on a type of device, and why; raises as `backend_name`, and logs nothing."""
    return _decided(family, device, "", os.environ.get("CASE_FAST_BACKEND", ""))


@functools.cache
def _choose(family: str, device: str, beyond: str, said_by_user: str) -> str:
    name, why = _decided(family, device, beyond, said_by_user)
    if name == "reference" and why != _ASKED:
        _log.warning("backend of %s on %s: reference, plain torch and slower (%s)", family, device, why)
    else:
        _log.info("backend of %s on %s: %s (%s)", family, device, name, why)
    return name


def _decided(family: str, device: str, beyond: str, said_by_user: str) -> tuple[str, str]:
    asked = _asked(family, said_by_user)
    absent = {"native": beyond or _native_absent(family, device), "triton": beyond or _triton_absent(family, device, asked)}
    said = beyond or "; ".join(f"{name} not used: {why}" for name, why in absent.items() if why)
    if asked:
        if absent.get(asked):
            raise ConfigError(
                f"CASE_FAST_BACKEND={asked}: {family} on {device} cannot run there: {absent[asked]}. "
                "Choose another backend, or unset it"
            )
        return asked, _ASKED
    for name, why in absent.items():
        if not why:
            return name, native.simd if (name, device) == ("native", "cpu") else said or "its kernels serve this device"
    return "reference", said


def _asked(family: str, said: str) -> str:
    """What CASE_FAST_BACKEND asks for a family; empty where it asks nothing."""
    found = {"": ""}
    for part in filter(None, said.split(",")):
        name, _, asked = part.rpartition("=")
        if asked not in BACKENDS:
            raise ConfigError(f"CASE_FAST_BACKEND={said!r} names no backend; use {', '.join(BACKENDS)}, or unset it")
        if name and (not name.isidentifier() or importlib.util.find_spec(f"case_fast.ops.{name}") is None):
            raise ConfigError(f"CASE_FAST_BACKEND={said!r} names no family of ops: {name!r}")
        found[name] = asked
    return found.get(family, found[""])


def _native_absent(family: str, device: str) -> str:
    """Why the native module does not serve this family on this device; empty where it does."""
    if device not in ("cpu", "cuda"):
        return f"the native module has no kernels for {device}"
    if _native_missing:
        return f"native module: {_native_missing}"
    if device == "cpu":
        return "" if hasattr(native, f"{family}_forward") else "the native module has no CPU kernel of it"
    if torch.version.hip:
        return "the native module has no kernels for AMD GPUs"
    if not hasattr(native, f"{family}_forward_cuda"):
        return "the native module was built without CUDA, or for CUDA without this op"
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if found and min(found) < (8, 0):
        return "the native kernels need compute capability 8.0"
    return ""


def _triton_absent(family: str, device: str, asked: str) -> str:
    """Why Triton does not serve; empty where it does. In Triton's interpreter it serves the CPU too, where asked to."""
    if importlib.util.find_spec(f"case_fast.ops.{family}_triton") is None:
        return "there is no Triton kernel of it"
    if not _has_triton():
        return "triton is not installed"
    if device in GPUS or (device == "cpu" and asked == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        return ""
    return f"no Triton kernels for {device}" + (" (TRITON_INTERPRET=1 interprets them)" if device == "cpu" else "")


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # blocked in sys.modules
        return False
