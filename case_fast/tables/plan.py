"""The runs that a table is made of: which there have to be, which of them are finished, and carrying out those that are not.

A run belongs to a table by a digest of its settings and its store, not by its name: what was trained before is used, and what
differs in anything that decides its numbers is another run.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from case_fast.data import Store
from case_fast.errors import CheckpointError, ConfigError, Interrupted
from case_fast.evaluation import Evaluation
from case_fast.files import write_json
from case_fast.models import MODELS, model_class, title_of
from case_fast.runs import Record, Run, lookup
from case_fast.training import TrainConfig, preset
from case_fast.training.config import ADJUSTABLE
from case_fast.training.process import StopRequest

# What may be otherwise in a run of a table: all that changes no number; max_steps and cooldown decide how it was trained.
FREE = set(ADJUSTABLE) - {"max_steps", "cooldown"}


@dataclass(frozen=True)
class Row:
    """A line of a table: a model, its recipe and the ablation carried out on it ("": none)."""

    kind: str
    recipe: str
    ablation: str = ""

    @property
    def name(self) -> str:
        return self.ablation or title_of(self.kind)


def rows_of(table: int, recipes: Sequence[str] = (), models: Sequence[str] = ()) -> list[Row]:
    """The rows of Table 1 (every model) or 2 (CASE and its ablations).

    Args:
        recipes: presets by name; a model that has none of a name is trained by its first. Default: each model's first.
        models: of Table 1, only these; CASE, which all are compared with, is always there.

    Raises:
        ConfigError: no such table, model or recipe.
    """
    if table == 2:
        return [Row("case", first_preset("case")), *(Row("case", first_preset("case"), name)
                                                     for name in model_class("case").Config.ablations)]
    if table != 1:
        raise ConfigError(f"there are the tables 1 and 2, not {table}")
    if unknown := [name for name in models if name not in MODELS]:
        raise ConfigError(f"there is no model {', '.join(unknown)}; one of {', '.join(MODELS)}")
    kinds = [kind for kind in MODELS if kind != "case" and (not models or kind in models)] + ["case"]
    known = {name for kind in kinds for name in model_class(kind).presets}
    if unknown := [name for name in recipes if name not in known]:
        raise ConfigError(f"no model has the recipe {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    found = []
    for kind in kinds:
        presets = model_class(kind).presets
        found += [Row(kind, name) for name in recipes if name in presets] or [Row(kind, first_preset(kind))]
    return found


def first_preset(kind: str) -> str:
    return next(iter(model_class(kind).presets))


def digest(config: Mapping[str, Any], fingerprint: str) -> str:
    """Ten digits that a run's settings (`TrainConfig.as_dict`) and its store's fingerprint decide, but for what is `FREE`."""
    told = {name: value for name, value in config.items() if name not in FREE}
    text = json.dumps([told, fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass
class Planned:
    """One run of a table.

    Attributes:
        folder: where it is or will be; ``state``: "finished", "begun", "evaluate" (trained, not evaluated whole) or "new".
        about: the state in words. seconds: about how long the rest takes, None where nothing tells.
        problem: why it could not be carried out, "" if it could.
    """

    row: Row
    seed: int
    config: TrainConfig
    folder: Path
    state: str = "new"
    about: str = ""
    seconds: float | None = None
    problem: str = ""

    @property
    def evaluation(self) -> Evaluation:
        return Evaluation.load(Run(self.folder).evaluation("test"))


def plan(rows: Sequence[Row], seeds: Sequence[int], store: Store, out: Path, changes: Mapping[str, Any] | None = None,
         runs: Sequence[Path] = ()) -> list[Planned]:
    """Every run of a table, with what is there of it.

    Args:
        out: folder of the table; its runs are in ``out/runs``.
        changes: of the training settings, for all runs alike; "model" may be a mapping of settings that all of them have.
        runs: runs elsewhere, or folders of such, that may be used.

    Raises:
        ConfigError: a setting that cannot work, or a folder that is not there.
    """
    words, known = len(store.featurizer.vocabulary), {}
    if missing := [str(folder) for folder in runs if not folder.is_dir()]:
        raise ConfigError(f"there is no folder {', '.join(missing)}. Name runs, or folders that hold some")
    elsewhere = [folder for given in runs for folder in (given, *sorted(given.glob("*")))]
    for folder in [*sorted((out / "runs").glob("*")), *elsewhere]:
        found = _of_folder(folder)
        if found is not None:
            known.setdefault(found, folder)
    planned = []
    for row in rows:
        for seed in seeds:
            config = preset(row.recipe, row.kind, seed=seed, ablation=row.ablation or None, **(changes or {})).resolved(words)
            key = digest(config.as_dict(), store.fingerprint)
            part = "".join(letter if letter.isalnum() else "-" for letter in row.ablation or "whole").strip("-")
            folder = known.get(key, out / "runs" / f"{row.kind}-{row.recipe}-{part}-s{seed}-{key}")
            planned.append(Planned(row, seed, config, folder))
    for item in planned:
        _look(item, store)
    _estimate(planned, store)
    return planned


def _of_folder(folder: Path) -> str | None:
    """The digest of the run in a folder, None if there is none to be used."""
    try:
        record = Record.read(folder)
        config = TrainConfig.from_dict(record.config, saved=True).as_dict() if record.config else None
    except (CheckpointError, ConfigError):
        return None
    fingerprint = lookup(record.manifest, "store.fingerprint")
    return digest(config, str(fingerprint)) if config and fingerprint else None


def _look(item: Planned, store: Store) -> None:
    """Find out what there is of a run."""
    if not Run(item.folder).config.exists():
        return
    record = Record.read(item.folder)
    result = record.manifest.get("result")
    if not isinstance(result, dict):
        step = record.newest("step", "checkpoint").get("step", 0)
        item.state, item.about = "begun", f"begun, {step:,} steps done"
        return
    item.state, item.about = "evaluate", f"trained ({result.get('steps'):,} steps, {result.get('stopped')}), not evaluated"
    try:
        evaluation = item.evaluation
    except CheckpointError:
        return
    whole = evaluation.examples == store.size("test") and lookup(evaluation.about, "store.fingerprint") == store.fingerprint
    if whole and lookup(evaluation.about, "settings.strategy") == "greedy" and _has_words(item.folder):
        item.state, item.about, item.seconds = "finished", f"finished, {result.get('steps'):,} steps", 0.0


def _has_words(folder: Path) -> bool:
    """Whether its replies are there word by word: those of an earlier version are not."""
    first = next(Record(Run(folder)).lines(Run(folder).evaluation("test") / "predictions.jsonl"), {})
    return isinstance(first.get("words"), list)


def _estimate(planned: Sequence[Planned], store: Store) -> None:
    """How long the rest of each takes, by the speed of the runs of its kind that are there."""
    speeds: dict[str, list[float]] = {}
    done: dict[Path, int] = {}
    for item in planned:
        if item.state != "new":
            steps, found = Record.read(item.folder).series("step", "examples_per_second")
            speeds.setdefault(item.row.kind, []).extend(found[len(found) // 2 :])
            done[item.folder] = steps[-1] if steps else 0
    for item in planned:
        if item.state in ("new", "begun") and (found := sorted(speeds.get(item.row.kind, []))):
            total = item.config.fewest_steps(store.size("train"))
            left = max(total - done.get(item.folder, 0), 0)
            item.seconds = left * item.config.batch_size / max(found[len(found) // 2], 1e-9)


# ---- carrying out


def carry_out(planned: Sequence[Planned], store: Store, device: str, jobs: int, told: Callable[[Planned, str], None]) -> None:
    """Train and evaluate what is not finished, ``jobs`` runs at once, each in processes of its own with a log beside its folder.

    A run that fails is told and left out; the others go on. Ctrl-C and SIGTERM stop all of them, each with a checkpoint.

    Args:
        told: called with a run and what happens to it.

    Raises:
        Interrupted: stopped by the user; the same command goes on.
    """
    waiting = [item for item in planned if item.state != "finished"]
    going: list[tuple[Planned, subprocess.Popen[bytes]]] = []
    with StopRequest("stopping the runs, each with a checkpoint") as stop:
        try:
            while (waiting or going) and not stop.signal:
                while waiting and len(going) < jobs:
                    item = waiting.pop(0)
                    going.append((item, _begin(item, store, device)))
                    told(item, "training" if item.state != "evaluate" else "evaluating")
                time.sleep(0.1)
                for item, process in [pair for pair in going if pair[1].poll() is not None]:
                    going.remove((item, process))
                    if process.returncode == 0 and item.state != "evaluate":
                        item.state = "evaluate"
                        waiting.insert(0, item)
                        continue
                    _look(item, store)
                    if item.state != "finished":
                        item.problem = _last_line(_log_of(item)) or f"ended with status {process.returncode}"
                    told(item, item.problem or item.about)
        finally:
            for _, process in going:
                process.send_signal(signal.SIGTERM)
            for _, process in going:
                process.wait()
        if stop.signal:
            raise Interrupted(f"stopped by {stop.signal}; each run has its checkpoint, and the same command goes on")


def _begin(item: Planned, store: Store, device: str) -> subprocess.Popen[bytes]:
    """Start its training, or its evaluation where it is trained."""
    item.folder.parent.mkdir(parents=True, exist_ok=True)
    if item.state == "evaluate":
        words = ["evaluate", str(item.folder), "--data", str(store.path), "--split", "test"]
    else:
        settings = item.folder.with_name(f"{item.folder.name}.json")
        write_json(settings, item.config.as_dict())
        words = ["train", "--model", item.row.kind, "--config", str(settings), "--data", str(store.path)]
        words += ["--out", str(item.folder)]
        words += ["--resume"] if item.state == "begun" else []
    command = [sys.executable, "-m", "case_fast", *words, "--device", device]
    with open(_log_of(item), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)


def _log_of(item: Planned) -> Path:
    return item.folder.with_name(f"{item.folder.name}.log")


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""
