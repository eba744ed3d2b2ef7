"""The reliability scorecard at full size: a command a row, which prints what it counted.

    python -m python_tests.scorecard graph_attention                       every row
    python -m python_tests.scorecard graph_attention --row 3 --size 10000  one row
    python -m python_tests.scorecard graph_attention --row 8               C++ tests under sanitizers (cmake, ninja, a compiler)

Options: --device cuda, --json FILE. The exit status is 1 if a row failed. `make test` runs a share of the same checks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))  # what tests share is imported by bare names

import torch
from op_cases import FAMILIES
from op_checks import ROWS, Family, full_size

from case_fast import ops
from case_fast.devices import processor_name

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = ("address,undefined", "thread")


def check_sanitizers(family: Family, size: int, device: str) -> int:
    """Row 8, of all families at once: the C++ tests built with each sanitizer, which ends them at the first report; returns the
    tests run."""
    cmake, ran = shutil.which("cmake"), 0
    assert cmake and shutil.which("ctest"), "row 8 needs cmake, ninja and a C++ compiler"
    for sanitizer in SANITIZERS[:size]:
        folder = ROOT / "build" / f"cpp-{sanitizer}"  # as `make cpp-test SANITIZE=...`
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
        steps = [
            [*configure, f"-DCASE_FAST_SANITIZE={sanitizer}", "-DCASE_FAST_CUDA=OFF"],
            [cmake, "--build", str(folder)],
            ["ctest", "--test-dir", str(folder), "--output-on-failure", "--parallel", str(os.cpu_count() or 1)],
        ]
        for step in steps:
            done = subprocess.run(step, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(step)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        found = re.search(r"tests passed, 0 tests failed out of (\d+)", done.stdout)
        assert found and int(found[1]) > 0, f"{sanitizer}: no tests ran\n{done.stdout[-2000:]}"
        ran += int(found[1])
    return ran


def run_row(family: Family, row: int, check: Callable[[Family, int, str], int], size: int, device: str) -> dict:
    started = time.monotonic()
    found = {"family": family.family, "row": row, "check": check.__name__.removeprefix("check_"), "size": size, "device": device}
    try:
        found |= {"cases": check(family, size, device), "failures": 0, "said": ""}
    except Exception as error:  # any error fails the row and belongs in its report
        found |= {"cases": 0, "failures": 1, "said": f"{type(error).__name__}: {error}"}
    return found | {"seconds": round(time.monotonic() - started, 1)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--row", type=int, action="append", help="a row; may be given again; default: all")
    parser.add_argument("--size", type=int, help="cases; default: the full size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    family = FAMILIES[options.family]
    checks = {row: (check, full) for row, check in ROWS.items() if (full := full_size(family, row))}
    checks[8] = (check_sanitizers, len(SANITIZERS))
    rows = sorted(checks) if options.row is None else options.row
    if unknown := set(rows) - set(checks):
        parser.error(f"no such rows: {sorted(unknown)}; there are {sorted(checks)}")
    machine = {
        "backend": ops.backend_name(options.family, options.device), "native": ops.native_report().get("simd", "absent"),
        "torch": torch.__version__, "python": platform.python_version(), "processor": processor_name(), "cores": os.cpu_count(),
    }
    print(" | ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"\n| {'row':>3} | {'check':<14} | {'cases':>7} | {'failures':>8} | {'seconds':>8} |\n|---:|---|---:|---:|---:|")
    results = []
    for row in rows:
        check, full = checks[row]
        found = run_row(family, row, check, options.size or full, options.device)
        results.append(found)
        print("| {row:>3} | {check:<14} | {cases:>7} | {failures:>8} | {seconds:>8} |".format(**found), flush=True)
    for found in results:
        if found["failures"]:
            print(f"\nrow {found['row']}: {found['said']}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": results}, indent=1) + "\n")
    return int(any(found["failures"] for found in results))


if __name__ == "__main__":
    sys.exit(main())
