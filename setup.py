"""Builds case_fast._native by driving CMakeLists.txt with ninja; all else about the package is in pyproject.toml.

`python setup.py build_ext --inplace` builds it in a checkout with whatever setuptools is there, or none, and without network.

CASE_FAST_NATIVE=0                     install pure Python, without the native module
CASE_FAST_CUDA=0|1                     never build CUDA code | fail if it cannot be built (default: build it where nvcc works)
CASE_FAST_CUDA_ARCHITECTURES=90-real   for these GPUs alone, as CMAKE_CUDA_ARCHITECTURES has them (default: 80-real;90)
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent
NEEDS = """
case_fast: the native module could not be built: {reason}
  It needs a C++17 compiler and Python's headers (Debian/Ubuntu: apt install g++ python3-dev).
  `pip install -v` shows the whole build. CASE_FAST_NATIVE=0 installs without the native module."""


def switch(name: str) -> bool | None:
    """The environment's 0 or 1 as a bool; None where the variable is unset or empty."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"case_fast: {name}={value!r} is not understood; set it to 0 or 1, or unset it.")
    return None if value == "" else value == "1"


def tool(name: str, folder_attribute: str, debian: str) -> str:
    """Path of a build tool: the PyPI wheel this interpreter sees (it need not be on PATH), else the one on PATH."""
    try:
        folder = getattr(importlib.import_module(name), folder_attribute)
    except (ImportError, AttributeError):
        folder = ""
    found = shutil.which(name, path=folder) if folder else None
    found = found or shutil.which(name)
    if not found:
        raise SystemExit(NEEDS.format(reason=f"no {name} found (pip install {name}, or apt install {debian})"))
    return found


def pybind11_headers() -> str:
    """The folder that holds pybind11/pybind11.h: of pip's pybind11, else of torch, which carries a copy."""
    try:
        return importlib.import_module("pybind11").get_include()
    except ImportError:
        torch = importlib.util.find_spec("torch")  # found, not imported: that takes seconds
    for place in torch.submodule_search_locations or () if torch else ():
        if Path(place, "include", "pybind11", "pybind11.h").is_file():
            return str(Path(place, "include"))
    message = f"{sys.executable} sees no pybind11 and no torch, which carries its headers (pip install pybind11)"
    raise SystemExit(NEEDS.format(reason=message))


def build(target: Path) -> None:
    """Build the native module and leave it at ``target``."""
    folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"  # kept: the next build is incremental
    cmake = tool("cmake", "CMAKE_BIN_DIR", "cmake")
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": tool("ninja", "BIN_DIR", "ninja-build"),
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
        "Python_EXECUTABLE": sys.executable,
        "CASE_FAST_PYBIND11": pybind11_headers(),
        "CASE_FAST_PYTHON": "ON",
        "CASE_FAST_CUDA": {None: "AUTO", False: "OFF", True: "ON"}[switch("CASE_FAST_CUDA")],
    }
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-U", "CMAKE_CUDA_ARCHITECTURES"]  # of the last build
    if architectures := os.environ.get("CASE_FAST_CUDA_ARCHITECTURES"):
        settings["CMAKE_CUDA_ARCHITECTURES"] = architectures
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    stale = (folder / "CMakeCache.txt").exists()
    try:
        if subprocess.run(configure).returncode != 0:
            if not stale:
                raise SystemExit(NEEDS.format(reason="cmake could not configure it; its message stands above."))
            shutil.rmtree(folder)  # a cache from another cmake, compiler or folder; start over once
            subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(folder), "--target", "_native"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(NEEDS.format(reason=f"{error}; the compiler's message stands above.")) from None
    if not target.exists():
        raise SystemExit(NEEDS.format(reason=f"the build did not write {target.name}."))


def install() -> None:
    """What setuptools does with pyproject.toml, the native module built by `build`."""
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext

    class CMakeBuild(build_ext):
        def build_extension(self, ext: Extension) -> None:
            build(Path(self.get_ext_fullpath(ext.name)).resolve())

    csrc = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*"))
    extension = Extension("case_fast._native", sources=["CMakeLists.txt", *csrc])  # what an sdist must hold to build it
    setup(ext_modules=[] if switch("CASE_FAST_NATIVE") is False else [extension], cmdclass={"build_ext": CMakeBuild})


try:
    from setuptools import __version__ as version
except ImportError:
    version = "0"
if int(version.split(".")[0]) >= 77:  # the first to read an SPDX licence in pyproject.toml
    install()
elif {"build_ext", "--inplace"} <= set(sys.argv):
    build(ROOT / "case_fast" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")
else:
    raise SystemExit(f"case_fast: setuptools {version} is too old to install it; run: pip install -U 'setuptools>=77'. "
                     f"The native module alone needs none: {Path(sys.executable).name} setup.py build_ext --inplace")
