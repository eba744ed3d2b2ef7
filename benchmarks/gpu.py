"""The steps of benchmarks/gpu.sh: on a CUDA machine, what the kernels do there. `python -m benchmarks.gpu STEP`.

    device                 ends with a sentence where there is no GPU that torch and the native module can use
    small                  every kernel on small inputs: what compute-sanitizer watches
    bench --out FILE       every family, as `case-fast bench FAMILY --device cuda` does: ours first, peers while there is time
    join --parts D --out F what tests, sanitizers and benchmarks said, as one JSON file
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks import families
from benchmarks.clock import CudaClock
from benchmarks.command import require
from benchmarks.family import family_of
from benchmarks.measure import OURS, is_ours
from benchmarks.run import run
from case_fast.errors import ConfigError


def device() -> str:
    """The GPU's name. Exits with a sentence where there is none that torch can use."""
    try:
        require("cuda")
    except ConfigError as error:
        sys.exit(f"benchmarks/gpu.sh: {error}")
    return torch.cuda.get_device_name()


def small() -> None:
    from case_fast.ops.device_flag import raise_pending

    device()
    for family in families():
        import_module(f"benchmarks.{family}.gpu").small()
    torch.cuda.synchronize()
    raise_pending()
    print("every kernel has run")


def copy_rate() -> float:
    """TB/s of a large copy on the device, bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target, clock = torch.empty_like(source), CudaClock()
    copy = clock.prepare(lambda: lambda: target.copy_(source))
    return round(2 * source.numel() / min(clock.seconds(copy.run, 5) for _ in range(5)) / 1e12, 3)


def bench(out: Path, budget: float) -> bool:
    """Our kernels of every family, then each family's peers in turns with ours; the file is written after each case.

    Returns:
        Whether every family could be measured, and none of our results was wrong.
    """
    until = time.monotonic() + budget
    found: dict[str, Any] = {"device": device(), "copy_tb_s": copy_rate(), "budget_s": budget, "in_time": True, "cases": [],
                             "failed": {}}
    tables: dict[tuple, dict[str, Any]] = {}
    for with_peers in (False, True):
        for name in families():
            family = family_of(name, "cuda")
            chosen = [peer for peer in family.peers if (peer == OURS or not is_ours(peer) if with_peers else is_ours(peer))]
            try:
                for case in run(replace(family, peers={peer: family.peers[peer] for peer in chosen}), budget=3, until=until):
                    table = tables.setdefault((name, case["name"], case["dtype"]), {"family": name, **case, "rows": []})
                    _merge(table["rows"], case["rows"])
                    found["cases"] = [*tables.values()]
                    out.write_text(json.dumps(found, indent=1))
                    for row in case["rows"]:
                        said = f"{1e3 * row['median_ms']:,.2f} us" if "median_ms" in row else next(iter([*row.values()][2:]))
                        print(f"{name:<20} {case['name']:>20} {case['dtype']:>9} {row['mode']:<16} {row['peer']:<52} {said}",
                              flush=True)
            except Exception as error:  # the other families are still measured
                found["failed"][name] = f"{type(error).__name__}: {error}"
                print(f"{name}: {found['failed'][name]}", flush=True)
    found["in_time"] = time.monotonic() <= until  # else cases or peers are missing
    out.write_text(json.dumps(found, indent=1))
    return not found["failed"]


def _merge(rows: list[dict[str, Any]], more: list[dict[str, Any]]) -> None:
    """Rows of peers measured later; one that is there and was timed stays where the later one was not."""
    for row in more:
        place = next((at for at, old in enumerate(rows) if (old["peer"], old["mode"]) == (row["peer"], row["mode"])), None)
        if place is None:
            rows.append(row)
        elif "median_ms" in row:
            rows[place] = row


def join(parts: Path, out: Path | None) -> None:
    """One JSON file: by default benchmarks/results/<device>/gpu.json."""
    from benchmarks.report import environment

    found: dict[str, Any] = {"environment": environment("graph_attention", "cuda"), "gpu": device()}
    tests = parts / "tests.xml"
    if tests.exists():
        suite = ElementTree.parse(tests).getroot().find("testsuite")
        if suite is not None:
            found["tests"] = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    found["sanitizer"] = {}
    for log in sorted(parts.glob("sanitizer-*.txt")):
        said = log.read_text(errors="replace")
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", said)
        found["sanitizer"][log.stem.removeprefix("sanitizer-")] = summary[-1] if summary else f"no summary: {said[-200:]}"
    resources = parts / "resources.json"
    if resources.exists():
        found["kernel_resources"] = json.loads(resources.read_text())
    measured = parts / "bench.json"
    found["benchmarks"] = json.loads(measured.read_text()) if measured.exists() else None
    if out is None:
        out = Path(__file__).parent / "results" / re.sub(r"[^a-z0-9]+", "-", found["gpu"].lower()).strip("-") / "gpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1))
    print(f"written: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("device", "small", "bench", "join"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", type=Path, default=Path("build/gpu"))
    parser.add_argument("--budget", type=float, default=240, help="seconds for all benchmarks")
    given = parser.parse_args()
    if given.step == "device":
        print(device())
    elif given.step == "small":
        small()
    elif given.step == "bench":
        sys.exit(not bench(given.out or given.parts / "bench.json", given.budget))
    else:
        join(given.parts, given.out)


if __name__ == "__main__":
    main()
