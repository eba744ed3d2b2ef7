"""The tests of a family on a GPU, written down one by one. `python -m benchmarks.gpu_tests FAMILY --out FILE`.

pytest runs in a process of its own, with this module as a plugin. Where that process dies, or the GPU refuses all further work,
the test that ran then has failed, and another process goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import families
from benchmarks.gpu import DRY, ROOT, SKIPPED
from case_fast.files import write_text

BROKEN = re.compile(r"CUDA error|illegal memory access|unspecified launch failure|misaligned address|CUDA_ERROR")
MOST_PROCESSES = 12
_found: dict[str, Any] = {}  # in the process of pytest


def _read(path: Path) -> dict[str, Any]:
    empty = {"passed": 0, "failed": 0, "skipped": 0, "begun": 0, "collected": 0, "running": "", "failing": {}}
    return json.loads(path.read_text()) if path.exists() else empty


def _write(found: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(found) + "\n")


# ------------------------------------------------------------------------------------------------------------------ the plugin


def _save() -> None:
    _write(_found, Path(os.environ["GPU_TESTS"]))


@pytest.hookimpl(trylast=True)  # behind -k
def pytest_collection_modifyitems(items: list) -> None:
    _found.update(_read(Path(os.environ["GPU_TESTS"])))
    _found["collected"] = len(items)
    del items[: _found["begun"]]  # they are always in the same order
    _save()


def pytest_runtest_logstart(nodeid: str) -> None:
    _found["begun"] += 1
    _found["running"] = nodeid
    _save()


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        _found["failing"].setdefault(report.nodeid, _last(report.longreprtext))
    if report.when == "call" or report.skipped:
        _found["skipped" if report.skipped else "passed"] += not report.failed
    if report.failed and BROKEN.search(report.longreprtext):
        _found["running"] = ""
        _found["failed"] = len(_found["failing"])
        _save()
        os._exit(3)  # whatever ran behind it here would fail as well


def pytest_runtest_logfinish(nodeid: str) -> None:
    _found["running"], _found["failed"] = "", len(_found["failing"])
    _save()


def _last(text: str) -> str:
    """The line of a report that says what was wrong."""
    lines = [line[2:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (lines[0] if lines else (text.strip().splitlines() or [""])[-1])[:300]


# ------------------------------------------------------------------------------------------------------------------ the runner


def _command(family: str) -> list[str]:
    """On a GPU, what needs only torch, numpy and pytest; in a dry run, a few of the tests of the CPU."""
    folder = "python_tests/ops"
    chosen = " and not ".join([family, *(name for name in families() if family in name and name != family)])
    common = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_tests", "-p", "no:cacheprovider", "-q", "-k"]
    if DRY:
        return [*common, f"{chosen} and refused", f"{folder}/test_families.py"]
    files = [f"{folder}/test_gpu_families.py", f"{folder}/test_gpu_{family}.py"]
    return [*common, chosen, "--noconftest", *(file for file in files if (ROOT / file).exists())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    environment = os.environ | {"GPU_TESTS": str(given.out)}
    for _ in range(MOST_PROCESSES):
        before = _read(given.out)["begun"]
        status = subprocess.run(_command(given.family), cwd=ROOT, env=environment).returncode
        found = _read(given.out)
        if found["running"]:
            found["failing"][found["running"]] = f"its process ended there, status {status}"
            found |= {"running": "", "failed": len(found["failing"])}
            _write(found, given.out)
        if found["begun"] in (before, found["collected"]):
            break
    if found["failing"]:
        sys.exit(f"{found['failed']} of {found['begun']} tests failed: {', '.join(found['failing'])[:2000]}")
    if found["begun"] < found["collected"] or not found["collected"]:
        sys.exit(f"pytest ended with status {status}, {found['begun']} of {found['collected']} tests begun")
    if not found["passed"]:
        print(f"none of {found['collected']} tests can run here")
        sys.exit(SKIPPED)


if __name__ == "__main__":
    main()
