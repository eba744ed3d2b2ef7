"""Checks of a run, by what opens it elsewhere: settings, how far it is, weights, vocabulary, store, checkpoints, knowledge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from case_fast.doctor.check import Finding, Look, command, counted, fail, ok, size, skip, warn
from case_fast.doctor.store import MOST_BYTES, GivenStore
from case_fast.errors import CheckpointError

if TYPE_CHECKING:
    from case_fast.models import DialogueModel
    from case_fast.runs import Record
    from case_fast.training import TrainConfig


class GivenRun:
    """A run that the user gave; what is read of it is read once, when it is first asked for."""

    def __init__(self, path: str, stores: Sequence[GivenStore] = ()):
        self.path, self.stores = path, stores

    @cached_property
    def record(self) -> Record:
        from case_fast.runs import Record

        return Record.read(self.path)

    @cached_property
    def config(self) -> TrainConfig:
        from case_fast.training import TrainConfig

        return TrainConfig.from_dict(self.record.config, saved=True)

    @cached_property
    def model(self) -> DialogueModel:
        from case_fast.runs import load_model

        return load_model(self.path, "cpu")[0]

    @property
    def result(self) -> dict[str, Any]:
        """How training ended; {} of a run that goes on or was stopped."""
        found = self.record.manifest.get("result")
        return found if isinstance(found, dict) else {}

    @property
    def step(self) -> int:
        """The last one that its log knows."""
        return int(self.record.newest("step", "checkpoint", "validation", "end").get("step") or 0)

    @property
    def has_weights(self) -> bool:
        """Whether its first validation is over."""
        return self.record.files.best.is_dir()

    @property
    def fingerprint(self) -> str:
        """Of the store that it was trained on; "" where its manifest does not say."""
        from case_fast.runs import lookup

        return str(lookup(self.record.manifest, "store.fingerprint") or "")

    def fits(self, store: GivenStore) -> bool:
        """Whether it was trained on this store, of which alone it can be resumed."""
        from case_fast.errors import DataError

        try:
            return store.manifest["fingerprint"] == self.fingerprint
        except DataError:  # as the store's own checks say
            return False

    @property
    def trained_on(self) -> str:
        """The path of its store: of those given the one that it was trained on or the first, else as its manifest has it."""
        from case_fast.runs import lookup

        given = [*filter(self.fits, self.stores), *self.stores]
        return given[0].path if given else str(lookup(self.record.manifest, "store.path") or "STORE")

    def resume(self) -> str:
        """The line that goes on with it."""
        return command("case-fast", "train", "--config", f"{self.path}/config.json", "--data", self.trained_on, "--out",
                       self.path, "--resume")

    def looks(self) -> Iterator[Look]:
        yield Look("settings", self._settings, command("ls", "-l", self.path))
        resume = self.resume()
        yield Look("training", self._training, resume)
        yield Look("weights", self._weights, resume)
        yield Look("vocabulary", self._vocabulary, self._features_again())
        yield Look("store", self._store, command("case-fast", "evaluate", self.path, "--data", self.trained_on))
        yield Look("checkpoints", self._checkpoints, resume)
        yield Look("knowledge", self._knowledge, command("case-fast", "chat", self.path, "--knowledge", "atomic:PATH"))

    def _features_again(self) -> str:
        return f"{command('rm', '-r', self.record.files.features)} && {self.resume()}"

    def _settings(self) -> Finding:
        if not self.record.config:
            return fail("there is no config.json that can be read" + _listed(self.record.problems), self.resume())
        from case_fast.models import title_of

        config = self.config
        kind = title_of(config.model.kind) + (f" {config.ablation}" if config.ablation else "")
        return ok(f"{kind}, width {config.model.d_model}, batches of {config.batch_size}, seed {config.seed}")

    def _training(self) -> Finding:
        record = self.record
        if record.problems:
            return warn(f"step {self.step:,}{_listed(record.problems)}", command("case-fast", "report", self.path))
        if dumps := sorted(record.files.failures.glob("*.json")):
            return warn(f"a loss or gradient was not finite: {', '.join(path.name for path in dumps)}; last step {self.step:,}",
                        command("case-fast", "debug", dumps[-1]))
        if self.result:
            return ok(f"finished after {self.result.get('steps', 0):,} steps ({self.result.get('stopped')})")
        return ok(f"begun, not finished: step {self.step:,}")

    def _weights(self) -> Finding:
        if not self.has_weights:
            return skip("none yet: the first validation writes them", self.resume())
        bad = [name for name, x in self.model.state_dict().items() if x.is_floating_point() and not x.isfinite().all()]
        if bad:
            return fail(f"not finite: {', '.join(bad[:3])}", self.resume())
        return ok(f"{sum(x.numel() for x in self.model.parameters()):,} parameters, all finite")

    def _vocabulary(self) -> Finding:
        """That of the run beside the model's and that of each store that was given."""
        from case_fast.runs import load_features

        if not self.has_weights:
            return skip("no weights yet to compare it with", self.resume())
        words = self.model.config.vocab_size
        featurizer, _ = load_features(self.path, words)
        for store in self.stores:
            theirs = store.opened.featurizer.vocabulary.words
            if theirs != featurizer.vocabulary.words:
                return fail(f"{words:,} words, and other ones in {store.path} ({len(theirs):,}): this run cannot be used with it",
                            command("case-fast", "train", "--data", store.path, "--out", f"{self.path}.new"))
        return ok(f"{words:,} words, the model's" + (f" and those of {self.stores[0].path}" if self.stores else ""))

    def _store(self) -> Finding:
        """Whether what it was trained on is there."""
        from case_fast.runs import lookup

        path, fingerprint = lookup(self.record.manifest, "store.path"), self.fingerprint
        if not fingerprint:
            return warn("the manifest does not say what it was trained on", self.resume())
        for store in filter(self.fits, self.stores):
            return ok(f"trained on {store.path}")
        if self.stores:
            return warn(f"trained on {path} ({fingerprint[:12]}), not on {self.stores[0].path}: it cannot be resumed with that",
                        command("case-fast", "doctor", self.path, path))
        if self.record.store:
            return ok(f"trained on {path}, which is there unchanged")
        return warn(f"trained on {path} ({fingerprint[:12]}), which is not there, or is another one by now",
                    command("case-fast", "doctor", self.path, "STORE"))

    def _checkpoints(self) -> Finding:
        """The newest that is whole. Older ones are looked at only where newer ones are not."""
        from case_fast.training.checkpoint import Checkpoints

        checkpoints, damaged = Checkpoints(self.record.files.checkpoints), []
        steps = checkpoints.steps()
        if not steps:
            return skip("none yet", self.resume())
        for step in reversed(steps):
            whole = sum(path.stat().st_size for path in checkpoints.path(step).glob("*"))
            if whole > MOST_BYTES:
                return skip(f"the newest is of step {step:,}; {size(whole)} are too much for a look", self.resume())
            try:
                checkpoints.check(step)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            said = f"the newest that is whole is of step {step:,}, {size(whole)}"
            return warn(f"{said}; {'; '.join(damaged)}", self.resume()) if damaged else ok(said)
        return fail(f"none of {counted(len(steps), 'checkpoint')} is whole: {'; '.join(damaged)}",
                    f"{command('mv', self.path, f'{self.path}.damaged')} && "
                    + command("case-fast", "train", "--config", f"{self.path}.damaged/config.json", "--data", self.trained_on,
                              "--out", self.path))

    def _knowledge(self) -> Finding:
        """Whether chat finds where inferences come from."""
        from case_fast.runs import load_features

        if not self.has_weights:
            return skip("no weights yet to chat with", self.resume())
        spec = load_features(self.path, self.model.config.vocab_size)[1]["spec"]
        kind, _, path = spec.partition(":")
        other = command("case-fast", "chat", self.path, "--knowledge", "atomic:PATH")
        if kind == "imported":
            return warn("came with an imported file, which says nothing about new texts: chat asks for a source", other)
        if path and not Path(path).exists():
            return warn(f"{spec} is not there any more: chat asks for it", other)
        return ok(f"{spec}, which is there" if path else "the bundled sample's")


def _listed(problems: Sequence[str]) -> str:
    return f"; {'; '.join(problems)}" if problems else ""
