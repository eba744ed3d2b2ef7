"""Replays a step that was not finite: whether it is again, with which backend and precision, from which op on, by which dialogue.

What the step was is in its dump (`runs.Run.dump`), the rest in the run's settings and store. The weights are those that the dump
holds; an older dump has none, and then training goes forward again to the step from the newest checkpoint before it, in a copy
of the run, or from its start.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from case_fast.batch import Batch
from case_fast.data import Store, open_store
from case_fast.devices import resolve_device
from case_fast.errors import CaseFastError, CheckpointError, DataError, reason_of
from case_fast.files import sha256
from case_fast.models import DialogueModel, model_class
from case_fast.models.base import raise_pending
from case_fast.ops.backend import asking
from case_fast.optional import SilentConsole
from case_fast.runs import Run, lookup
from case_fast.text_files import read_json
from case_fast.training import loop
from case_fast.training.checkpoint import Checkpoint, Checkpoints
from case_fast.training.config import TrainConfig
from case_fast.training.debugged import LISTED, Debugged, Replayed, Variant, verdict
from case_fast.training.process import matmul_precision, reproducible
from case_fast.training.sampler import Sampler, step_seed
from case_fast.training.step import total_norm
from case_fast.training.trace import Range, Trace

FORWARD = 500  # steps that are trained again at most to reach the one that failed


def debug(dump: str | Path, store: Store | str | Path | None = None, device: str = "auto", forward: int = FORWARD) -> Debugged:
    """Replay the step of a dump, RUN/failure/step-<step>.json.

    Args:
        store: that of the run, where it is not at the place any more that the run's manifest names.
        forward: steps that are trained again at most, where the dump has no weights and the checkpoint is of an earlier step.

    Raises:
        DataError: the dump or the store is missing or damaged, or it is another store.
        CheckpointError: there are no weights to replay it with.
        ConfigError: an argument cannot be used.
    """
    return _Debugger(Path(dump), store, device, forward).found()


class _Debugger:
    def __init__(self, dump: Path, store: Store | str | Path | None, device: str, forward: int):
        self.facts = read_json(dump, "dump", "Give a file RUN/failure/step-<step>.json that training wrote")
        try:
            self.step, self.split = int(self.facts["step"]), str(self.facts["split"])
            self.phase = self.facts["phase"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(dump, f"no dump of a step ({error!r})", "Give a file that training wrote") from error
        where = dump if dump.parent.name else dump.absolute()
        self.dump, self.run, self.forward = dump, Run(where.parent.parent), forward
        if not (config := self.run.read_config()):
            raise DataError(dump, f"{self.run.path} is not its run: there are no settings", "Give one in RUN/failure")
        self.config = TrainConfig.from_dict(config, saved=True)
        self.store = self._store(store)
        self.device = resolve_device(device)
        self.model = model_class(self.config.model.kind)(self.config.model)
        self.training = self.split == "train"
        self.at = self.step - self.training  # the step after which the weights were as they have to be

    def _store(self, given: Store | str | Path | None) -> Store:
        manifest = self.run.read_manifest()
        path, fingerprint = lookup(manifest, "store.path"), lookup(manifest, "store.fingerprint")
        store = given if given is not None and not isinstance(given, (str, Path)) else open_store(given or path or "store")
        if fingerprint not in (None, store.fingerprint):
            raise DataError(store.path, f"the run was trained on another store, {path} ({str(fingerprint)[:12]})",
                            "Give that one with --data")
        return store

    # ---- the weights before the step

    def _weights(self) -> tuple[dict[str, Tensor], str, bool]:
        """The weights, where they come from in words, and whether they are exactly those of the step."""
        listed, problem = self.facts.get("weights"), "the dump holds no weights"
        if isinstance(listed, dict) and Path(str(listed.get("name"))).name == listed.get("name"):
            path = self.dump.with_name(listed["name"])
            try:
                if sha256(path) == listed.get("sha256"):
                    return load(path.read_bytes()), "the dump holds them", True
                problem = f"{path.name} is damaged"
            except (OSError, SafetensorError) as error:
                problem = f"{path.name} cannot be read ({reason_of(error)})"
        found = self._checkpoint()
        begun = 0 if found is None else found.step
        of = "the start of the run" if found is None else f"the checkpoint of step {begun:,}"
        if found is not None and begun == self.at:
            return found.tensors["model"], f"{of} ({problem})", True
        gap = self.at - begun
        if gap <= self.forward:
            try:
                return self._trained_on(found), f"trained again for {gap:,} steps from {of} ({problem})", True
            except CaseFastError as error:
                problem += f"; training again from {of} ended with: {error}"
        else:
            problem += f"; {gap:,} steps are more than the {self.forward:,} that --forward allows to train again"
        if found is None:
            raise CheckpointError(f"{self.dump}: there are no weights to replay it with: {problem}, and no checkpoint before "
                                  "it is sound")
        return found.tensors["model"], f"{of}, {gap:,} steps before the one that failed ({problem})", False

    def _checkpoint(self) -> Checkpoint | None:
        """The newest sound one that is not later than the step."""
        checkpoints = Checkpoints(self.run.checkpoints)
        for step in reversed(checkpoints.steps()):
            if step <= self.at:
                try:
                    return checkpoints.read(step)
                except CheckpointError:
                    continue
        return None

    def _trained_on(self, found: Checkpoint | None) -> dict[str, Tensor]:
        """The weights at the step, by the same training in a copy of the run that is removed afterwards."""

        class Reached(Exception):
            pass

        with tempfile.TemporaryDirectory(prefix="case_fast.debug.") as folder:
            out = Path(folder) / "run"
            if found is not None:
                shutil.copytree(found.path, Run(out).checkpoints / found.path.name)
                for path in [self.run.config, *self.run.path.glob(f"{self.run.best.name}*")]:
                    shutil.copytree(path, out / path.name) if path.is_dir() else shutil.copy(path, out)
            with loop.trainer(self.store, out, self.config, SilentConsole(), resume=found is not None) as ready:
                real = ready.train_step

                def train_step() -> None:
                    if ready.step >= self.at:
                        raise Reached
                    real()

                ready.train_step = train_step
                try:
                    ready.train()
                except Reached:
                    ready.collect()
                return {name: x.detach().cpu().clone() for name, x in ready.model.state_dict().items()}

    # ---- its batch

    def _batches(self) -> Iterator[tuple[list[int], int]]:
        """Places in the split, and the seed, of the batches that it may be."""
        if self.training:
            config = self.config
            costs = None if config.batching == "shuffled" else self.store.costs("train")
            order = Sampler(self.store.size("train"), config.batch_size, config.seed, config.batching, costs)
            yield (self.facts.get("indices") or order.indices(self.at),
                   int(self.facts.get("seed") or step_seed(config.seed, self.at)))
            return
        size = min(self.store.size("valid"), self.config.valid_limit or self.store.size("valid"))
        for start in range(0, size, loop.VALIDATION_BATCH):
            yield list(range(start, min(start + loop.VALIDATION_BATCH, size))), 0

    def _batch(self, indices: Sequence[int], seed: int) -> Batch:
        try:
            return self.store.batch(self.split, indices, self.model.needs, seed)
        except (IndexError, ValueError) as error:
            raise DataError(self.dump, f"its batch cannot be made ({error})", "Give a dump of this run's own") from error

    # ---- replays

    def _replay(self, variant: Variant, batch: Batch, trace: bool = False) -> Replayed:
        dtype = torch.float64 if variant.precision == "float64" else torch.float32
        self.model.load_state_dict(self.weights)
        model = self.model.to(self.device, dtype).train(self.training)
        batch = _floats(batch.to(self.device), dtype)
        model.zero_grad(set_to_none=True)
        watch = Trace(model, _named(model, batch)) if trace else nullcontext()
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=variant.precision == "bf16")
        plain = asking("reference") if variant.backend == "reference" else nullcontext()
        with plain, watch, torch.set_grad_enabled(self.training):
            with half:
                output = model(batch)
            if self.training:
                output.loss.backward()
            if self.device.type == "cuda":
                raise_pending()
            named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
            norm = total_norm([x for _, x in named]).item() if named else math.nan
        numbers = {"loss": output.loss, **output.losses}
        losses = {name: x.item() for name, x in numbers.items()}
        bad = [name for name, x in named if not x.isfinite().all()]
        origin = watch.origin([*reversed(numbers.values()), *(x for _, x in named)]) if trace else None
        return Replayed(variant, losses, norm, [name for name, x in losses.items() if not math.isfinite(x)], bad, origin)

    def _fails(self, variant: Variant, indices: Sequence[int], seed: int) -> bool:
        return not self._replay(variant, self._batch(indices, seed)).finite

    def _smaller(self, variant: Variant, indices: list[int], seed: int) -> list[int]:
        """Dialogues that make it together, none of which can be left out."""
        for index in indices:
            rest = [other for other in indices if other != index]
            if rest and self._fails(variant, rest, seed):
                indices = rest
        return indices

    def found(self) -> Debugged:
        self.weights, where, exact = self._weights()
        self.model.load_tensors(self.weights)
        self.model.set_phase(self.facts.get("phase_name") or self.model.phases[int(self.phase) - 1])
        self.model.set_turn(int(self.facts.get("phase_step") or 0))
        run, config = self.run.path, self.config
        found = Debugged(str(self.dump), str(run), str(self.store.path), self.step, self.split, self.model.phase, [], where,
                         exact, {name: self.facts.get(name) for name in ("losses", "grad_norm", "metrics") if name in self.facts})
        tensors = {name: x for name, x in self.weights.items() if x.is_floating_point()}
        found.bad_weights = _bad(tensors)
        if checkpoint := self._checkpoint():
            found.checkpoint, found.bad_in_checkpoint = checkpoint.step, _bad(checkpoint.tensors["model"])
        widest = max(tensors, key=lambda name: tensors[name].nan_to_num(0, 0, 0).abs().max().item())
        found.largest_weight = Range.of(tensors[widest], widest)
        as_trained = "bf16" if config.precision == "bf16" else "float32"
        with reproducible(config.seed, config.deterministic, self.device), matmul_precision(config.matmul_precision):
            for indices, seed in self._batches():
                first = self._replay(Variant("kernels", as_trained), self._batch(indices, seed), trace=True)
                if not first.finite:
                    break
            batch, found.indices = self._batch(indices, seed), list(indices)
            found.bad_inputs = _bad(dict(_tensors(batch)))
            variants = [Variant("kernels", "float32")] * (as_trained == "bf16")
            variants += [Variant("kernels", "float64"), Variant("reference", "float32"), Variant("reference", "float64")]
            found.replays = [first, *(self._replay(each, batch, trace=True) for each in variants)]
            if again := found.again:
                found.alone = [index for index in indices if self._fails(again.variant, [index], seed)]
                if not found.alone and len(indices) > 1:
                    found.together = self._smaller(again.variant, list(indices), seed)
                found.words = self._words(found, batch)
        found.verdict, found.remedy = verdict(found, as_trained)
        return found

    # ---- whose rows they are

    def _words(self, found: Debugged, batch: Batch) -> list[str]:
        """The words at the rows that are bad: of the weights, else of the inputs, else of what the first op gave."""
        vocabulary = self.store.featurizer.vocabulary.words
        for each in found.bad_weights:
            if each.shape[:1] == (len(vocabulary),):
                return [vocabulary[row] for row in each.rows]
        again = found.again
        origin = again.origin if again else None
        for each in [*found.bad_inputs, *([origin.output] if origin else [])]:
            for name, words, dialogues in _packings(batch):
                if each.shape[:1] == (len(words),):
                    return [f"{vocabulary[words[row]]} ({name} row {row}, dialogue {found.indices[dialogues[row]]})"
                            for row in each.rows]
        return []


# ---- small parts


def _bad(tensors: dict[str, Tensor]) -> list[Range]:
    """Those that are not finite."""
    return [Range.of(x, name, LISTED) for name, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]


def _floats(batch: Batch, dtype: torch.dtype) -> Batch:
    return batch._map(lambda x: x.to(dtype) if x.dtype == torch.float32 else x)


def _tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch by name: "concept.intensity"."""
    for item in fields(value):
        found = getattr(value, item.name)
        if isinstance(found, Tensor):
            yield prefix + item.name, found
        elif is_dataclass(found):
            yield from _tensors(found, f"{prefix}{item.name}.")


def _named(model: DialogueModel, batch: Batch) -> dict[str, Tensor]:
    return {**dict(_tensors(batch)), **dict(model.named_buffers()), **dict(model.named_parameters())}


def _packings(batch: Batch) -> Iterator[tuple[str, list[int], list[int]]]:
    """(name, words, dialogues) of what the rows of a tensor may be."""
    yield "context", batch.context.tolist(), batch.context_segment.tolist()
    yield "reply", batch.target.tolist(), batch.target_segment.tolist()
    if batch.concept is not None:
        yield "concept", batch.concept.word.tolist(), batch.concept.graph.dialogue.tolist()
    if batch.emotional is not None:
        yield "emotional", batch.emotional.word.tolist(), batch.emotional.segment.tolist()


