"""The programs of the stages of benchmarks/gpu.sh. `python -m benchmarks.gpu_steps STEP [FAMILY] --out FILE`.

    device               what the GPU is, and what bounds the kernels: copy rate, matrix products, a launch, a node of a graph
    build                the native module for this GPU alone
    smoke FAMILY|all     every kernel on small inputs
    ours|peers|variants FAMILY   the benchmarks; waits for a line on stdin: the seconds that it may take

FILE is written whenever something is known. In a dry run (DRY=1) all is tiny and on the CPU, Triton in its interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import families
from benchmarks.gpu import DRY, ROOT, SKIPPED
from case_fast.errors import ConfigError
from case_fast.files import write_text

if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch

from benchmarks.clock import clock_of
from benchmarks.family import DTYPES, family_of
from benchmarks.measure import OURS, is_ours
from benchmarks.run import run
from benchmarks.switches import backend

DEVICE = "cpu" if DRY else "cuda"
Found = dict[str, Any]
Say = Callable[[Found], None]  # writes down all that is known


# ---------------------------------------------------------------------------------------------------------------------- device


def device(say: Say) -> None:
    from benchmarks.report import environment

    found: Found = {"environment": environment("graph_attention", DEVICE)}
    if found["environment"]["commit"] == "unknown" and os.environ.get("COMMIT"):
        found["environment"]["commit"] = os.environ["COMMIT"]
    if not DRY:
        asked = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"
        said = subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True)
        found["nvidia_smi"] = dict(zip(asked.split(","), said.stdout.strip().split(", "), strict=False))
        found["capability"] = list(torch.cuda.get_device_capability())
    say(found)
    for name, measure in _bounds():
        try:
            found[name] = measure()
        except Exception as error:  # the others are still measured
            found.setdefault("failed", {})[name] = _said(error)
        print(name, found.get(name), flush=True)
        say(found)


def _bounds() -> Iterator[tuple[str, Callable[[], float]]]:
    clock = clock_of(DEVICE)
    wide = 256 if DRY else 8192

    def best(make: Callable[[], Callable[[], object]], calls: int = 5) -> float:
        ready = clock.prepare(make)
        return min(clock.seconds(ready.run, calls) for _ in range(5))

    def copy() -> float:
        source = torch.empty(1 << (20 if DRY else 30), dtype=torch.uint8, device=DEVICE).random_()
        target = torch.empty_like(source)
        return round(2 * source.numel() / best(lambda: lambda: target.copy_(source)) / 1e12, 4)

    def product(dtype: torch.dtype, precision: str = "ieee") -> float:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = precision
        try:
            a, b = (torch.randn(wide, wide, device=DEVICE, dtype=dtype) for _ in range(2))
            out = torch.empty_like(a)
            return round(2 * wide**3 / best(lambda: lambda: torch.mm(a, b, out=out)) / 1e12, 3)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    def many(x: torch.Tensor) -> None:
        for _ in range(1000):
            x.add_(1.0)

    def launch() -> float:
        x = torch.zeros(1, device=DEVICE)
        many(x)
        return round(1e3 * clock.seconds(lambda: many(x)), 3)

    def node() -> float:
        x = torch.zeros(1, device=DEVICE)
        return round(1e3 * best(lambda: lambda: many(x), 1), 3)

    yield "copy_tb_s", copy
    yield "float32_tflop_s", lambda: product(torch.float32)
    if not DRY:
        yield "tf32_tflop_s", lambda: product(torch.float32, "tf32")
    yield "bfloat16_tflop_s", lambda: product(torch.bfloat16)
    yield "us_a_launch", launch
    yield "us_a_graph_node", node


# ----------------------------------------------------------------------------------------------------------------------- build


def build(say: Say) -> None:
    """In a dry run the module that is there; else built for this GPU. What fails here leaves the Triton kernels to the others."""
    if not DRY:
        major, minor = torch.cuda.get_device_capability()
        environment = os.environ | {"CASE_FAST_CUDA": "1", "CASE_FAST_CUDA_ARCHITECTURES": f"{major}{minor}-real"}
        environment.pop("OMP_NUM_THREADS", None)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        if status := subprocess.run(command, cwd=ROOT, env=environment).returncode:
            sys.exit(f"the native module was not built (exit status {status}); what needs it is left out")
    from case_fast.ops import native_report

    found: Found = {"native": native_report()}
    say(found)
    if not DRY:
        resources = subprocess.run([sys.executable, "-m", "benchmarks.kernel_resources", "--json"], cwd=ROOT, capture_output=True,
                                   text=True)
        found["kernel_resources"] = json.loads(resources.stdout) if resources.stdout[:1] == "[" else resources.stderr[-300:]
        say(found)
    print(found["native"])


# ----------------------------------------------------------------------------------------------------------------------- smoke


def smoke(family: str, say: Say) -> None:
    """``family`` may be all: then one that fails costs itself alone, and the status says that there was one."""
    found: Found = {"ran": [], "left_out": {}, "failed": {}}
    for name in families() if family == "all" else [family]:
        try:
            (_smoke_dry if DRY else _smoke)(name)
            found["ran"].append(name)
        except ConfigError as error:  # a backend that is not here
            found["left_out"][name] = str(error)
        except Exception as error:
            found["failed"][name] = _said(error)
            if family != "all":
                raise
        say(found)
        print(f"{name}: {found['left_out'].get(name) or found['failed'].get(name) or 'every kernel has run'}", flush=True)
    if found["failed"]:
        sys.exit(f"failed: {', '.join(found['failed'])}")
    if not found["ran"]:
        sys.exit(SKIPPED)


def _smoke(name: str) -> None:
    from case_fast.ops.device_flag import raise_pending

    import_module(f"benchmarks.{name}.gpu").small()
    torch.cuda.synchronize()
    raise_pending()


def _smoke_dry(name: str) -> None:
    """The C++ kernels of the CPU, and where the family has them, the Triton kernels in their interpreter, against each other."""
    family = family_of(name)
    case = family.case_of(_tiny(name))
    expected, ways = family.truth(case), 0
    for runs in ("native", "triton"):
        try:
            with backend(runs):
                work = family.peers[OURS](case)
                work.check(case.modes[-1], expected)
                ways += 1
        except ConfigError as error:
            print(f"{name}: {error}", flush=True)
    if not ways:
        raise ConfigError(f"{name}: neither the native module nor triton is here")


def _tiny(name: str) -> str:
    """A size that the interpreter takes a second for: eight of what a family counts, or the least of its own."""
    family = family_of(name)
    with suppress(ConfigError):
        return family.case_of("8").name
    return min(family.quick_sizes, key=lambda size: sum(family.case_of(size).shape.values()))


# ------------------------------------------------------------------------------------------------------------------ benchmarks


def bench(which: str, family: str, say: Say) -> None:
    """Case by case. ours: our kernels and bare products of the same size. peers: all others and ours in turns, first what needs
    no compilation in all sizes, then what does, a peer at a time. variants: tiles and plans of ours in turns with the default.
    When the time is over, what is known has been said."""
    seconds = float(sys.stdin.readline() or 60)
    until = time.monotonic() + seconds - min(3.0, seconds / 10)
    whole = family_of(family, DEVICE if DRY and which != "variants" else "cuda")
    found: Found = {"cases": [], "failed": {}, "in_time": True}
    first, *later = _peers_of(which, list(whole.peers))
    sizes = [_tiny(family)] if DRY else whole.sizes
    order = [*product([first], sizes), *((names, size) for size in sizes for names in later)]
    for (names, size), dtype in product(order, DTYPES[DEVICE]):
        if time.monotonic() > until:
            found["in_time"] = False
            say(found)
            return
        chosen = replace(whole, peers={name: whole.peers[name] for name in names}, device=DEVICE)
        try:
            for case in run(chosen, [size], quick=DRY, rounds=12, budget=2, until=until, dtypes=[dtype], memories=not DRY):
                found["cases"].append({"family": family, **case})
        except Exception as error:  # this case alone
            found["failed"][f"{size}, {dtype}, {', '.join(names)}"] = _said(error)
            print(f"{size}, {dtype}, {', '.join(names)}: {_said(error)}", flush=True)
        say(found)
        torch.cuda.empty_cache()  # nothing where there is no GPU
    if found["failed"]:
        sys.exit(f"{len(found['failed'])} failed: {next(iter(found['failed'].values()))}")


def _peers_of(which: str, names: list[str]) -> list[list[str]]:
    """Groups that are measured in turns, each with ours."""
    rulers = [name for name in names if "bare matrix products" in name]
    others = [name for name in names if not is_ours(name) and name not in rulers]
    eager = [name for name in others if "torch.compile" not in name]
    if which == "ours":
        return [[OURS, *rulers]]
    if which == "variants":
        return [[OURS, *(name for name in names if is_ours(name) and name != OURS)]]
    return [[OURS, *eager], *([OURS, name] for name in others if name not in eager and not DRY)]


# ------------------------------------------------------------------------------------------------------------------------ main


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {f'{error} '.splitlines()[0][:300].strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("device", "build", "smoke", "ours", "peers", "variants"))
    parser.add_argument("what", nargs="?", default="all")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()

    def say(found: Found) -> None:
        write_text(given.out, json.dumps(found) + "\n")

    if given.step in ("ours", "peers", "variants"):
        bench(given.step, given.what, say)
    elif given.step == "smoke":
        smoke(given.what, say)
    else:
        {"device": device, "build": build}[given.step](say)


if __name__ == "__main__":
    main()
