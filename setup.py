"""Builds case_fast._native by driving CMakeLists.txt with ninja; all else about the package is in pyproject.toml.

CASE_FAST_NATIVE=0   install pure Python, without the native module
CASE_FAST_CUDA=0|1   never build CUDA code | fail if it cannot be built (default: build it where nvcc works)
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


def pybind11_folder() -> str:
    try:
        return importlib.import_module("pybind11").get_cmake_dir()
    except ImportError:
        message = f"pybind11 is not importable by {sys.executable} (pip install pybind11, or build in isolation)"
        raise SystemExit(NEEDS.format(reason=message)) from None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"  # kept: the next build is incremental
        cmake = tool("cmake", "CMAKE_BIN_DIR", "cmake")
        cuda = {None: "AUTO", False: "OFF", True: "ON"}[switch("CASE_FAST_CUDA")]
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja", "BIN_DIR", "ninja-build"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11_folder(),
            "CASE_FAST_PYTHON": "ON",
            "CASE_FAST_CUDA": cuda,
        }
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


if int(setuptools.__version__.split(".")[0]) < 77:  # the first to read an SPDX licence in pyproject.toml
    raise SystemExit(f"case_fast: setuptools {setuptools.__version__} is too old; run: pip install -U 'setuptools>=77'")

csrc = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*"))
extension = Extension("case_fast._native", sources=["CMakeLists.txt", *csrc])  # what an sdist must hold to build it
setup(ext_modules=[] if switch("CASE_FAST_NATIVE") is False else [extension], cmdclass={"build_ext": CMakeBuild})
