"""What benchmarks/gpu.sh has found, told from its record: tables in Markdown, and a picture. `case-fast bench --show gpu`.

A record may be that of a run that was killed or of stages that failed: what is there is told, and what is not is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
BOUNDS = {"copy_tb_s": "TB/s copied", "float32_tflop_s": "TFLOP/s float32", "tf32_tflop_s": "TFLOP/s TF32",
          "bfloat16_tflop_s": "TFLOP/s bfloat16", "us_a_launch": "us a launch", "us_a_graph_node": "us a node of a graph"}


# ------------------------------------------------------------------------------------------------------------------ what is there


def parts(record: Record, stage: str) -> Iterator[tuple[str, Record]]:
    """(part, what it has written down) of each part of a stage that has written something."""
    for entry in record["stages"]:
        if entry["name"] == stage:
            yield from ((part["name"], part["result"]) for part in entry["parts"]
                        if part["result"] and "rehearsed" not in part["result"])


def only(record: Record, stage: str) -> Record:
    return next((found for _, found in parts(record, stage)), {})


def cases(record: Record, *stages: str) -> list[Record]:
    return [case for stage in stages for _, found in parts(record, stage) for case in found.get("cases", [])]


def roofline(case: Record, mode: str, ms: float, bounds: Record) -> tuple[float, str] | None:
    """Share of what this GPU itself did: the least time for the operations or for the bytes of a case, and which of the two
    binds. None where either is not known."""
    needs, rate, copy = case.get("needs", {}).get(mode), bounds.get(f"{case['dtype']}_tflop_s"), bounds.get("copy_tb_s")
    if not needs or not rate or not copy:
        return None
    least = {"flop": needs["flop"] / rate / 1e9, "bytes": needs["bytes"] / copy / 1e9}
    binds = max(least, key=least.__getitem__)
    return least[binds] / ms, binds


# ---------------------------------------------------------------------------------------------------------------------- Markdown


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))] if rows else []


def _safe(text: str) -> str:
    """In a cell of a table."""
    return " ".join(text.replace("|", "/").split())


def overview(record: Record) -> str:
    """The stages, the device, tests, sanitizers, training, and a line a case: ours, the fastest peer, share of the roofline."""
    from benchmarks.report import _number

    bounds = only(record, "device")
    versions = bounds.get("environment", {}).get("versions", {})
    commit = bounds.get("environment", {}).get("commit", "unknown")
    lines = [f"# {record['gpu']}: what the kernels do there", ""]
    if record["dry"]:
        lines += ["**A dry run on a CPU: it shows that all stages work, and says nothing of a GPU.**", ""]
    lines += [f"{record['begun']}, commit {commit}; driver {bounds.get('nvidia_smi', {}).get('driver_version', 'unknown')}; "
              + ", ".join(f"{name} {number}" for name, number in versions.items())
              + f". {record['seconds']:.0f} s in all{'' if record['finished'] else ', when the run was ended from outside'}."]
    lines += _table(["stage", "state", "seconds", "of", "what was wrong"], [
        [entry["name"], entry["state"], f"{entry['seconds']:.0f}", f"{entry['limit']:.0f}", _safe(_wrong(entry))]
        for entry in record["stages"]])
    missing = [entry["name"] for entry in record["stages"] if entry["state"] == "waiting"]
    lines += ["", f"Never begun: {', '.join(missing)}."] if missing else []
    measured = [[text, _number(bounds[name])] for name, text in BOUNDS.items() if name in bounds]
    lines += _table(["of the device", "measured"], measured)
    lines += _tests(record) + _sanitizers(record) + _training(record) + _cases(record, bounds)
    return "\n".join(lines) + "\n"


def _wrong(entry: Record) -> str:
    said = [entry.get("why", "")] + [f"{part['name']} {part['state']}: {part['why']}".strip()[:300] for part in entry["parts"]
                                     if part["why"]]
    return "; ".join(text for text in said if text)


def _tests(record: Record) -> list[str]:
    found = [*parts(record, "tests")]
    rows = [[name, *(str(of[kind]) for kind in ("passed", "failed", "skipped")), str(of["collected"] - of["begun"])]
            for name, of in found]
    lines = _table(["tests of", "passed", "failed", "skipped", "not begun"], rows)
    failing = [f"- `{test}`: {_safe(why)}" for _, of in found for test, why in of["failing"].items()]
    failing += [f"- `{of['running']}`: ran when the time was over" for _, of in found if of["running"]]
    return lines + (["", *failing] if failing else [])


def _sanitizers(record: Record) -> list[str]:
    rows = [[check, "" if of["errors"] is None else str(of["errors"]), _safe(of["summary"] or "no summary"),
             ", ".join(of.get("ran", [])), ", ".join(f"{kernel} {times}" for kernel, times in of["kernels"].items())]
            for check, of in parts(record, "sanitizers")]
    return _table(["sanitizer", "findings", "its summary", "families run", "lines that name a kernel"], rows)


def _training(record: Record) -> list[str]:
    rows = []
    for phase, of in only(record, "training").get("phases", {}).items():
        for form in (of, of.get("eager")):
            if form:
                rows.append([str(phase), *(_shown(form.get(name)) for name in (
                    "form", "ms", "launches", "busy", "losses", "cpu_losses"))])
    return _table(["training, phase", "form", "ms a step", "launches", "share of GPU busy", "first losses", "on the CPU"], rows)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else _safe(str(value))


def _cases(record: Record, bounds: Record) -> list[str]:
    """Ratios are within the group of peers that was measured in turns with ours; the best of the groups is told."""
    from benchmarks.measure import OURS, SLACK
    from benchmarks.report import _called, _number, in_yardsticks, summary

    best: dict[tuple[str, str, str], Record] = {}
    for case in cases(record, "peers"):
        for line in summary(case):
            place = (case["family"], line["case"], line["mode"])
            if place not in best or line["ratio"] < best[place]["ratio"]:
                best[place] = line
    rows, seen = [], set()
    for case in cases(record, "ours", "peers"):
        for row in case["rows"]:
            place = (case["family"], _called(case), row["mode"])
            if row["peer"] != OURS or "median_ms" not in row or place in seen:
                continue
            seen.add(place)
            share, peer = roofline(case, row["mode"], row["median_ms"], bounds), best.get(place)
            rulers = in_yardsticks(case, row["mode"]).values()
            rows.append([*place, _number(1e3 * row["median_ms"]),
                         *([f"**{peer['ratio']:.2f}**", peer["best_peer"]] if peer else ["", ""]),
                         f"{100 * share[0]:.0f} % ({share[1]})" if share else "",
                         ", ".join(f"{times:.2f}" for times in rulers), f"{row['error_over_limit']:.2f}"])
    heads = ["family", "case", "mode", f"{OURS}, us", f"peer / {OURS}", "the best peer", "of the roofline", "in bare products",
             "error / limit"]
    table = _table(heads, rows)
    said = ["", f"Every result was checked against float64 before it was timed: its error, in units of the limit ({SLACK} "
            "times plain torch's own error in that dtype, plus 1e-5 of the largest value), stands last. Share of the roofline: "
            "the least time for the operations or the bytes of the case (which, stands beside it) at the rates measured above."]
    failed = [f"- {stage}, {name}: {case}: {_safe(why)}" for stage in ("ours", "peers", "variants")
              for name, found in parts(record, stage) for case, why in found.get("failed", {}).items()]
    return [*(said if table else []), *table, *(["", *failed] if failed else [])]


def markdown(record: Record) -> str:
    """The `overview`, and a table of every row: peers, and variants of ours."""
    from benchmarks.report import tables

    lines = []
    for stage in ("ours", "peers", "variants"):
        for case in cases(record, stage):
            lines += ["", f"## {stage}: {case['family']}, {case['name']}, {case['dtype']}: {case['what']}"]
            lines += tables(case, "timed as")
    return overview(record) + "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------------------- picture


def plot(record: Record, path: Path) -> None:
    """Above, the ratio of the best peer to ours in each case and mode; below, our share of the roofline."""
    from matplotlib.figure import Figure

    from benchmarks.measure import OURS
    from benchmarks.report import _called, summary

    bounds = only(record, "device")
    shares = {(case["family"], _called(case), row["mode"]): roofline(case, row["mode"], row["median_ms"], bounds)
              for case in cases(record, "ours", "peers") for row in case["rows"] if row["peer"] == OURS and "median_ms" in row}
    ratios: dict[tuple[str, str, str], float] = {}
    for case in cases(record, "peers"):
        for line in summary(case):
            place = (case["family"], line["case"], line["mode"])
            ratios[place] = min(line["ratio"], ratios.get(place, float("inf")))
    places = sorted({*shares, *ratios})
    figure = Figure(figsize=(max(6.0, 0.22 * len(places) + 3), 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    names = sorted({family for family, *_ in places})
    for at, place in enumerate(places):
        look = {"color": f"C{names.index(place[0])}"}
        if place in ratios:
            above.bar(at, ratios[place], **look)
        if shares.get(place):
            below.bar(at, shares[place][0], **look)
    above.axhline(1, color="black", linewidth=1)
    above.set(ylabel="time of the fastest peer / ours", title=f"{record['gpu']}, {record['begun'][:10]}"
              + (", a dry run: no result" if record["dry"] else ""))
    if ratios:
        above.set_yscale("log")
    below.set(ylabel="share of the roofline", ylim=(0, 1))
    below.set_xticks(range(len(places)), [f"{name}, {case}, {mode}" for name, case, mode in places], rotation=90, fontsize=6)
    figure.savefig(path, dpi=110)
