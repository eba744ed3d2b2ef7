"""Checks of the machine: cores, threads, memory, GPU, and what builds the native module."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from case_fast.doctor.check import Finding, Look, counted, ok, size, skip, warn
from case_fast.doctor.software import reinstall

_CGROUP, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_MEMORY = Path("/proc/meminfo")
_DRIVER = Path("/proc/driver/nvidia/version")
_ENOUGH = 2 << 30  # bytes: training at the paper's size on CPU had a peak of 1.1 GB (docs/results.md)
_COMPILERS = ("c++", "g++", "clang++")


def looks() -> Iterator[Look]:
    yield Look("cores", _cores, "nproc")
    yield Look("threads", _threads, "unset OMP_NUM_THREADS")
    yield Look("memory", _memory, "free -h")
    yield Look("GPU", _gpu, "nvidia-smi")
    yield Look("compilers", _compilers, "c++ --version")


def usable_cores() -> float:
    """The cores that this process may use: those that it is bound to, or its container's share of them, if that is less."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [int(share) / int(period) for share, period in map(str.split, _limits("cpu.max")) if share != "max"]
    return min([bound, *shares])


def _limits(name: str) -> list[str]:
    """What a file says in the control group of this process and in those above it (version 2; none elsewhere)."""
    try:
        path = next(line for line in _OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))[3:].strip("/")
        folders = [_CGROUP / path, *(_CGROUP / path).parents]
    except (OSError, StopIteration):
        return []
    files = (folder / name for folder in folders if folder.is_relative_to(_CGROUP))
    return [file.read_text().strip() for file in files if file.is_file()]


def _cores() -> Finding:
    from case_fast.devices import processor_name
    from case_fast.ops import native_report

    usable, all_ = usable_cores(), os.cpu_count() or 1
    report = native_report()
    if report["available"]:
        simd = report["simd"] + " with products of bfloat16" * report["bf16"]
    else:
        import torch

        simd = torch.backends.cpu.get_cpu_capability()
    return ok(f"{usable:g} of {all_} usable; {processor_name()}; {simd}")


def _threads() -> Finding:
    import torch

    threads, usable, said = torch.get_num_threads(), usable_cores(), os.environ.get("OMP_NUM_THREADS", "")
    shown = f"{counted(threads, 'thread')} of torch on {usable:g} usable core{'s' * (usable != 1)}"
    if threads > usable:
        return warn(f"{shown}: they wait for each other", f"export OMP_NUM_THREADS={max(1, int(usable))}")
    if said and threads < int(usable):
        return warn(f"{shown}: OMP_NUM_THREADS is {said}", "unset OMP_NUM_THREADS")
    return ok(shown)


def _memory() -> Finding:
    try:
        lines = dict(line.split(":") for line in _MEMORY.read_text().splitlines() if ":" in line)
        total, free = (int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return skip("this system does not say how much there is", "vm_stat")
    limits = [int(limit) for limit in _limits("memory.max") if limit != "max"]
    used = [int(now) for now in _limits("memory.current")[:1]]
    if limits and min(limits) < total:
        total = min(limits)
        free = min(free, total - sum(used))
    said = f"{size(free)} of {size(total)} free"
    return ok(said) if free >= _ENOUGH else warn(f"{said}; training at the paper's size takes about {size(_ENOUGH)}", "free -h")


def _gpu() -> Finding:
    import torch

    from case_fast.ops import native_report

    report = native_report()
    driver = next(iter(_DRIVER.read_text().splitlines()), "").split(":")[-1].strip() if _DRIVER.is_file() else ""
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count())]
        said = ", ".join(f"{gpu.name} ({size(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor})" for gpu in found)
        return ok(f"{said}; {driver or 'driver not known'}")
    status = report.get("cuda_status", "") if report.get("cuda") else ""
    if driver and not torch.version.cuda:
        return warn(f"there is a driver ({driver}), but torch is built for the CPU", "pip install --force-reinstall torch")
    if driver:
        return warn(f"there is a driver ({driver}), but torch sees no GPU{f': {status}' if status else ''}", "nvidia-smi")
    return skip(f"none that torch sees{f' ({status})' if status else ''}", "nvidia-smi")


def _compilers() -> Finding:
    from case_fast.ops import native_report

    there = native_report()["available"]
    host = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *_COMPILERS))), None)
    cuda = shutil.which("nvcc")
    if host is None:
        if there:
            return skip("no C++ compiler, which only building the native module anew needs", "apt install g++")
        return warn("no C++ compiler to build the native module with", f"apt install g++ && {reinstall()}")
    return ok(f"{_first_line(host)}; {_last_line(cuda) if cuda else 'no nvcc, so the module is built for the CPU'}")


def _first_line(program: str) -> str:
    return _version(program)[0]


def _last_line(program: str) -> str:
    """nvcc's version stands in its last line but one, where it has so many."""
    lines = _version(program)
    release = next((line for line in lines if "release" in line), lines[-1])
    return f"nvcc {release.partition('release')[2].strip(' ,') or release}"


def _version(program: str) -> list[str]:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=3)
    return done.stdout.strip().splitlines() or [f"{program} says no version"]
