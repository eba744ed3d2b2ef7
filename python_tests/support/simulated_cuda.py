"""CUDA without a GPU, as far as launches of Triton need it: an H100 that records what it is asked to run, and runs nothing.

`recording` gives Triton a driver whose target is sm_90. A launch, ``kernel[grid](...)``, then goes Triton's own way up to the key
of its cache: types, alignment, constants, options; there Triton's own hook takes it down and says that nothing is to be compiled.
Tensors may lie on the CPU, where memory is aligned to 64 bytes as a GPU's is to 512: their contents stay as they were.

`pretending` makes tensors that say they lie on "cuda:1" and have no contents (torch's FakeTensorMode). What torch's CPU build
refuses them is done here: taking and setting parts, copies, and the device that is current.

For processes that do not run Triton's interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction, driver

from case_fast.ops.device_flag import raise_pending

TARGET = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """A launch as Triton sees it; two of one ``name`` and ``key`` are one variant: compiled once."""

    function: JITFunction
    key: str
    signature: dict[str, str]  # of each argument its type
    constants: dict[tuple[int, ...], Any]  # by place
    attributes: dict[tuple[int, ...], list]
    options: dict[str, Any]
    device: int  # the current one

    @property
    def name(self) -> str:
        return f"{self.function.module.rpartition('.')[2].removesuffix('_triton')}.{self.function.__name__}"

    @property
    def variant(self) -> tuple[str, str]:
        return self.name, self.key

    @property
    def values(self) -> dict[str, Any]:
        """What is compiled in, by the argument's name."""
        names = self.function.arg_names
        return {names[place]: getattr(value, "name", value) for (place,), value in self.constants.items()}

    @property
    def said(self) -> dict[str, str]:
        """Of each argument in short, what tells variants apart: "*fp32 16" is a pointer to multiples of 16 bytes."""
        names = self.function.arg_names
        known = {names[place[0]]: " 16" for place, of in self.attributes.items() if of}
        found = {name: kind + known.get(name, "") for name, kind in self.signature.items() if kind != "constexpr"}
        found |= {name: repr(value) for name, value in self.values.items()}
        return found | {"num_warps": str(self.options["num_warps"])}

    @cached_property
    def compiled(self) -> Compiled:
        """As the GPU would have it compiled, by the assembler that comes with Triton."""
        source = ASTSource(self.function, self.signature, self.constants, self.attributes)
        built = triton.compile(source, target=TARGET, options=self.options)
        found = _resources(built.asm["cubin"])
        return Compiled(found["REG"], found["STACK"] + found["LOCAL"], built.metadata.shared, self.options["num_warps"],
                        built.asm["ptx"])


@dataclass(frozen=True)
class Compiled:
    registers: int  # of a thread
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    warps: int
    ptx: str = field(repr=False)

    @property
    def blocks(self) -> int:
        """Of them that an SM of sm_90 holds at once: 65 536 registers, given out by 256 to a warp; 227 KiB of shared memory, of
        which a block costs 1 KiB more than it asks for; 64 warps; 32 blocks."""
        of_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 65536 // of_warp // self.warps
        return min(by_registers, 227 * 1024 // (self.shared + 1024), 64 // self.warps, 32)

    @property
    def wgmma(self) -> bool:
        return "wgmma.mma_async" in self.ptx

    def wide(self, kind: str) -> int:
        """Its loads ("ld"), into shared memory too, or stores ("st") of 16 bytes of global memory."""
        return len(re.findall({"ld": r"ld\.global\S*\.v4|cp\.async\.cg", "st": r"st\.global\S*\.v4"}[kind], self.ptx))

    @property
    def target(self) -> str:
        return re.search(r"\.target (\w+)", self.ptx)[1]


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


class _Driver:
    """What Triton asks before a launch."""

    def __init__(self) -> None:
        self.device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def exchange(self, device: int) -> int:
        """As torch.cuda._exchange_device."""
        before = self.device
        if device >= 0:
            self.device = device
        return before


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """The launches from here on, in order."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "interpreted kernels ask no driver"
    launches: list[Launch] = []

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = {name: compile[name] for name in OPTIONS}
        launches.append(Launch(fn.jit_function, compile["key"], compile["signature"], compile["constants"], compile["configs"][0],
                               options, compile["device"]))
        return True  # there is nothing to compile, so nothing is run

    simulated, runtime = _Driver(), triton.knobs.runtime
    with ExitStack() as stack:
        stack.enter_context(patch.object(driver, "_active", simulated))
        stack.enter_context(patch.object(runtime, "jit_cache_hook", hook))
        for name in ("_exchange_device", "_maybe_exchange_device"):
            stack.enter_context(patch.object(torch.cuda, name, simulated.exchange))
        yield launches


@contextmanager
def pretending() -> Iterator[None]:
    """Tensors without contents, on any device that is asked for."""
    raise_pending()  # its flag lies on the host, with contents
    with FakeTensorMode(allow_non_fake_inputs=True), _Parts():
        yield


class _Parts(TorchFunctionMode):
    """What torch does for a tensor only after it has made its device the current one."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        done = _WITHOUT_DEVICE.get(function)
        if done is not None and isinstance(args[0], FakeTensor):
            return done(*args)
        return function(*args, **(kwargs or {}))


def _part(x: Tensor, places: Any) -> Tensor:
    dim = 0
    for place in places if isinstance(places, tuple) else (places,):
        if isinstance(place, int):
            x = x.select(dim, place)
        elif isinstance(place, slice):
            x = torch.ops.aten.slice(x, dim, place.start, place.stop, place.step or 1)
            dim += 1
        else:
            x = torch.ops.aten.index(x, [None] * dim + [place])
            dim += place.dim()
    return x


_WITHOUT_DEVICE: dict[Callable, Callable] = {
    Tensor.data_ptr: lambda x: 4096 + x.storage_offset() * x.element_size(),
    Tensor.__getitem__: _part,
    Tensor.__setitem__: lambda x, places, value: None,
    Tensor.__invert__: torch.bitwise_not,
    Tensor.copy_: lambda x, *_: x,
}
