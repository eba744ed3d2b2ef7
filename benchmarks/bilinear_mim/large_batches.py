"""What large in-batch negatives change in training: python -m benchmarks.bilinear_mim.large_batches STORE

CASE aligns each dialogue's cognition with its own affection against the others of the batch (Eq. 9-12). A fused kernel makes
batches of thousands of pairs cheap; whether they help is a question of its own. This asks it on EmpatheticDialogues, with
retrieval from ATOMIC as knowledge.

One model a batch size and score, from the same random start and at the same learning rate (Adam), on the whole objective of phase
2. Smaller batches take as many steps as show them the same examples, up to a limit. Every few steps held-out dialogues are
scored: the coarse loss less its value at chance, always among 256 candidates, so that batch sizes compare; the share of
cognitions that rank their own affection first (chance 0.004); the share of saturated scores, |z| > 5; emotion accuracy (chance
0.031).

Writes large_batches.json, .md and .png; models that the JSON holds with the same settings are not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.report import environment
from case_fast.data import open_store
from case_fast.data.store import Store
from case_fast.files import write_text
from case_fast.models import CASE, CASEConfig

CANDIDATES = 256  # held-out dialogues that the coarse loss is measured among
SCORES = ("bilinear_sigmoid", "dot")


@torch.no_grad()
def held_out(model: CASE, batches: list[Any]) -> dict[str, float]:
    """Means over the batches, each of CANDIDATES dialogues."""
    model.eval()
    found: dict[str, list[float]] = {"coarse_above_chance": [], "own_first": [], "saturated": [], "emotion_accuracy": []}
    for batch in batches:
        out = model(batch)
        known = batch.case.cu_knowledge.diff() > 0  # the others have no cognition and are no pairs
        cognition, affection = out.r_cog[known], out.r_emo[known]
        projected = cognition if model.config.mim_score == "dot" else cognition @ model.w_coarse
        score = projected @ affection.T  # the sigmoid keeps the order
        own = score.diagonal()
        # a tie is a guess: where scores saturate or collapse, many are equal
        better, equal = (score > own[:, None]).sum(1), (score == own[:, None]).sum(1)
        found["coarse_above_chance"].append(float(out.losses["coarse"]) - 2 * math.log(len(own)))
        found["own_first"].append(float(((better == 0) / equal).mean()))
        if "coarse_saturated" in out.diagnostics:  # a dot product has no sigmoid to saturate
            found["saturated"].append(float(out.diagnostics["coarse_saturated"]))
        found["emotion_accuracy"].append(float((out.emotion_logits.argmax(1) == batch.emotion).float().mean()))
    model.train()
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def train(store: Store, config: CASEConfig, size: int, steps: int, rate: float, every: int, batches: list[Any], device: str,
          seed: int, console: Console) -> dict[str, Any]:
    """One model; a record every ``every`` steps."""
    torch.manual_seed(seed)
    model = CASE(config).to(device)
    model.set_phase("all")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate, betas=(0.9, 0.98), eps=1e-9, fused=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    records, started, measuring = [], time.monotonic(), 0.0
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            before = time.monotonic()
            records.append({"step": step, "examples": step * size, **held_out(model, batches)})
            measuring += time.monotonic() - before
            console.print(f"  {config.mim_score}, batch {size}, step {step} of {steps}: "
                          + ", ".join(f"{k} {v:.4g}" for k, v in records[-1].items() if k not in ("step", "examples")),
                          highlight=False)
        if step == steps:
            break
        while order.numel() < size:
            order = torch.cat([order, torch.randperm(store.size("train"), generator=generator)])
        chosen, order = order[:size], order[size:]
        out = model(store.batch("train", chosen.tolist()).to(device))
        if not math.isfinite(float(out.loss)):
            raise SystemExit(f"{config.mim_score}, batch {size}: the loss of step {step} is {float(out.loss)}")
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    taken = time.monotonic() - started - measuring
    return {"score": config.mim_score, "batch": size, "steps": steps, "seconds": taken, "records": records}


def plot(results: dict[str, Any], path: Path) -> None:
    """The curves of every run over its steps."""
    from matplotlib.figure import Figure

    runs, settings = results["runs"], results["settings"]
    rows = {"coarse_above_chance": f"coarse loss less chance,\n{CANDIDATES} candidates", "own_first": "own affection first",
            "emotion_accuracy": "emotion accuracy"}
    scores = list(dict.fromkeys(run["score"] for run in runs))
    figure = Figure(figsize=(6 * len(scores), 9), layout="constrained")
    axes = figure.subplots(len(rows), len(scores), squeeze=False)
    for column, score in enumerate(scores):
        for row, (field, label) in enumerate(rows.items()):
            axis = axes[row][column]
            for run in runs:
                if run["score"] == score:
                    axis.plot([r["step"] for r in run["records"]], [r[field] for r in run["records"]], marker=".",
                              label=f"batch {run['batch']}")
            axis.set(xlabel="steps", ylabel=label if column == 0 else "", title=score if row == 0 else "", xscale="symlog")
            if field == "coarse_above_chance":
                axis.set_yscale("symlog", linthresh=1e-4)
            elif field == "own_first":
                axis.axhline(1 / CANDIDATES, color="gray", linestyle=":")  # chance
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.suptitle(f"d = {settings['width']}, Adam {settings['rate']:g}, EmpatheticDialogues", fontsize=10)
    figure.savefig(path, dpi=110)


def table(runs: list[dict[str, Any]]) -> str:
    heads = ("score", "batch", "steps", "examples", "coarse loss less chance", "own affection first", "saturated",
             "emotion accuracy", "s a step")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for run in runs:
        for record in (run["records"][0], run["records"][len(run["records"]) // 2], run["records"][-1]):
            saturated = f"{record['saturated']:.2f}" if "saturated" in record else "none"
            lines.append(f"| {run['score']} | {run['batch']} | {record['step']} | {record['examples']:,} "
                         f"| {record['coarse_above_chance']:+.4f} | {record['own_first']:.4f} | {saturated} "
                         f"| {record['emotion_accuracy']:.3f} | {run['seconds'] / run['steps']:.2f} |")
    return "\n".join(lines)


def overview(results: dict[str, Any]) -> str:
    """The settings and the table."""
    return f"# Large in-batch negatives\n\n{json.dumps(results['settings'])}\n\n{table(results['runs'])}\n"


def markdown(results: dict[str, Any]) -> str:
    """The `overview`, what was asked, and the remarks that a stored run was given by hand."""
    asked = __doc__.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
    return "\n\n".join([overview(results).rstrip(), asked, *results.get("remarks", [])]) + "\n"


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bilinear_mim.large_batches", description=__doc__.splitlines()[0])
    parser.add_argument("store", help="folder that case-fast prepare made")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    parser.add_argument("--steps", type=int, default=60, help="of the largest batch; smaller ones take more, up to --most-steps")
    parser.add_argument("--most-steps", type=int, default=480)
    parser.add_argument("--width", type=int, default=100, help="d_model and ffn; 300 is the paper's")
    parser.add_argument("--rate", type=float, default=1e-4, help="Adam's learning rate")
    parser.add_argument("--valid", type=int, default=2, help=f"held-out batches of {CANDIDATES} dialogues")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    given = parser.parse_args()
    console, store = Console(), open_store(given.store)
    picked = torch.randperm(store.size("valid"), generator=torch.Generator().manual_seed(given.seed))
    batches = [store.batch("valid", part.tolist()).to(given.device) for part in picked.split(CANDIDATES)[: given.valid]]
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(given).items() if name not in ("out", "store", "scores", "batches")}
    settings["largest_batch"] = max(given.batches)
    earlier = given.out / "large_batches.json"
    before = json.loads(earlier.read_text()) if earlier.exists() else {}
    done = {(run["score"], run["batch"]): run for run in before.get("runs", ()) if before["settings"] == settings}
    runs = []
    for score in given.scores:
        for size in sorted(given.batches):
            config = CASEConfig(len(store.featurizer.vocabulary), d_model=given.width, ffn=given.width, mim_score=score,
                                seed=given.seed)
            steps = min(given.most_steps, given.steps * max(given.batches) // size)
            runs.append(done.get((score, size)) or train(store, config, size, steps, given.rate, max(1, steps // 8), batches,
                                                         given.device, given.seed, console))
            found = {"environment": environment("bilinear_mim"), "settings": settings, "runs": runs}
            write_text(given.out / "large_batches.json", json.dumps(found, indent=1))
            write_text(given.out / "large_batches.md", overview(found))
            plot(found, given.out / "large_batches.png")
    console.print(table(runs), highlight=False)


if __name__ == "__main__":
    main()
