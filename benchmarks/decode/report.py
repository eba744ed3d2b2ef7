"""What `bench decode` found: JSON, and of that a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.measure import OURS
from case_fast.files import write_text


def _ours(case: dict[str, Any], strategy: str) -> dict[str, Any]:
    return next(row for row in case["rows"] if row["form"] == OURS and row["strategy"] == strategy)


def _strategies(case: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["strategy"] for row in case["rows"]))


def lines(results: dict[str, Any]) -> list[str]:
    """One for each batch size and strategy."""
    found = []
    for case in results["cases"]:
        for strategy in _strategies(case):
            own = _ours(case, strategy)
            others = [row for row in case["rows"] if row["strategy"] == strategy and row is not own and "seconds" in row]
            against = "; ".join(f"{row['seconds'] / own['seconds']:.1f} x faster than {row['form']}" for row in others)
            found.append(f"batches of {case['batch_size']}, {strategy}: {own['replies_a_second']:.1f} replies a second, "
                         f"{own['words_a_second']:,.0f} words; {against}")
    return found


def overview(results: dict[str, Any]) -> str:
    """The machine, and a line for each batch size and strategy."""
    found = results["environment"]
    machine = found["machine"]
    runs_on = f"{machine['gpu']}, {machine['cpu']}" if "gpu" in machine else machine["cpu"]
    head = (f"{found['date']}, commit {found['commit']}; {runs_on}, {machine['cores']} cores; load before the run "
            f"{found['load_before']}; torch {found['versions']['torch']}; {results['model']['parameters']:,} parameters, "
            f"{results['model']['config']['vocab_size']:,} words.")
    quick = ["**A quick run: it shows that all works, not how fast it is.**", ""] if results.get("quick") else []
    said = [f"- {line}" for line in lines(results)]
    return "\n".join(["# decode: replies to real dialogues", "", head, "", *quick, *said]) + "\n"


def markdown(results: dict[str, Any]) -> str:
    """The `overview`, and a table of all forms for each batch size."""
    text = [overview(results), "Decoding alone, from the same reading of the contexts; words count the EOS. Each form's replies "
            "were compared with ours before it was timed, at its own best number of threads; medians of rounds in turns.", ""]
    for case in results["cases"]:
        text += [f"## {case['dialogues']} dialogues in batches of {case['batch_size']}", "",
                 "| strategy | form | threads | seconds | quartiles | replies / s | words / s | times case_fast | differ |",
                 "|---|---|---|---|---|---|---|---|---|"]
        for row in case["rows"]:
            own = _ours(case, row["strategy"])
            if "seconds" not in row:
                cells = ["", row.get("refused") or row.get("failed") or "", *[""] * 5]
            else:
                spread = " .. ".join(f"{x:.3g}" for x in row["quartiles_s"]) if row["rounds"] > 1 else "one call"
                cells = [row["threads"], f"{row['seconds']:.3g}", spread, f"{row['replies_a_second']:.1f}",
                         f"{row['words_a_second']:,.0f}", f"{row['seconds'] / own['seconds']:.1f}", row["different"]]
            text.append(f"| {row['strategy']} | {row['form']} | {' | '.join(map(str, cells))} |")
        means = ", ".join(f"{strategy} {_ours(case, strategy)['mean_words']:.1f} words a reply, "
                          f"{_ours(case, strategy)['distinct']} distinct" for strategy in _strategies(case))
        busy = "; ".join(f"{cores:.2f} in {name}" for name, cores in case["cores_busy_with_others"].items() if cores is not None)
        text += ["", f"{means}. Cores that others kept busy meanwhile: {busy or 'unknown'}.", ""]
    return "\n".join(text)


def plot(results: dict[str, Any], path: Path) -> None:
    """Replies a second of each form: a panel for each strategy, a group of bars for each batch size."""
    from matplotlib.figure import Figure

    cases = results["cases"]
    strategies = _strategies(cases[0])
    forms = list(dict.fromkeys(row["form"] for case in cases for row in case["rows"] if "seconds" in row))
    figure = Figure(figsize=(5 * len(strategies), 4), layout="constrained")
    for axis, strategy in zip(figure.subplots(1, len(strategies), squeeze=False)[0], strategies, strict=True):
        for place, form in enumerate(forms):
            rates = [next((row["replies_a_second"] for row in case["rows"] if (row["form"], row["strategy"]) == (form, strategy)
                           and "seconds" in row), 0.0) for case in cases]
            at = [number + 0.8 * place / len(forms) for number in range(len(cases))]
            bars = axis.bar(at, rates, 0.75 / len(forms), label=form, color="black" if form == OURS else f"C{place - 1}")
            axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.set(title=strategy, ylabel="replies a second", xlabel="dialogues a batch")
        axis.set_xticks([number + 0.3 for number in range(len(cases))], [str(case["batch_size"]) for case in cases])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def write(results: dict[str, Any], out: Path) -> list[Path]:
    """decode.json, .md and .png in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"decode.{ending}" for ending in ("json", "md", "png")]
    write_text(paths[0], json.dumps(results, indent=1) + "\n")
    write_text(paths[1], markdown(results))
    plot(results, paths[2])
    return paths
