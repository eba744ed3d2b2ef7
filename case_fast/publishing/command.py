"""From a run to the folder of a published model (`case_fast.published`): its best weights, its metrics, its card."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from case_fast import published
from case_fast.errors import CheckpointError, ConfigError
from case_fast.evaluation.evaluate import Evaluation, as_dict, digest_of_weights
from case_fast.files import kind_of, require_place, whole_folder, writing
from case_fast.publishing.card import Material, card_of
from case_fast.runs import Record, load_features, load_model, lookup


@dataclass(frozen=True)
class Publication:
    """What was written. ``left_out``: an evaluation or a lexicon and why, a line each."""

    folder: Path
    left_out: list[str]

    def lines(self) -> list[str]:
        """What is said of it in the terminal."""
        name = name_of(self.folder)
        return [
            f"{self.folder}: {', '.join(sorted(path.name for path in self.folder.iterdir()))}",
            *(f"left out: {line}" for line in self.left_out),
            "",
            f"Read {self.folder / published.CARD}, then upload it, if the licences that it names allow what you want:",
            f"  hf upload YOUR_NAME/{shlex.quote(name)} {shlex.quote(str(self.folder))} .",
        ]


def name_of(folder: Path) -> str:
    return Path(os.path.abspath(folder)).name


def publish(run: str | Path, out: str | Path) -> Publication:
    """Write the best weights of a run into ``out``, for others; a published model that is there is replaced as a whole.

    Raises:
        ConfigError: ``out`` is there and is something else. PlaceError: it cannot be written.
        CheckpointError: a part of the run is missing or damaged.
    """
    out = Path(out)
    _check_place(out)
    record = Record.read(run)
    model, _ = load_model(run, "cpu")
    featurizer, knowledge = load_features(run, model.config.vocab_size)
    features = published.without_lexicons(featurizer, knowledge, model.needs)
    evaluations, left_out = _evaluations(record, digest_of_weights(model))
    material = Material(model, record, features, knowledge)
    with whole_folder(out) as folder, writing(out, SafetensorError):
        published.write(folder, model, featurizer.vocabulary, features,
                        {name: _without_path(as_dict(found)) for name, found in evaluations.items()},
                        card_of(name_of(out), model, record, material, evaluations))
    return Publication(out, [*material.left_out(), *left_out])


def _check_place(out: Path) -> None:
    """Refuse to replace anything but a published model, and that too where files would be lost with it."""
    require_place(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not kind_of(out).startswith(published.KIND):
        raise ConfigError(f"--out {out} is there and is no published model; give another folder, so that nothing is lost")
    if others := sorted(path.name for path in out.iterdir() if path.name not in published.FILES):
        raise ConfigError(f"--out {out} would be replaced, but {', '.join(others[:3])} in it is no part of a published model; "
                          "move that elsewhere or give another folder")


def _evaluations(record: Record, weights: str) -> tuple[dict[str, Evaluation], list[str]]:
    """The evaluations of a run by their folder's name, and which are not of these weights or cannot be read."""
    found: dict[str, Evaluation] = {}
    left_out = []
    for path in sorted(record.files.evaluations.glob("*/metrics.json")):
        name = path.parent.name
        try:
            evaluation = Evaluation.load(path.parent)
        except CheckpointError as error:
            left_out.append(str(error))
            continue
        if lookup(evaluation.about, "model.weights") in (None, weights):  # earlier versions did not note them
            found[name] = evaluation
        else:
            left_out.append(f"the evaluation {name}, which is of other weights of this run: evaluate it again")
    return found, left_out


def _without_path(metrics: dict[str, Any]) -> dict[str, Any]:
    """What metrics.json holds, without the place of the store on this machine."""
    return metrics | {"store": {name: value for name, value in metrics.get("store", {}).items() if name != "path"}}
