"""The folder of a training run: what it was started with, what it needs to answer, its best weights.

RUN/config.json     settings            RUN/manifest.json   command, versions, data, machine, times
RUN/features/       the featurizer and where knowledge came from: a run answers without its store
RUN/best/           weights of the best validation, as `CASE.from_pretrained` takes them
RUN/failure/        what was known when a loss or gradient stopped being finite
RUN/checkpoints/, RUN/log.jsonl, RUN/tensorboard/: see `checkpoint` and `log`
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import torch

import case_fast
from case_fast.data import Store
from case_fast.devices import device_in_words
from case_fast.errors import CheckpointError, ConfigError
from case_fast.files import sync, whole_folder, write_json
from case_fast.models import CASE
from case_fast.training.checkpoint import writing
from case_fast.training.config import TrainConfig, differences
from case_fast.training.log import plain

_OURS = ("config.json", "manifest.json", "log.jsonl", "features", "best", "checkpoints")
_PACKAGES = ("torch", "numpy", "safetensors", "huggingface_hub")


class RunFolder:
    """A run's folder, held by one process at a time."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = -1

    @classmethod
    def open(cls, path: str | Path, config: TrainConfig, store: Store, resume: bool) -> Self:
        """The folder of a new run, or of one to go on with; ``config`` is resolved. `set_up` fills it.

        Raises:
            CheckpointError: it holds a run and ``resume`` is False, or the other way round; it cannot be written; another
                process trains in it.
            ConfigError: to be resumed with other settings or another store.
        """
        run = cls(Path(path))
        there = [name for name in _OURS if os.path.lexists(run.path / name)]
        if there and not resume:
            raise CheckpointError(
                f"{path} already holds a run ({', '.join(there)}). Resume it (--resume), or choose another folder"
            )
        if not there and resume:
            raise CheckpointError(f"{path} holds no run to resume. Check the folder, or train without --resume")
        with writing("the run", run.path):
            run.path.mkdir(parents=True, exist_ok=True)
            run._hold()
        if resume:
            try:
                stored = run.read("manifest.json").get("store")
                run.compare(run.read("config.json"), stored if isinstance(stored, dict) else {}, config, store)
                with writing("the run", run.path):
                    run._clean()
            except BaseException:
                run.release()
                raise
        return run

    def _hold(self) -> None:
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise CheckpointError(f"another process is training in {self.path}. Wait for it, or choose another folder") from None

    def release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; {} when it is missing (a run killed while it was set up)."""
        path = self.path / name
        if not path.exists():
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict):
                raise ValueError("no JSON object")
            return value
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: damaged ({error}). Remove this file; resuming writes it anew") from error

    def compare(self, ran: Mapping[str, Any], ran_on: Mapping[str, Any], config: TrainConfig, store: Store) -> None:
        """`ConfigError` naming what differs between what the run was started with and what it is resumed with."""
        found = differences(ran, config.as_dict()) if ran else []
        if ran_on.get("fingerprint", store.fingerprint) != store.fingerprint:
            of_run = f"{ran_on.get('path')} ({str(ran_on['fingerprint'])[:12]})"
            found.append(f"the store is {of_run} in the run and {store.path} ({store.fingerprint[:12]}) now")
        if found:
            raise ConfigError(f"{self.path} cannot be resumed so: {'; '.join(found)}. Use what it ran with, or start another run")

    def _clean(self) -> None:
        """Remove temporary siblings that a killed process left."""
        for name in _OURS:
            for left in self.path.glob(f".{name}.*"):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()

    def set_up(self, config: TrainConfig, store: Store, device: torch.device) -> None:
        """Write what describes the run, once it is known that it can begin or go on; what is there already is kept."""
        with writing("the run", self.path):
            self._set_up(config, store, device)

    def _set_up(self, config: TrainConfig, store: Store, device: torch.device) -> None:
        write_json(self.path / "config.json", config.as_dict())
        if not (self.path / "features").is_dir():
            with whole_folder(self.path / "features") as folder:
                store.featurizer.save(folder)
                write_json(folder / "knowledge.json", store.knowledge)
        (self.path / "checkpoints").mkdir(exist_ok=True)
        manifest = self.read("manifest.json")
        now = {
            "command": shlex.join(sys.argv),
            "device": device_in_words(device),
            "system": platform.platform(),
            "versions": _versions(),
        }
        if manifest:
            manifest.pop("finished", None)  # until it ends again
            manifest.setdefault("resumed", []).append({"time": _now(), **now})
        else:
            data = {
                "path": str(store.path.resolve()),
                "fingerprint": store.fingerprint,
                "bundled": bool(store.manifest.get("bundled")),
            }
            manifest = {"started": _now(), **now, "seed": config.seed, "store": data, "config": config.as_dict()}
        write_json(self.path / "manifest.json", manifest)
        sync(self.path)

    def finish(self, **facts: Any) -> None:
        """Note in the manifest that training has ended, and how."""
        with writing("the manifest", self.path / "manifest.json"):
            write_json(self.path / "manifest.json", self.read("manifest.json") | {"finished": _now(), **plain(facts)})

    def save_best(self, model: CASE) -> None:
        """Replace RUN/best. Of its files only the weights differ within a run, so replacing each replaces all at once."""
        best = self.path / "best"
        with writing("the best weights", best), tempfile.TemporaryDirectory(dir=self.path, prefix=".best.") as temporary:
            folder = Path(temporary) / "best"
            model.save_pretrained(folder)
            for file in folder.iterdir():
                file.chmod(0o644)
                sync(file)
            sync(folder)
            if best.is_dir():
                for file in folder.iterdir():
                    os.replace(file, best / file.name)
                sync(best)
            else:
                folder.rename(best)
            sync(self.path)

    def dump(self, step: int, facts: Mapping[str, Any]) -> Path:
        """Write RUN/failure/step-<step>.json."""
        path = self.path / "failure" / f"step-{step:08d}.json"
        with writing("the dump", path):
            path.parent.mkdir(exist_ok=True)
            write_json(path, plain({"time": _now(), "step": step, **facts}))
        return path


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "case_fast": case_fast.__version__}
    for name in _PACKAGES:
        found[name] = torch.__version__ if name == "torch" else metadata.version(name)
    return found
