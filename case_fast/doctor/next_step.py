"""What comes next, and whether it can: the disk, the time by a probe, the command."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from case_fast.doctor.check import Check, Finding, Look, command, counted, fail, ok, size, skip, warn
from case_fast.doctor.files import SOURCES, missing
from case_fast.doctor.given import Given
from case_fast.doctor.probe import evaluation_seconds, in_words, training_steps

if TYPE_CHECKING:
    from case_fast.training import TrainConfig

_OF_DIALOGUES = 15  # bytes of store and cache for each of the dialogues: EmpatheticDialogues with inferences from ATOMIC
_LITTLE = 64 << 20  # bytes: of an evaluation, a chat, the demo, more than any of them took
_LEAST_TRAINING = 1 << 30
SECONDS, LEAST_SECONDS = 2.0, 0.5  # that a probe may take, and that it may even where all has to end before


class NextStep:
    """The step that is asked for, or else the one that what was given leads to.

    Args:
        asked: "prepare", "train", "evaluate" or "chat"; "" leaves it open.
        before: the checks so far.
        until: when all has to end, by `time.monotonic`.
    """

    def __init__(self, asked: str, paths: Sequence[str], given: Given, before: Sequence[Check], until: float):
        self.asked, self.paths, self.data, self.until = asked, paths, given.data, until
        self.store, self.run = next(iter(given.stores), None), next(iter(given.runs), None)
        self.failed = [check for check in before if check.state == "fail"]

    @cached_property
    def step(self) -> str:
        if self.asked:
            return self.asked
        if self.run is not None:
            return ("evaluate" if self.store is not None else "chat") if self.run.result else "train"
        return "train" if self.store is not None else "prepare" if self.data else "demo"

    def looks(self) -> Iterator[Look]:
        yield Look("disk", self._disk, command("df", "-h", self._place()))
        yield Look("time", self._time, command("case-fast", "doctor", *self.paths))
        yield Look("command", self._command, command("case-fast", self.step, "--help"))

    # ---- what it needs

    @property
    def lacking(self) -> list[str]:
        """What the step needs and nobody gave."""
        if self.step == "prepare":
            return ["COMET" if name == "ATOMIC" else name for name, source in missing(self.data).items() if source.needed]
        needs = {"train": ["store"], "evaluate": ["run", "store"], "chat": ["run"], "demo": []}[self.step]
        there = {"run": self.run is not None, "store": self.store is not None or (self.step == "train" and self._own_store())}
        return [f"a {name}" for name in needs if not there[name]]

    def _own_store(self) -> bool:
        """Whether the store that the run was trained on is still there."""
        return self.run is not None and bool(self.run.record.store)

    @property
    def config(self) -> TrainConfig:
        """The settings to train by: the run's, or the first preset's, of the bundled sample the demo's."""
        from case_fast.training import preset

        return self.run.config if self.run is not None else preset(self._preset())

    def _preset(self) -> str:
        return "demo" if self.store is not None and self.store.manifest.get("bundled") else "paper"

    def _place(self) -> str:
        """Where it writes."""
        return self.run.path if self.run is not None else os.curdir

    # ---- the checks

    def _disk(self) -> Finding:
        place = self._place()
        free, needed = shutil.disk_usage(place).free, self._needed()
        said = f"{size(free)} free, about {size(needed)} needed to {self.step}"
        if free < needed:
            return fail(said, command("df", "-h", place))
        return warn(said, command("df", "-h", place)) if free < 2 * needed else ok(said)

    def _needed(self) -> int:
        """Bytes, about."""
        if self.step == "prepare" and "EmpatheticDialogues" in self.data:
            path = Path(self.data["EmpatheticDialogues"])
            files = path.iterdir() if path.is_dir() else [path]
            return _OF_DIALOGUES * sum(file.stat().st_size for file in files if file.is_file())
        if self.step == "train" and not self.lacking and not self.failed:
            # the best weights; weights and Adam's two moments in each checkpoint, of which there is one more while it is written
            return 4 * self._parameters() * (1 + 3 * (self.config.keep_checkpoints + 1)) + _LITTLE
        return _LEAST_TRAINING if self.step in ("prepare", "train") else _LITTLE

    def _parameters(self) -> int:
        import torch

        from case_fast.models import model_class

        config = self.config.resolved(self._words())
        with torch.device("meta"):
            return sum(x.numel() for x in model_class(config.model.kind)(config.model).parameters())

    def _words(self) -> int:
        if self.store is not None:
            return len(self.store.opened.featurizer.vocabulary)
        return self.config.model.vocab_size

    def _time(self) -> Finding:
        again = command("case-fast", "doctor", *self.paths)
        if self.step == "prepare":
            return skip("not estimated: the knowledge decides it, a minute with ATOMIC, with COMET on a CPU days; Ctrl-C is safe",
                        "case-fast prepare --help")
        if self.step == "demo":
            return skip("not measured: the demo takes about a minute on two cores", "case-fast demo --out demo")
        if self.step == "chat":
            return skip("not estimated: a reply takes well below a second, with COMET on a CPU some seconds more", again)
        if self.store is None:
            return skip("not estimated: no store given", f"{again} STORE")
        if self._obstacle() or any(check.path in (self.store.path, self._place()) for check in self.failed):
            return skip("not estimated: what is wrong comes first", again)
        return self._evaluation() if self.step == "evaluate" else self._training()

    def _obstacle(self) -> tuple[str, str] | None:
        """Why what was given cannot be used together, though each part may be sound, and a line that can; None where it can."""
        if self.run is None:
            return None
        if self.step in ("evaluate", "chat") and not self.run.has_weights:
            return f"{self.run.path} has no weights to {self.step} with yet: its first validation writes them", self.run.resume()
        if self.step == "train" and self.store is not None and not self.run.fits(self.store):
            return (f"{self.run.path} was trained on another store than {self.store.path}: it cannot be resumed with that",
                    command("case-fast", "train", "--data", self.store.path, "--out", f"{self.run.path}.new"))
        return None

    def _training(self) -> Finding:
        store, config = self.store.opened, self.config
        if self.run is not None and self.run.result:
            return ok("none: training has finished")
        began = time.monotonic()
        seconds = training_steps(store, config, self._seconds())
        probe = time.monotonic() - began
        lengths = dict(zip(seconds, map(config.fewest, config.lengths(store.size("train"))), strict=True))
        done = self.run.step if self.run is not None else 0
        whole, parts = 0.0, []
        for phase, steps in lengths.items():
            left, done = max(0, steps - done), max(0, done - steps)
            whole += left * seconds[phase]
            if left:
                parts.append(f"{left:,} steps{f' of phase {phase}' if len(lengths) > 1 else ''} at {1e3 * seconds[phase]:.0f} ms")
        return ok(f"about {in_words(whole)} at least, by a probe of {probe:.1f} s: {' and '.join(parts) or 'no step is left'}; "
                  "validations not counted")

    def _evaluation(self) -> Finding:
        if self.run is None:
            return skip("not estimated: no run given", command("case-fast", "doctor", "RUN", *self.paths))
        began = time.monotonic()
        whole = evaluation_seconds(self.run.model, self.store.opened, "test", self._seconds())
        probe = time.monotonic() - began
        return ok(f"about {in_words(whole)} for the split test on the CPU, by a probe of {probe:.1f} s, replies decoded greedily")

    def _seconds(self) -> float:
        """That a probe may take now."""
        return min(SECONDS, max(LEAST_SECONDS, self.until - time.monotonic()))

    def _command(self) -> Finding:
        finding = fail if self.asked else warn
        if obstacle := self._obstacle():
            return finding(*obstacle)
        if self.lacking:
            wanted = [name.removeprefix("a ").upper() if name.startswith("a ") else name for name in self.lacking]
            line = command("case-fast", "doctor", *self.paths, *wanted, "--for", self.step)
            return finding(f"to {self.step} takes {' and '.join(self.lacking)} too, which was not given", line)
        if self.failed:
            first = self.failed[0]
            where = f"{first.group} {first.path}".strip()
            return skip(f"{counted(len(self.failed), 'check')} failed; begin with {first.name} under {where}", first.remedy)
        return Finding("ok", self._said(), self._line())

    def _said(self) -> str:
        return {"prepare": "all is there for a store", "train": "goes on with the run" if self.run else "all is there to train",
                "evaluate": "all is there to evaluate the run", "chat": "all is there to talk to the run",
                "demo": "nothing was given; the whole way on the bundled toy corpus"}[self.step]

    def _line(self) -> str:
        if self.step == "prepare":
            options = [(SOURCES[kind].option, f"{kind.lower()}:{path}" if SOURCES[kind].option == "knowledge" else path)
                       for kind, path in self.data.items()]
            given = [word for option, path in options for word in (f"--{option}", path)]
            return command("case-fast", "prepare", *given, "--out", "ed.store")
        if self.step == "train":
            if self.run is not None:
                return self.run.resume()
            return command("case-fast", "train", "--preset", self._preset(), "--data", self.store.path, "--out", "ed.run")
        if self.step == "evaluate":
            return command("case-fast", "evaluate", self.run.path, "--data", self.store.path, "--split", "test")
        return command("case-fast", "chat", self.run.path) if self.step == "chat" else "case-fast demo --out demo"
