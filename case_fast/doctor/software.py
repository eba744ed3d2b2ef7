"""Checks of what is installed: this package, Python, torch, what they need, and the variables that steer them."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import case_fast
from case_fast.doctor.check import Finding, Look, command, counted, fail, ok, skip, warn

if TYPE_CHECKING:  # else where it is used: a machine without it is what these checks are for
    from packaging.requirements import Requirement

_PREFIXES = ("CASE_FAST_", "OMP_", "GOMP_", "KMP_", "MKL_")
_KINDS = {"libgomp": "GNU", "libomp": "LLVM", "libiomp": "Intel"}  # of OpenMP's runtimes, by the beginning of a file's name
_EXTRAS = {"comet": "inferences by COMET", "tensorboard": "curves in TensorBoard", "accelerate": "training in several processes",
           "metrics": "BLEU, ROUGE and BERTScore"}
_CHECKOUT = Path(case_fast.__file__).resolve().parents[1]
_PINS = _CHECKOUT / "constraints.txt"  # in a checkout; it is not installed with the package


def looks(chosen: Collection[str]) -> Iterator[Look]:
    """chosen: names of variables whose values are the command line's own."""
    yield Look("case_fast", _package, reinstall())
    yield Look("python", _python, "python3 --version")
    # before what follows is imported, which may set some itself
    yield Look("variables", lambda: _variables(chosen), "env | grep -E 'CASE_FAST|OMP|KMP|MKL'")
    yield Look("torch", _torch, _install("torch"))
    yield Look("triton", _triton, _install("triton"))
    yield Look("needed packages", _needed, reinstall())
    yield Look("pinned versions", _pinned, reinstall())
    yield Look("OpenMP", _openmp, _install("threadpoolctl"))
    for extra in _extras():
        yield Look(f"extra {extra}", lambda extra=extra: _extra(extra), f"pip install 'case_fast[{extra}]'")


def reinstall() -> str:
    """The line that installs this package anew, native module included."""
    if (_CHECKOUT / "pyproject.toml").is_file():
        pins = ["-c", _shown(_PINS)] if _PINS.is_file() else []
        return command("pip", "install", *pins, "-e", _shown(_CHECKOUT))
    return "pip install --force-reinstall --no-deps case_fast"


def _shown(path: Path) -> str:
    """As it is written in the folder that the user is in, where that is shorter."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _install(*requirements: str) -> str:
    return command("pip", "install", *requirements)


def _package() -> Finding:
    version, where = case_fast.__version__, _shown(Path(case_fast.__file__).resolve().parent)
    try:
        known = metadata.version("case_fast")
    except metadata.PackageNotFoundError:
        return warn(f"{version} in {where}, which pip does not know: its command and its needs are not installed", reinstall())
    if known != version:
        return warn(f"{version} in {where}; pip knows {known}", reinstall())
    return ok(f"{version} in {where}")


def _python() -> Finding:
    from packaging.specifiers import SpecifierSet

    version = ".".join(map(str, sys.version_info[:3]))
    wanted = _declared()[0]
    if not SpecifierSet(wanted).contains(version):
        return fail(f"{version}, and case_fast needs {wanted}", "python3.12 -m venv .venv && .venv/bin/pip install case_fast")
    return ok(version)


def _torch() -> Finding:
    import torch

    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else f"for ROCm {torch.version.hip}" * bool(torch.version.hip)
    said = f"{torch.__version__}, built {build or 'for the CPU'}"
    (wanted,) = (requirement for requirement in _requirements() if requirement.name == "torch")
    if not wanted.specifier.contains(torch.__version__, prereleases=True):
        return fail(f"{said}; case_fast needs {wanted}", _install(str(wanted)))
    return ok(said)


def _triton() -> Finding:
    import torch

    version = _version("triton")
    if version:
        return ok(version)
    if torch.cuda.is_available():
        return warn("not installed: on this GPU the ops that have no CUDA kernel run in plain torch", _install("triton"))
    return skip("not installed; of use on a GPU alone", _install("triton"))


def _needed() -> Finding:
    found = {requirement.name: _version(requirement.name) for requirement in _requirements()}
    wrong = [requirement for requirement in _requirements()
             if not found[requirement.name] or not requirement.specifier.contains(found[requirement.name], prereleases=True)]
    if wrong:
        said = ", ".join(f"{found[one.name] or 'no'} {one.name} ({one} is needed)" for one in wrong)
        return fail(said, _install(*map(str, wrong)))
    return ok(", ".join(f"{name} {version}" for name, version in found.items() if name != "torch"))


def _extras() -> list[str]:
    """Those that the extra "all" joins."""
    joined = [requirement for requirement in _requirements("all") if requirement.extras]
    return sorted(extra for requirement in joined for extra in requirement.extras)


def _extra(name: str) -> Finding:
    wanted = _requirements(name)
    missing = [one.name for one in wanted if not _version(one.name)]
    if missing:
        use = f"; of use for {_EXTRAS[name]} alone" if name in _EXTRAS else ""
        return skip(f"{', '.join(missing)} not installed{use}", f"pip install 'case_fast[{name}]'")
    return ok(", ".join(f"{one.name} {_version(one.name)}" for one in wanted))


def _pinned() -> Finding:
    from packaging.requirements import Requirement

    if not _PINS.is_file():
        return skip("constraints.txt, the versions that the tests run with, is in a checkout alone", "pip freeze")
    lines = (line.partition("#")[0].strip() for line in _PINS.read_text(encoding="utf-8").splitlines())
    pins = {pin.name: pin for pin in (Requirement(line) for line in lines if line)}
    found = {name: version for name in pins if (version := _version(name))}
    other = {name: version for name, version in found.items() if not pins[name].specifier.contains(version, prereleases=True)}
    if other:
        said = ", ".join(f"{name} {version} ({pins[name].specifier})" for name, version in other.items())
        wanted = command("pip", "install", "-c", _shown(_PINS), *other)
        return warn(f"{len(other)} of {counted(len(found), 'package')} differ from constraints.txt: {said}", wanted)
    return ok(f"{counted(len(found), 'package')} as in constraints.txt, which the tests run with")


def _openmp() -> Finding:
    import torch  # noqa: F401  (loads the one that ops of torch run in)
    from threadpoolctl import threadpool_info

    loaded = [item for item in threadpool_info() if item["user_api"] == "openmp"]
    kinds = sorted({next((kind for name, kind in _KINDS.items() if item["prefix"].startswith(name)), item["prefix"])
                    for item in loaded})
    if not loaded:
        return skip("no runtime of OpenMP is loaded with torch", command("python", "-m", "threadpoolctl", "-i", "torch"))
    files = ", ".join(Path(item["filepath"]).name for item in loaded)
    if len(kinds) > 1:
        return warn(f"runtimes of {' and '.join(kinds)} in one process ({files}): it may crash, hang or be slow",
                    command("python", "-m", "threadpoolctl", "-i", "torch"))
    return ok(f"{kinds[0]} alone ({files})")


def _variables(chosen: Collection[str]) -> Finding:
    found = {name: value for name, value in sorted(os.environ.items())
             if name.startswith(_PREFIXES) or name == "CUDA_VISIBLE_DEVICES"}
    own, others = (", ".join(f"{name}={value}" for name, value in found.items() if (name in chosen) == whose)
                   for whose in (True, False))
    said = (others or "none set") + f"; by case-fast: {own}" * bool(own)
    if found.get("CASE_FAST_BACKEND"):
        from case_fast.ops import backend_name

        backend_name()  # raises where the value names no backend
        return warn(f"{said}; CASE_FAST_BACKEND takes the choice of kernels away from case_fast", "unset CASE_FAST_BACKEND")
    return ok(said)


def _declared() -> tuple[str, list[str]]:
    """The Python that case_fast needs, and its requirements, those of extras too: of the checkout, else as pip was told."""
    if not (_CHECKOUT / "pyproject.toml").is_file():
        return metadata.metadata("case_fast")["Requires-Python"], metadata.requires("case_fast") or []
    project = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [f'{line}{" and" if ";" in line else ";"} extra == "{extra}"'
              for extra, lines in project["optional-dependencies"].items() for line in lines]
    return project["requires-python"], project["dependencies"] + extras


def _requirements(extra: str = "") -> list[Requirement]:
    """Those that are always needed, or those of an extra."""
    from packaging.requirements import Requirement

    def holds(one: Requirement, extra: str) -> bool:
        return one.marker is None or one.marker.evaluate({"extra": extra})

    known = [Requirement(line) for line in _declared()[1]]
    return [one for one in known if holds(one, extra) and not (extra and holds(one, ""))]


def _version(name: str) -> str:
    """The version of an installed package; "" where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
