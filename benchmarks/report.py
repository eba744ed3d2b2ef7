"""What a run measured, with all that is needed to judge it: JSON, which is kept, and of that Markdown tables and a picture."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory
from benchmarks.measure import LAUNCHED, OURS, SLACK, is_ours
from case_fast.devices import processor_name
from case_fast.files import write_text

_ROOT = Path(__file__).parents[1]
_FLOOR = 0.3  # MB; below, the resident set says nothing


def environment(family: str, device: str = "cpu") -> dict[str, Any]:
    """The machine, the versions, the commit, the moment, and how busy the machine was before the run."""
    from case_fast import __version__
    from case_fast.ops import backend_name, native_report

    found = {"case_fast": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "torch_geometric"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    machine = {"cpu": processor_name(), "cores": os.cpu_count(), "memory_gib": _memory_gib(),
               "system": f"{platform.system()} {platform.machine()}"}
    if device == "cuda":
        machine["gpu"], found["cuda"] = torch.cuda.get_device_name(), torch.version.cuda
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": machine,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": found,
        "backend": backend_name(family, device),
        "native": native_report(),
    }


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "case_fast", "csrc", "benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


# ------------------------------------------------------------------------------------------------------------------- numbers


def summary(case: dict[str, Any]) -> list[dict[str, Any]]:
    """For each mode: our median, the fastest peer that was not refused, how much longer it takes; ours in yardsticks. A peer that
    was launched call by call is compared with ours launched so."""
    lines = []
    for mode in case["modes"]:
        timed = {row["peer"]: row for row in case["rows"] if row["mode"] == mode and "median_ms" in row}
        rivals = [row for name, row in timed.items() if not is_ours(name) and "yardstick" not in row]
        if OURS not in timed or not rivals:
            continue
        best = min(rivals, key=lambda row: row["median_ms"] / _beside(row, timed)["median_ms"])
        ours_ms = _beside(best, timed)["median_ms"]
        lines.append({"case": _called(case), "mode": mode, "ours_ms": ours_ms, "best_peer": best["peer"],
                      "best_peer_ms": best["median_ms"], "ratio": best["median_ms"] / ours_ms,
                      "in_yardsticks": in_yardsticks(case, mode)})
    return lines


def in_yardsticks(case: dict[str, Any], mode: str) -> dict[str, float]:
    """Our median in units of each yardstick's."""
    timed = [row for row in case["rows"] if row["mode"] == mode and "median_ms" in row]
    return {row["peer"]: mine["median_ms"] / row["median_ms"] for mine in timed if mine["peer"] == OURS
            for row in timed if "yardstick" in row}


def _beside(row: dict[str, Any], timed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The row of ours that a peer's is compared with."""
    return timed[LAUNCHED] if row.get("launched") and LAUNCHED in timed else timed[OURS]


def _called(case: dict[str, Any]) -> str:
    return case["name"] if case["dtype"] == "float32" else f"{case['name']}, {case['dtype']}"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _megabytes(taken: int | None) -> str:
    if taken is None:
        return ""
    return f"< {_FLOOR}" if taken < _FLOOR * 1e6 else _number(taken / 1e6)


def _cells(row: dict[str, Any], timed: dict[str, dict[str, Any]]) -> list[str]:
    """threads, or how a GPU was timed; median, quartiles, times ours, extra memory."""
    for reason, said in (("left_out", ""), ("refused", "wrong: "), ("failed", "failed: ")):
        if reason in row:
            return ["", said + row[reason], "", "", ""]
    low, high = (_number(x) for x in row["quartiles_ms"])
    part = f" ({_number(row['part']['ms'])} of it {row['part']['name']})" if "part" in row else ""
    none = row["peer"] in (OURS, LAUNCHED) or OURS not in timed
    times = "" if none else f"{row['median_ms'] / _beside(row, timed)['median_ms']:.1f}"
    extra = _megabytes(row.get("extra_bytes"))
    return [row.get("how", str(row["threads"])), _number(row["median_ms"]) + part, f"{low} .. {high}", times, extra]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def overview(results: dict[str, Any]) -> str:
    """Of what `write` wrote: one table of all cases."""
    found, cases = results["environment"], results["cases"]
    machine, versions = found["machine"], found["versions"]
    on_gpu = "gpu" in machine
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    how = ("Times are of one replay of a CUDA graph, from events around many; what cannot be captured is launched, and says so"
           if on_gpu else "Each peer runs with its own best number of threads")
    lines = [
        f"# {results['benchmark']}: {OURS} and its peers",
        "",
        f"{found['date']}, commit {found['commit']}; {machine['gpu'] + ', ' if on_gpu else ''}{machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}; load before the run "
        f"{found['load_before']}; backend {found['backend']}"
        f"{' (' + found['native']['simd'] + ')' if 'simd' in found['native'] else ''}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ".",
        "",
        f"Every result (output and gradients) was checked against float64 before it was timed: off by at most {SLACK} times what "
        f"plain torch is in {' or '.join(dtypes)}, plus 1e-5 of the largest value. "
        f"{f'All {dtypes[0]}. ' if len(dtypes) == 1 else ''}{how}. Medians of rounds in turns, with quartiles; ratios are of "
        f"this run alone. Extra memory: {results['memory']}.",
        "",
        *(["**A quick run: it shows that all works, not how fast it is.**", ""] if found.get("quick") else []),
    ]
    summaries = [line for case in cases for line in summary(case)]
    yardsticks = list(dict.fromkeys(name for line in summaries for name in line["in_yardsticks"]))
    heads = ["case", "", f"{OURS}, ms", "best peer, ms", f"peer / {OURS}", "the best peer",
             *(f"{OURS} / {name}" for name in yardsticks)]
    lines += [_row(heads), "|---" * len(heads) + "|"]
    for line in summaries:
        times = [line["in_yardsticks"].get(name) for name in yardsticks]
        lines.append(_row([line["case"], line["mode"], _number(line["ours_ms"]), _number(line["best_peer_ms"]),
                           f"**{line['ratio']:.1f}**", line["best_peer"],
                           *("" if x is None else f"{x:.2f}" for x in times)]))
    return "\n".join(lines) + "\n"


def markdown(results: dict[str, Any]) -> str:
    """The `overview`, and a table of all peers for each case and mode."""
    timed = "timed as" if "gpu" in results["environment"]["machine"] else "threads"
    lines = []
    for case in results["cases"]:
        lines += ["", f"## {_called(case)}: {case['what']}", *tables(case, timed)]
    return overview(results) + "\n".join(lines) + "\n"


def tables(case: dict[str, Any], timed: str) -> list[str]:
    """The shape of a case, and for each mode a table of all peers; ``timed`` heads the column of threads, or how it was timed."""
    lines = ["", ", ".join(f"{k} = {n:,}" for k, n in case["shape"].items())]
    for mode in case["modes"]:
        rows = [row for row in case["rows"] if row["mode"] == mode]
        own = {row["peer"]: row for row in rows if row["peer"] in (OURS, LAUNCHED) and "median_ms" in row}
        others = case["cores_busy_with_others"][mode]
        if others is not None:
            lines += ["", f"Meanwhile others kept {others:.2f} cores busy."]
        lines += ["", _row([mode, timed, "median, ms", "quartiles", f"times {OURS}", "extra MB"]), "|---" * 6 + "|"]
        lines += [_row([f"*{row['peer']}*" if "yardstick" in row else row["peer"], *_cells(row, own)]) for row in rows]
    return lines


# ------------------------------------------------------------------------------------------------------------------- picture


def plot(results: dict[str, Any], path: Path) -> None:
    """Time and extra memory over the size of the case; a line for each peer, a row of panels for each dtype."""
    from matplotlib.figure import Figure

    found, cases = results["environment"], results["cases"]
    placed = sorted((case for case in cases if case["size"] is not None), key=lambda case: case["size"])
    modes = list(dict.fromkeys(mode for case in placed or cases for mode in case["modes"]))
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    panels = [*((mode, "median_ms", 1.0, "ms") for mode in modes), (modes[-1], "extra_bytes", 1e6, "extra MB")]
    rows = {(row["peer"], row["mode"], case["dtype"], case["size"]): row for case in placed for row in case["rows"]}
    timed = dict.fromkeys(peer for (peer, *_), row in rows.items() if "median_ms" in row)
    peers = sorted(timed, key=lambda peer: peer != OURS)  # ours first
    yardsticks = list(dict.fromkeys(peer for (peer, *_), row in rows.items() if "yardstick" in row))
    figure = Figure(figsize=(4 * len(panels), 1.2 + 4 * len(dtypes)), layout="constrained")
    axes = figure.subplots(len(dtypes), len(panels), squeeze=False)
    for dtype, line in zip(dtypes, axes, strict=True):
        for axis, (mode, field, unit, label) in zip(line, panels, strict=True):
            for place, peer in enumerate(peers):
                points = [(size, row[field] / unit) for (*of, size), row in rows.items()
                          if of == [peer, mode, dtype] and row.get(field) is not None]
                if field == "extra_bytes":
                    points = [(x, max(y, _FLOOR)) for x, y in points]
                if peer in yardsticks:
                    look = {"color": "black", "linestyle": ("--", ":")[yardsticks.index(peer) % 2], "linewidth": 1.2}
                elif peer == OURS:
                    look = {"color": "black", "linewidth": 2.5, "zorder": 3, "marker": "o"}
                else:
                    look = {"color": f"C{(place - 1) % 10}", "linewidth": 1.2, "marker": "s^vDPX*<>"[(place - 1) % 9]}
                axis.plot(*zip(*points, strict=True) if points else ((), ()), label=peer, markersize=5, **look)
            title = f"{mode}, {label}" if len(dtypes) == 1 else f"{mode}, {dtype}, {label}"
            axis.set(xlabel=cases[0]["axis"], ylabel=label, title=title)
            if any(line.get_xdata().size for line in axis.lines):  # without a point there is no log scale
                axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    machine = found["machine"]
    runs_on = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    figure.suptitle(f"{results['benchmark']}: {runs_on}, torch {found['versions']['torch']}, "
                    f"commit {found['commit'].split()[0]}, {found['date'][:10]}", fontsize=10)
    figure.savefig(path, dpi=110)


def write(family: str, found: dict[str, Any], cases: list[dict[str, Any]], out: Path) -> list[Path]:
    """OUT/FAMILY.json, .md and .png; ``found`` is the `environment` and whatever else the run says of itself."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{family}.{ending}" for ending in ("json", "md", "png")]
    results = {"benchmark": family, "environment": found, "memory": memory.HOW["cuda" if "gpu" in found["machine"] else "cpu"],
               "cases": cases, "summary": [line for case in cases for line in summary(case)]}
    write_text(paths[0], json.dumps(results, indent=1) + "\n")
    write_text(paths[1], markdown(results))
    plot(results, paths[2])
    return paths
