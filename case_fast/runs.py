"""A run's folder, and all that knows its files: written by training, read by evaluation, chat and report.

    RUN/config.json       settings            RUN/manifest.json   command, versions, data, machine, times
    RUN/features/         the featurizer and where knowledge came from: a run answers without its store
    RUN/best/             weights of the best validation, as `from_pretrained` takes them
    RUN/checkpoints/<step>/   the whole state at a step, see `training.checkpoint`
    RUN/log.jsonl, RUN/tensorboard/   see `training.log`
    RUN/failure/          what was known when a loss or gradient stopped being finite: batch and losses, and the weights before
    RUN/evaluation/<split>/   see `evaluation.evaluate`
    RUN/diagnosis/<split>/    see `evaluation.diagnose`
    RUN/report.html       see `evaluation.report`
    RUN/knowledge.sqlite  inferences asked for in chat, where the cache of the run's store cannot be written
    RUN/.lock             held by the process that trains

Settings, manifests and records go in and out as plain dicts: this file knows no trainer and no model by its settings.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import case_fast
from case_fast import checksums
from case_fast.data import Featurizer, Store
from case_fast.devices import device_in_words, resolve_device
from case_fast.errors import CheckpointError, ConfigError, DataError, reason_of, remedy_of
from case_fast.files import kind_of, plain, require_folder_place, require_room, sha256, sync, whole_folder, write_json
from case_fast.models import DialogueModel, build
from case_fast.models.base import read_config
from case_fast.text_files import ReadReport, read_lines, reading

_PACKAGES = ("torch", "numpy", "safetensors", "huggingface_hub")
_CHECKPOINT = re.compile(r"\d{8,12}")
_FEATURES = ("vocabulary.json", "features.json", "knowledge.json")
_WEIGHTS, _MODEL = "model.safetensors", "config.json"  # as `save_pretrained` writes them
_TRAIN = "case-fast train --data STORE --out"


class Run:
    """Where the parts of a run lie, and how training writes them. Making one touches nothing."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config, self.manifest = self.path / "config.json", self.path / "manifest.json"
        self.features, self.best, self.checkpoints = self.path / "features", self.path / "best", self.path / "checkpoints"
        self.log, self.tensorboard, self.failures = self.path / "log.jsonl", self.path / "tensorboard", self.path / "failure"
        self.evaluations, self.report = self.path / "evaluation", self.path / "report.html"
        self.cache = self.path / "knowledge.sqlite"
        self._training = (self.config, self.manifest, self.log, self.features, self.best, self.checkpoints)

    def evaluation(self, split: str, strategy: str = "greedy") -> Path:
        """Where an evaluation belongs; replies that were not decoded greedily have a folder of their own."""
        return self.evaluations / (split if strategy == "greedy" else f"{split}-{strategy}")

    def best_of(self, phase: str) -> Path:
        """Where the best weights of a phase before the last are, from which the next one begins."""
        return self.path / f"{self.best.name}-{phase}"

    def diagnosis(self, split: str) -> Path:
        return self.path / "diagnosis" / split

    # ---- training in it

    @property
    def begun(self) -> bool:
        """Whether there is a run in the folder."""
        return any(os.path.lexists(path) for path in self._training)

    @contextmanager
    def held(self, resume: bool) -> Iterator[Self]:
        """Make the folder of a new run, or take up one to go on with, for this process alone. `set_up` fills it.

        Raises:
            CheckpointError: it holds a run and ``resume`` is False, or the other way round; it cannot be written; another
                process trains in it.
        """
        if other := _other_kind(self.path):
            raise CheckpointError(f"{self.path}: {other}. Choose another folder")
        there = [path.name for path in self._training if os.path.lexists(path)]
        if there and not resume:
            held = ", ".join(there)
            raise CheckpointError(f"{self.path} already holds a run ({held}). Resume it (--resume), or choose another folder")
        if not there and resume:
            raise CheckpointError(f"{self.path} holds no run to resume. Check the folder, or train without --resume")
        with writing("the run", self.path, begun=resume):
            require_folder_place(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with writing("the run", self.path):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    said = f"another process is training in {self.path}. Wait for it, or choose another folder"
                    raise CheckpointError(said) from None
                if resume:
                    self._clean()
            yield self
        finally:
            os.close(lock)

    def _clean(self) -> None:
        """Remove temporary siblings that a killed process left."""
        for part in self._training:
            for left in self.path.glob(f".{part.name}.*"):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()

    def require_room(self, size: int, begun: bool) -> None:
        """`CheckpointError` where the disk has no room for so many bytes; ``begun``: as of `writing`."""
        with writing("the run", self.path, begun=begun):
            require_room(self.path, size)

    def read_config(self) -> dict[str, Any]:
        """The settings; {} when they are missing, as in a run killed while it was set up. So `read_manifest`."""
        return _object(self.config)

    def read_manifest(self) -> dict[str, Any]:
        return _object(self.manifest)

    def set_up(self, config: Mapping[str, Any], store: Store, device: torch.device) -> None:
        """Write what describes the run, once it is known that it can begin or go on; what is there already is kept."""
        with writing("the run", self.path):
            write_json(self.config, config)
            if not self.features.is_dir():
                with whole_folder(self.features) as folder:
                    store.featurizer.save(folder)
                    write_json(folder / "knowledge.json", store.knowledge)
            self.checkpoints.mkdir(exist_ok=True)
            write_json(self.manifest, self._manifest(config, store, device))
            sync(self.path)

    def _manifest(self, config: Mapping[str, Any], store: Store, device: torch.device) -> dict[str, Any]:
        """What to write now: of a new run, or that this one goes on."""
        manifest = self.read_manifest()
        now = {
            "command": shlex.join(sys.argv),
            "device": device_in_words(device),
            "system": platform.platform(),
            "versions": _versions(),
        }
        if manifest:
            manifest.pop("finished", None)  # until it ends again
            manifest.setdefault("resumed", []).append({"time": _now(), **now})
            return manifest
        data = {
            "path": str(store.path.resolve()),
            "fingerprint": store.fingerprint,
            "bundled": bool(store.manifest.get("bundled")),
        }
        return {"started": _now(), **now, "seed": config.get("seed"), "store": data, "config": config}

    def finish(self, **facts: Any) -> None:
        """Note in the manifest that training has ended, and how."""
        with writing("the manifest", self.manifest):
            write_json(self.manifest, self.read_manifest() | {"finished": _now(), **plain(facts)})

    def save_best(self, model: DialogueModel, phase: str = "") -> None:
        """Replace RUN/best, or what `best_of` a phase is. Of its files only the weights and their checksum differ within a run;
        until both are replaced the checksums are of the old weights and of the new ones."""
        best = self.best_of(phase) if phase else self.best
        with (
            writing("the best weights", best),
            tempfile.TemporaryDirectory(dir=self.path, prefix=f".{self.best.name}.") as temporary,
        ):
            folder = Path(temporary) / self.best.name
            model.save_pretrained(folder)
            for file in folder.iterdir():
                file.chmod(0o644)
                sync(file)
            sync(folder)
            if best.is_dir():
                checksums.write(folder, before=best)
                sync(best)
                for name in sorted((file.name for file in folder.iterdir()), key=checksums.NAME.__eq__):  # that one last
                    os.replace(folder / name, best / name)
                    sync(best)
            else:
                folder.rename(best)
            sync(self.path)

    def failure(self, step: int) -> Path:
        return self.failures / f"step-{step:08d}.json"

    def dump(self, step: int, facts: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
        """Write RUN/failure/step-<step>.json, and beside it the weights that the step began with, as far as there is room."""
        path = self.failure(step)
        with writing("the dump", path):
            path.parent.mkdir(exist_ok=True)
            tensors, listed = path.with_suffix(".safetensors"), None
            with suppress(OSError, SafetensorError):
                save_file({name: x.detach().cpu().contiguous() for name, x in weights.items()}, tensors)
                listed = {"name": tensors.name, "sha256": sha256(tensors), "bytes": tensors.stat().st_size}
            if listed is None:
                tensors.unlink(missing_ok=True)
            write_json(path, plain({"time": _now(), "step": step, **facts, "weights": listed}))
        return path


@contextmanager
def writing(what: str, path: Path, begun: bool = True) -> Iterator[None]:
    """Turns a failure to write a part of a run into a `CheckpointError` with the reason and what to do; ``begun``: the run may
    have checkpoints."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors gives its own error when a disk is full
        remedy = "The checkpoints before it are untouched: mend that, then resume" if begun else remedy_of(error)
        raise CheckpointError(f"{what} could not be written to {path} ({reason_of(error)}). {remedy}") from error


def _object(path: Path) -> dict[str, Any]:
    """A JSON file of the run; {} when it is missing."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error}). Remove this file; resuming writes it anew") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "case_fast": case_fast.__version__}
    for name in _PACKAGES:
        found[name] = torch.__version__ if name == "torch" else metadata.version(name)
    return found


# ---- checkpoints by name


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"{step:08d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps that a checkpoint's folder exists for, ascending; none of them has been checked."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(step for name in names if _CHECKPOINT.fullmatch(name) and checkpoint_name(step := int(name)) == name)


# ---- opening it for use


def load_model(run: str | Path, device: str = "auto", checkpoint: str = "best") -> tuple[DialogueModel, torch.device]:
    """The model of a run, in evaluation mode, and the device it is on.

    Args:
        device: auto, cpu, cuda or cuda:N.
        checkpoint: "best", or the step of one of the run's checkpoints.

    Raises:
        CheckpointError: a part of the run is missing or damaged.
        ConfigError: an argument cannot be used.
    """
    files, chosen = Run(run), resolve_device(device)
    _require_run(files)
    if checkpoint == "best" and not files.best.is_dir():
        raise CheckpointError(
            f"{files.best}: the run has no weights to use yet; training writes them at its first validation. Go on with it: "
            f"{_TRAIN} {run} --resume"
        )
    weights = files.best
    if checkpoint != "best":
        steps = [checkpoint_name(step) for step in checkpoint_steps(files.checkpoints)]
        weights = files.checkpoints / (checkpoint.zfill(8) if checkpoint.isdecimal() else "none")
        if weights.name not in steps:
            raise ConfigError(f"checkpoint {checkpoint!r} is not in {run}; give one of {', '.join(['best', *steps])}")
    remedy = f"Put a copy of it back, or train again: {_TRAIN} {run}"
    described = files.best / _MODEL if files.best.is_dir() else files.config  # a run before its first validation has no best
    _require(described, remedy)
    _require(weights / _WEIGHTS, remedy)
    try:
        if files.best.is_dir():
            settings = read_config(files.best)
        else:
            config = files.read_config()
            settings = {"model": config.get("kind", "case"), **config.get("model", {})}
        model = build(settings.pop("model", "case"), saved=True, **settings)
        model.load_weights(weights / _WEIGHTS, checksums.NAME if checkpoint == "best" else "manifest.json")
    except (ValueError, TypeError, RuntimeError) as error:
        reason = error.__cause__ or error  # the model's own sentence would say the same twice
        raise CheckpointError(f"{weights}: damaged, or not of this model ({reason}). {remedy}") from error
    return model.to(chosen).eval(), chosen


def load_features(run: str | Path, words: int) -> tuple[Featurizer, dict[str, Any]]:
    """The featurizer of a run whose model knows so many ``words``, and where its knowledge came from: "spec", "cache", ...

    Raises:
        CheckpointError: a part is missing, damaged or of another run.
    """
    folder = Run(run).features
    remedy = f"Remove {folder}, then write it again: {_TRAIN} {run} --resume"
    for name in _FEATURES:
        _require(folder / name, remedy)
    try:
        featurizer = Featurizer.load(folder)
        with reading(folder / "knowledge.json", "this part of the run"):
            knowledge = json.loads((folder / "knowledge.json").read_text(encoding="utf-8"))
        if not isinstance(knowledge["spec"], str) or not isinstance(knowledge.get("cache"), str | None):
            raise TypeError("spec and cache must be texts")
    except DataError as error:
        raise CheckpointError(f"{error.path}: {error.problem}. {remedy}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'knowledge.json'}: damaged ({error!r}). {remedy}") from error
    if len(featurizer.vocabulary) != words:
        problem = f"{len(featurizer.vocabulary)} words, the model has {words}: they are of different runs"
        raise CheckpointError(f"{folder}: {problem}. {remedy}")
    return featurizer, knowledge


def _require_run(files: Run) -> None:
    """`CheckpointError` where a folder is missing or is no run's, so that nothing is written into somebody else's."""
    remedy = f"Make one with: {_TRAIN} {files.path}"
    with reading(files.path, "run folder"):
        if not files.path.is_dir():
            raise CheckpointError(f"{files.path}: run folder not found. {remedy}")
        if other := _other_kind(files.path):
            raise CheckpointError(f"{files.path}: {other}. {remedy}")
        parts = any(part.exists() for part in (files.log, files.best, files.checkpoints, files.evaluations))
        if not (parts or _may_be(files.manifest, "command") or _may_be(files.config, "batch_size")):
            raise CheckpointError(f"{files.path}: not a run folder. {remedy}")


def _other_kind(folder: Path) -> str:
    """What a folder is that has a manifest.json or config.json as a run has; "" if it may be a run."""
    if kind := kind_of(folder):
        return f"a {kind}, not a run folder"
    return "the weights of a model, not a run folder" if os.path.lexists(folder / _WEIGHTS) else ""


def _may_be(path: Path, key: str) -> bool:
    """Whether a JSON file is there and may be a run's: it has a key that all of them have, or is empty or damaged."""
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return True
    return not found or not isinstance(found, dict) or key in found


def _require(path: Path, remedy: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: this part of the run is missing. {remedy}")


# ---- reading it for a report: whatever is there, damaged lines counted, nothing required

Series = tuple[list[int], list[float]]


@dataclass
class Record:
    """What a run folder tells.

    Attributes:
        files: the folder.
        manifest, config: RUN/manifest.json and RUN/config.json; empty when missing or damaged.
        store: the manifest of the store it was trained on; empty when that store is not there any more.
        records: the objects of RUN/log.jsonl, in order.
        problems: what was found damaged, in words.
    """

    files: Run
    manifest: dict[str, Any] = field(default_factory=dict)
    store: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a run folder; `CheckpointError` if nothing in it belongs to a run, `DataError` if it cannot be read."""
        files = Run(path)
        _require_run(files)
        record = cls(files)
        record.manifest, record.config = record._object(files.manifest), record._object(files.config)
        store = record._object(Path(str(lookup(record.manifest, "store.path"))) / "manifest.json")
        if store.get("fingerprint") == lookup(record.manifest, "store.fingerprint"):
            record.store = store
        record.records = list(record.lines(files.log))
        return record

    def _object(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self.problems.append(f"{path} cannot be read ({error})")
            return {}
        if not isinstance(found, dict):
            self.problems.append(f"{path} holds no JSON object")
            return {}
        return found

    def lines(self, path: Path) -> Iterator[dict[str, Any]]:
        """The objects of a file with one a line; what is damaged joins the problems once all are read."""
        report = ReadReport(str(path))
        try:
            for number, line in read_lines(path, report) if path.exists() else ():
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):
                    found = None
                if isinstance(found, dict):
                    yield found
                else:
                    report.skip("no JSON object", number)
        except (DataError, OSError) as error:
            self.problems.append(str(error))
        damaged = sum(report.skipped.values())
        if damaged:
            first = min(min(numbers) for numbers in report.lines.values())
            self.problems.append(f"{path}: {damaged:,} damaged line{'s' * (damaged > 1)} left out, the first is line {first}")

    def series(self, event: str, name: str, phase: int | None = None) -> Series:
        """(steps, values) of a number that the records of an event carry, at any depth; the last record of a step counts.

        What is not a finite number (a log writes "nan") is NaN, and makes a gap in a curve.
        """
        found: dict[int, float] = {}
        for record in self.records:
            step = record.get("step")
            if record.get("event") != event or not _is_number(step) or phase not in (None, record.get("phase")):
                continue
            value = _find(record, name)
            if value is not None:
                found[int(step)] = value
        return sorted(found), [found[step] for step in sorted(found)]

    def newest(self, *events: str) -> dict[str, Any]:
        """The last record of one of these events; {} if there is none."""
        return next((record for record in reversed(self.records) if record.get("event") in events), {})


def _find(record: dict[str, Any], name: str) -> float | None:
    if name in record:
        value = record[name]
        return float(value) if _is_number(value) else math.nan
    for value in record.values():
        if isinstance(value, dict) and (found := _find(value, name)) is not None:
            return found
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300  # NaN is not


def lookup(values: Any, *names: str) -> Any:
    """The first of several dotted names ("store.path") that has a value, else None."""
    for name in names:
        found = values
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found not in (None, "", [], {}):
            return found
    return None
