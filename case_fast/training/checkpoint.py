"""Checkpoints that are whole or not there, whatever moment the process or the machine stops.

    RUN/checkpoints/<step>/model.safetensors, optimizer.safetensors   tensors
    RUN/checkpoints/<step>/manifest.json   sha256 and size of both, step, state of the run, and its own sha256
    RUN/checkpoints/latest                 the name of the newest one, for people

A checkpoint is written into a temporary sibling, synced and renamed; only then `latest` names it, and only after it has
been read back are older ones removed. Reading checks every byte and takes no name from a file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from case_fast.checksums import MAX_BYTES, damaged, sealed, unsealed
from case_fast.errors import CheckpointError
from case_fast.files import sync, whole_folder, write_text
from case_fast.runs import checkpoint_name, checkpoint_steps, writing
from case_fast.training.adam import Adam

FORMAT = "case_fast checkpoint 1"
PARTS = ("model", "optimizer")
MAX_HEADER_BYTES = 1 << 24  # of a safetensors file; a model's is a few KiB
_log = logging.getLogger("case_fast")


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at ``step``: tensors of each of `PARTS` by name, and plain values."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, in ``folder``; ``keep`` of them stay."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        return self.folder / checkpoint_name(step)

    def steps(self) -> list[int]:
        """Steps that a checkpoint's folder exists for, ascending; none of them has been checked."""
        return checkpoint_steps(self.folder)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of ``step``, unless that step has one already: a run's state at a step is unique.

        Raises:
            CheckpointError: it could not be written (disk full, folder gone, ...); those already there are intact.
        """
        path = self.path(step)
        with writing(f"the checkpoint of step {step}", path):
            if not path.exists():
                if not self.folder.parent.is_dir():  # it would be made anew, without the rest of the run
                    raise FileNotFoundError(f"{self.folder.parent} is gone")
                with whole_folder(path) as temporary:
                    files = {}
                    for part in PARTS:
                        file = temporary / f"{part}.safetensors"
                        content = {name: t.detach().cpu().contiguous() for name, t in tensors[part].items()}
                        safetensors.torch.save_file(content, file)
                        files[file.name] = {"sha256": _digest(file, content), "bytes": file.stat().st_size}
                    body = {"format": FORMAT, "step": step, "files": files, "state": dict(state)}
                    (temporary / "manifest.json").write_bytes(sealed(body))
            write_text(self.folder / "latest", path.name + "\n")
            sync(self.folder)
            if len(self.steps()) > self.keep:
                self.check(step)
                self._remove_old(step)
        return path

    def _remove_old(self, newest: int) -> None:
        old = [step for step in self.steps() if step < newest]
        for step in old[: max(0, len(old) + 1 - self.keep)]:
            # under its own name a checkpoint is whole: it loses the name before the first file goes
            removed = self.folder / f".{checkpoint_name(step)}.removed"
            shutil.rmtree(removed, ignore_errors=True)
            self.path(step).rename(removed)
            shutil.rmtree(removed)

    def clean(self) -> None:
        """Remove what killed processes left half written or half removed. No other process may be writing."""
        if self.folder.is_dir():
            for path in self.folder.glob(".*"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def read(self, step: int, max_bytes: int | None = None) -> Checkpoint:
        """Read the checkpoint of ``step`` and check every byte; no file may be larger than ``max_bytes``.

        Raises:
            CheckpointError: it is missing, incomplete, damaged or not what this class writes.
        """
        files, state = self._manifest(step)
        path = self.path(step)
        tensors = {part: self._tensors(path / f"{part}.safetensors", files, max_bytes) for part in PARTS}
        return Checkpoint(path, step, tensors, state)

    def check(self, step: int) -> None:
        """Check every byte of the checkpoint of ``step``, in little memory; raises as `read` does."""
        for name, listed in self._manifest(step)[0].items():
            with _opened(self.path(step) / name) as stream:
                found = {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": os.fstat(stream.fileno()).st_size}
            if found != listed:
                raise damaged(self.path(step) / name)

    def _manifest(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the manifest of ``step`` says: its files, and the state of the run."""
        path = self.path(step)
        if path.is_symlink() or not path.is_dir():
            raise CheckpointError(f"{path}: {'a link' if path.is_symlink() else 'no folder'}, expected a checkpoint")
        manifest = path / "manifest.json"
        raw = _read_file(manifest, MAX_BYTES)
        body = unsealed(manifest, raw, "format", "step", "files", "state")
        form, own_step, files, state = body["format"], body["step"], body["files"], body["state"]
        if form != FORMAT:
            raise CheckpointError(f"{manifest}: format {form!r}, this version reads {FORMAT!r}")
        if own_step != step:
            raise CheckpointError(f"{manifest}: it is of step {own_step!r}, its folder says {step}")
        expected = {f"{part}.safetensors" for part in PARTS}
        if not isinstance(files, dict) or set(files) != expected or not isinstance(state, dict):
            raise CheckpointError(f"{manifest}: refused: it must list exactly {', '.join(sorted(expected))}")
        return files, state

    def _tensors(self, path: Path, files: dict[str, Any], max_bytes: int | None) -> dict[str, Tensor]:
        listed = files[path.name] if isinstance(files[path.name], dict) else {}
        data = _read_file(path, max_bytes)
        if len(data) != listed.get("bytes") or hashlib.sha256(data).hexdigest() != listed.get("sha256"):
            raise damaged(path)
        if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: refused: a header of more than {MAX_HEADER_BYTES} bytes")
        try:
            return safetensors.torch.load(data)
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: not a safetensors file ({error})") from error

    def newest(self, max_bytes: int | None = None) -> Checkpoint | None:
        """The newest sound checkpoint, or None if there is none of any kind.

        Damaged ones are reported and set aside as ``<step>.damaged``, so that their step can be saved again.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        latest = self.folder / "latest"
        problems = []
        for step in reversed(self.steps()):
            try:
                found = self.read(step, max_bytes)
            except CheckpointError as error:
                problems.append(str(error))
                _log.warning("%s. It is set aside; an older checkpoint is looked for", error)
                continue
            try:
                named = latest.read_text(errors="replace")[:20].strip() if latest.is_file() else ""
                if named != found.path.name:
                    _log.warning("%s names %r; the newest sound checkpoint is that of step %d", latest, named, step)
                for damaged in (other for other in self.steps() if other > step):
                    aside = self.folder / f"{checkpoint_name(damaged)}.damaged"
                    shutil.rmtree(aside, ignore_errors=True)
                    self.path(damaged).rename(aside)
            except OSError as error:
                raise CheckpointError(f"{self.folder}: cannot be used ({error.strerror or error})") from error
            return found
        if problems:
            raise CheckpointError("no checkpoint is sound: " + "; ".join(problems))
        return None


def _digest(file: Path, content: Mapping[str, Tensor]) -> str:
    """SHA-256 of what a safetensors file with this content should hold: its header as written, and the tensors in memory, so that
    a reader notices what went wrong on the way to the disk."""
    with open(file, "rb") as stream:
        size = stream.read(8)
        header = stream.read(int.from_bytes(size, "little"))
    digest = hashlib.sha256(size + header)
    places = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
    for name in sorted(places, key=places.get):
        digest.update(content[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_file(path: Path, max_bytes: int | None) -> bytes:
    with _opened(path, max_bytes) as stream:
        return stream.read()


@contextmanager
def _opened(path: Path, max_bytes: int | None = None) -> Iterator[BinaryIO]:
    """A regular file: no link is followed, no pipe waited for, nothing too large read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, "rb") as stream:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: refused: not a regular file")
            if max_bytes is not None and status.st_size > max_bytes:
                raise CheckpointError(f"{path}: refused: {status.st_size} bytes, expected at most {max_bytes}")
            yield stream
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


# ---- the state of a run as tensors and plain values


def optimizer_tensors(optimizer: Adam, names: Sequence[str]) -> dict[str, Tensor]:
    """Adam's state as ``<parameter>/<part>``; ``names``: those of the optimizer's parameters, in its order."""
    return {f"{name}/{part}": value for name, parameter in zip(names, _parameters(optimizer), strict=True)
            for part, value in optimizer.state.get(parameter, {}).items()}


def load_optimizer(optimizer: Adam, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_tensors`.

    Raises:
        CheckpointError: an unknown parameter, a missing part or a wrong shape.
    """
    parameters = dict(zip(names, _parameters(optimizer), strict=True))
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition("/")
        if name not in parameters or part not in ("step", "exp_avg", "exp_avg_sq"):
            raise CheckpointError(f"optimizer state {key!r} belongs to no parameter of this model")
        expected = torch.Size() if part == "step" else parameters[name].shape
        if value.shape != expected or value.dtype != torch.float32:
            raise CheckpointError(
                f"optimizer state {key!r} is {value.dtype} {tuple(value.shape)}, expected float32 {tuple(expected)}"
            )
        # aligned memory of its own, in place of a view of the file
        state.setdefault(name, {})[part] = value.clone().to(parameters[name].device)
    for name, parts in state.items():
        if len(parts) != 3:
            raise CheckpointError(f"optimizer state of {name!r} holds {', '.join(parts)} only")
    optimizer.state = {parameters[name]: parts for name, parts in state.items()}


def _parameters(optimizer: Adam) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def rng_state(device: torch.device) -> dict[str, str]:
    """torch's random states, of the CPU and of ``device``, as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_rng_state(states: Mapping[str, str], device: torch.device) -> None:
    """Undo `rng_state`; a run that moved to another kind of device keeps that device's fresh state."""
    try:
        found = {
            name: torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.uint8) for name, text in states.items()
        }
        torch.set_rng_state(found["cpu"])
        if device.type == "cuda":
            if "cuda" in found:
                torch.cuda.set_rng_state(found["cuda"], device)
            else:
                _log.warning("the run was on another device: dropout goes on from a fresh state")
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"the random state of the checkpoint cannot be used ({error})") from error
