"""Building the native module: which tools and headers are taken, and what is said where one is missing. Nothing is compiled."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
RECORD = """#!{python}
import sys
from pathlib import Path
with open({log!r}, "a") as log:
    print(*sys.argv[1:], sep="\\n", file=log)
if "--build" in sys.argv:
    Path({module!r}).touch()
"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Checkout:
    """A copy of setup.py, with a cmake that writes down what it is asked and an empty module in place of the built one."""

    def __init__(self, folder: Path):
        self.folder, self.site, self.log = folder, folder / "site", folder / "cmake.txt"
        self.module = folder / "case_fast" / f"_native{SUFFIX}"
        self.module.parent.mkdir()
        shutil.copy(ROOT / "setup.py", folder)
        said = RECORD.format(python=sys.executable, log=str(self.log), module=str(self.module))
        for tool, attribute in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
            script(self.site / tool / tool, said)
            self.package(tool, f"from pathlib import Path\n{attribute} = str(Path(__file__).parent)\n")

    def package(self, name: str, text: str) -> None:
        (self.site / name).mkdir(exist_ok=True)
        (self.site / name / "__init__.py").write_text(text)

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("CASE_FAST_")}
        environment = plain | {"PYTHONPATH": str(self.site)} | environment
        command = [sys.executable, "setup.py", *words]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60)

    @property
    def asked(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path)
    made.package("pybind11", "def get_include():\n    return 'of pybind11'\n")
    return made


@pytest.mark.parametrize("setuptools", ["__version__ = '68.1.2'", "raise ImportError('there is none')"])
def test_the_module_is_built_in_place_whatever_setuptools_there_is(checkout, setuptools):
    checkout.package("setuptools", setuptools)
    done = checkout.run("-q", "build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    assert checkout.module.exists()
    assert f"-DPython_EXECUTABLE={sys.executable}" in checkout.asked and "-DCASE_FAST_PYBIND11=of pybind11" in checkout.asked
    refused = checkout.run("bdist_wheel")
    assert refused.returncode == 1
    assert "is too old to install it; run: pip install -U 'setuptools>=77'. The native module alone needs none" in refused.stderr


def test_torch_s_headers_serve_where_there_is_no_pybind11(checkout):
    checkout.package("setuptools", "__version__ = '68.1.2'")
    checkout.package("pybind11", "raise ImportError('there is none')")
    assert checkout.run("build_ext", "--inplace").returncode == 0
    (torch,) = importlib.util.find_spec("torch").submodule_search_locations
    assert f"-DCASE_FAST_PYBIND11={torch}/include" in checkout.asked
    checkout.package("torch", "raise RuntimeError('must be found, not imported')")  # one without headers
    refused = checkout.run("build_ext", "--inplace")
    assert refused.returncode == 1 and "sees no pybind11 and no torch, which carries its headers" in refused.stderr


def test_the_gpus_to_build_for_are_those_of_the_environment_or_the_default_again(checkout):
    checkout.package("setuptools", "__version__ = '68.1.2'")
    assert checkout.run("build_ext", "--inplace", CASE_FAST_CUDA_ARCHITECTURES="90-real").returncode == 0
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real" in checkout.asked
    checkout.log.unlink()
    assert checkout.run("build_ext", "--inplace").returncode == 0
    assert not [word for word in checkout.asked if "CUDA_ARCHITECTURES=" in word]
    assert checkout.asked[checkout.asked.index("-U") + 1] == "CMAKE_CUDA_ARCHITECTURES", "what an earlier build left in the cache"


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="cmake or ninja is not on PATH")
class TestConfiguring:
    def configure(self, folder: Path, nvcc: str, *settings: str) -> subprocess.CompletedProcess[str]:
        """cmake's configuration of this checkout with ``nvcc`` for a compiler, a shell script."""
        script(folder / "nvcc", nvcc)
        command = ["cmake", "-S", str(ROOT), "-B", str(folder / "build"), "-G", "Ninja", "-DCASE_FAST_TESTS=OFF", *settings]
        environment = os.environ | {"CUDACXX": str(folder / "nvcc")}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    def test_an_nvcc_that_fails_leaves_a_build_for_the_cpu(self, tmp_path):
        broken = f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho broken >&2\nexit 1\n'
        done = self.configure(tmp_path, broken)
        assert done.returncode == 0, done.stderr
        assert "building without CUDA (nvcc could not compile a probe when the module was built)" in done.stdout
        assert "could not compile a probe for 80-real;90:" in done.stdout and "broken" in done.stdout
        assert self.configure(tmp_path, broken, "-DCMAKE_CUDA_ARCHITECTURES=90-real").returncode == 0
        first, second = (tmp_path / "asked").read_text().splitlines()
        assert "compute_80,code=sm_80" in first and "compute_90,code=sm_90" in first
        assert "sm_80" not in second and "compute_90,code=sm_90" in second
        done = self.configure(tmp_path, broken, "-DCASE_FAST_CUDA=ON")
        assert done.returncode != 0 and "CASE_FAST_CUDA=1, but nvcc could not compile a probe" in done.stderr

    def test_the_python_module_needs_the_headers_of_pybind11(self, tmp_path):
        settings = ("-DCASE_FAST_CUDA=OFF", "-DCASE_FAST_PYTHON=ON", f"-DPython_EXECUTABLE={sys.executable}")
        done = self.configure(tmp_path, "", *settings, f"-DCASE_FAST_PYBIND11={tmp_path}")
        assert done.returncode != 0 and "holds no pybind11/pybind11.h" in done.stderr
        script(tmp_path / "pybind11" / "pybind11.h", "")
        assert self.configure(tmp_path, "", *settings, f"-DCASE_FAST_PYBIND11={tmp_path}").returncode == 0


# ---- what is released


def test_the_sdist_holds_all_that_the_wheel_is_made_of(tmp_path):
    """Of the files that the repository has; `make wheel` builds the wheel from it."""
    import setuptools

    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("this setuptools is too old to make one")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no checkout")
    tree = tmp_path / "tree"
    needed = {name for name in listed.stdout.split("\0") if name.startswith(("case_fast/", "csrc/"))}
    needed |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"}
    for name in needed:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    code = "from setuptools.build_meta import build_sdist; build_sdist('.')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (packed,) = tree.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert not sorted(needed - inside)


def test_a_release_has_a_wheel_for_each_python_and_needs_no_torch_to_build():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheels = settings["tool"]["cibuildwheel"]
    assert settings["project"]["requires-python"] == ">=3.11" and wheels["build"][0] == "cp311-*"
    assert wheels["linux"]["archs"] == ["x86_64", "aarch64"] and wheels["macos"]["archs"] == ["arm64"]
    assert not [need for need in settings["build-system"]["requires"] if "torch" in need]
    assert (ROOT / wheels["test-command"].rpartition("{project}/")[2]).is_file()
