"""What `bench step` measured, as tables and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import _number, _row
from benchmarks.step.parts import PARTS
from benchmarks.step.worker import COMPILED, OURS, PLAIN

# Not measured here: the authors' code on two cores of an AMD EPYC, 16 dialogues, 8 531 words, 2026-11-26.
RELEASED = {"phase": "all", "ms": (3220.0, 3520.0), "bytes": 4.9e9}
GROWTH = {"batch": "dialogues a batch", "context": "length of the contexts", "inferences": "most inferences of a relation",
          "vocabulary": "words of the vocabulary"}


def _timed(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["form"]: row for row in case["rows"] if "median_ms" in row}


def summary(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Our median and the fastest other form's; none where only one was measured."""
    timed = _timed(case)
    others = [row for form, row in timed.items() if form != OURS]
    if OURS not in timed or not others:
        return []
    best, ours = min(others, key=lambda row: row["median_ms"]), timed[OURS]["median_ms"]
    return [{"case": f"{case['part']} {case['value']}", "mode": "step", "ours_ms": ours, "best_peer": best["form"],
             "best_peer_ms": best["median_ms"], "ratio": best["median_ms"] / ours, "in_yardsticks": {}}]


def overview(results: dict[str, Any]) -> str:
    """One line a point."""
    return "\n".join([*_head(results), "", *_lines(results["summary"])]) + "\n"


def _lines(summaries: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield _row(["case", f"{OURS}, ms", "fastest other, ms", "ratio", "which"])
    yield "|---" * 5 + "|"
    for line in summaries:
        yield _row([line["case"], _number(line["ours_ms"]), _number(line["best_peer_ms"]), f"**{line['ratio']:.1f}**",
                    line["best_peer"]])


def _head(results: dict[str, Any]) -> list[str]:
    found = results["environment"]
    machine = found["machine"]
    return [
        "# step: whole training steps on real dialogues",
        "",
        f"{found['date']}, commit {found['commit']}; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}; load before the run {found['load_before']}; "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items()) + ".",
        "",
        "A step is forward, backward, Adam and clearing the gradients, on batches made before; medians over real dialogues, "
        "every form in a process of its own with its own best number of threads, from the same weights on the same dialogues. "
        "Losses and gradients were compared without dropout before anything was timed. The plain form is the same model, padded "
        "and dense; under torch.compile its batches are padded to one shape and it runs without dropout.",
    ]


def markdown(results: dict[str, Any]) -> str:
    cases = results["cases"]
    lines = [*_head(results), "", *_lines(results["summary"])]
    for case in cases:
        if case["part"] == "step":
            lines += ["", f"## {case['value']}: {case['choice']['size']} dialogues, {case['choice']['words']:,} words", "",
                      *_forms(case)]
    for case in cases:
        if case["part"] == "parts":
            lines += ["", f"## {case['value']}, by part", "", *_parts(case, results)]
    for part, what in GROWTH.items():
        grown = [case for case in cases if case["part"] == part]
        if grown:
            lines += ["", f"## Growth with {what}", "", *_growth(grown, what)]
    return "\n".join(lines) + "\n"


def _forms(case: dict[str, Any]) -> Iterator[str]:
    """A row a form, and the released code's figure where it belongs."""
    timed, dialogues, words = _timed(case), case["choice"]["size"], case["words"]
    yield _row(["form", "threads", "median, ms", "quartiles", f"times {OURS}", "forward, backward, Adam", "dialogues/s",
                "tokens/s", "peak MB", "batch assembly, ms", "compiled in, s"])
    yield "|---" * 11 + "|"
    for row in case["rows"]:
        why = row.get("left_out") or (f"failed: {row['failed']}" if "failed" in row else "")
        if why:
            yield _row([row["form"], "", why, *[""] * 8])
            continue
        low, high = (_number(x) for x in row["quartiles_ms"])
        seconds = row["median_ms"] / 1e3
        yield _row([
            row["form"], str(row["threads"]), _number(row["median_ms"]), f"{low} .. {high}",
            "" if row["form"] == OURS else f"{row['median_ms'] / timed[OURS]['median_ms']:.1f}",
            " + ".join(_number(row[name]) for name in ("forward_ms", "backward_ms", "adam_ms")), _number(dialogues / seconds),
            _number(words / seconds), _number(row["peak_bytes"] / 1e6),
            _number(row["assembly_ms"]) if "assembly_ms" in row else "", _number(row["compile_s"]) if "compile_s" in row else "",
        ])
    if case["phase"] == RELEASED["phase"] and OURS in timed:
        low, high = RELEASED["ms"]
        ours = timed[OURS]["median_ms"]
        yield _row(["the released code (cited, not measured here)", "2", f"{low:,.0f} .. {high:,.0f}", "",
                    f"{low / ours:.0f} .. {high / ours:.0f}", "", "", "", _number(RELEASED["bytes"] / 1e6), "", ""])


def _parts(case: dict[str, Any], results: dict[str, Any]) -> Iterator[str]:
    alike = [other for other in results["cases"] if other["part"] == "step" and other["phase"] == case["phase"]]
    assembly = next((row["assembly_ms"] for other in alike for row in other["rows"] if row["form"] == OURS), None)
    yield (f"{case['ms']:.1f} ms a step; {case['recorded_ms']:.1f} ms under torch's profiler, whose time these are "
           f"({case['steps']} steps).")
    yield ""
    yield _row(["part", "forward, ms", "backward, ms", "share of the step"])
    yield "|---" * 4 + "|"
    for part, ms in case["parts"].items():
        share = (ms["forward_ms"] + ms["backward_ms"]) / case["recorded_ms"]
        yield _row([part, f"{ms['forward_ms']:.1f}", f"{ms['backward_ms']:.1f}", f"{100 * share:.0f} %"])
    yield _row(["Adam", f"{case['adam_ms']:.1f}", "", f"{100 * case['adam_ms'] / case['recorded_ms']:.0f} %"])
    if assembly is not None:
        yield _row(["batch assembly (beside the step)", f"{assembly:.1f}", "", ""])


def _growth(cases: Sequence[dict[str, Any]], what: str) -> Iterator[str]:
    yield _row([what, "tokens a batch", f"{OURS}, ms", "plain, eager, ms", "ratio", "dialogues/s", "tokens/s",
                f"peak MB, {OURS}", "peak MB, plain"])
    yield "|---" * 9 + "|"
    for case in cases:
        timed = _timed(case)
        ours, plain = timed[OURS], timed.get(PLAIN)
        left_out = next((row.get("left_out") or row.get("failed", "") for row in case["rows"] if row["form"] == PLAIN), "")
        seconds = ours["median_ms"] / 1e3
        beside = [_number(plain["median_ms"]), f"{plain['median_ms'] / ours['median_ms']:.1f}"] if plain else [left_out, ""]
        yield _row([
            case["value"], _number(case["words"]), _number(ours["median_ms"]), *beside,
            _number(case["choice"]["size"] / seconds), _number(case["words"] / seconds), _number(ours["peak_bytes"] / 1e6),
            _number(plain["peak_bytes"] / 1e6) if plain else "",
        ])


# ------------------------------------------------------------------------------------------------------------------- picture


def plot(results: dict[str, Any], path: Path) -> None:
    """Steps of all forms, our step by part, and the four growths."""
    from matplotlib.figure import Figure

    cases, found = results["cases"], results["environment"]
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    steps = [case for case in cases if case["part"] == "step"]
    for place, form in enumerate((OURS, PLAIN, COMPILED)):
        bars = [(i + (place - 1) * 0.27, _timed(case)[form]["median_ms"]) for i, case in enumerate(steps) if form in _timed(case)]
        if bars:
            axes[0].bar(*zip(*bars, strict=True), width=0.25, label=form, color=("black", "C0", "C1")[place])
    if any(case["phase"] == RELEASED["phase"] for case in steps):
        axes[0].axhline(RELEASED["ms"][0], color="C3", linestyle="--", label="released code, phase 2 (cited)")
    axes[0].set(xticks=range(len(steps)), xticklabels=[case["value"] for case in steps], ylabel="ms a step", title="step")
    for i, case in enumerate(case for case in cases if case["part"] == "parts"):
        base = 0.0
        for place, part in enumerate((*PARTS, "Adam")):
            ms = case["adam_ms"] if part == "Adam" else sum(case["parts"][part].values())
            axes[1].bar(i, ms, 0.6, base, color=f"C{place}", label=part if i == 0 else None)
            base += ms
    names = [case["value"] for case in cases if case["part"] == "parts"]
    axes[1].set(xticks=range(len(names)), xticklabels=names, ylabel="ms", title=f"{OURS}, by part")
    for axis, (part, what) in zip(axes[2:], GROWTH.items(), strict=True):
        grown = [case for case in cases if case["part"] == part]
        for form, color in ((OURS, "black"), (PLAIN, "C0")):
            timed = [(i, _timed(case)[form]["median_ms"]) for i, case in enumerate(grown) if form in _timed(case)]
            if timed:
                axis.plot(*zip(*timed, strict=True), color=color, marker="o", label=form)
        axis.set(xticks=range(len(grown)), xticklabels=[case["value"] for case in grown], xlabel=what, ylabel="ms a step",
                 title=f"growth: {part}")
    for axis in axes:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7)
        if axis is not axes[1] and (axis.lines or axis.patches):
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    figure.suptitle(f"step: {found['machine']['cpu']}, {found['machine']['cores']} cores, torch {found['versions']['torch']}, "
                    f"commit {found['commit'].split()[0]}, {found['date'][:10]}", fontsize=10)
    figure.savefig(path, dpi=110)
