"""The training loop: a model's phases, validation, early stopping, and a run that can be killed and resumed at any step."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from case_fast.batch import Batch
from case_fast.data import Store
from case_fast.data.workers import Workers
from case_fast.devices import device_name
from case_fast.diagnosis import figures, held_out, in_short, look
from case_fast.errors import CaseFastError, CheckpointError, ConfigError, DataError, Interrupted
from case_fast.memory import keep_freed_memory
from case_fast.models import DialogueModel, model_class
from case_fast.models.base import Length
from case_fast.optional import PlainConsole, open_console
from case_fast.references import read_references
from case_fast.runs import Run, writing
from case_fast.training.checkpoint import (
    MAX_HEADER_BYTES,
    Checkpoint,
    Checkpoints,
    load_optimizer,
    optimizer_tensors,
    rng_state,
    set_rng_state,
)
from case_fast.training.config import TrainConfig, refuse_changes
from case_fast.training.log import Display, in_words, perplexity
from case_fast.training.process import StopRequest, matmul_precision, peak_memory, reproducible
from case_fast.training.processes import Processes, resumes, together
from case_fast.training.sampler import Sampler, step_seed
from case_fast.training.schedule import EarlyStopping, cooling, noam
from case_fast.training.step import Prepared, StepTaken, Taken

if TYPE_CHECKING:
    from rich.console import Console

VALIDATION_BATCH = 32
DIAGNOSED = 8  # batches of 16 that are looked at in each validation


class NotFinite(CaseFastError, ArithmeticError):
    """A loss or a gradient is NaN or infinite; the message names the step and the dump."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. ``phase_1_steps``: those before the last phase. ``best``: ppl, accuracy (emotions) and losses of the
    validation whose weights are RUN/best."""

    run: Path
    steps: int
    phase_1_steps: int
    stopped: str
    best_step: int
    best: dict[str, Any] = field(default_factory=dict)


def train(
    store: Store, out: str | Path, config: TrainConfig, console: Console | PlainConsole | None = None, resume: bool | str = False
) -> TrainResult:
    """Train a model on ``store`` into the run folder ``out``; by several processes where a launcher started them
    (`case_fast.training.processes`).

    Resuming goes on from the newest sound checkpoint, bit for bit as if nothing had happened (on the same device, with as
    many threads and processes). Ctrl-C and SIGTERM end the step, write a checkpoint and raise; a second one aborts at once.

    Args:
        resume: whether to go on with the run in ``out``; "auto": if there is one.

    Raises:
        ConfigError: a setting cannot work here, or differs from those of the run that is resumed; so for the store.
        CheckpointError: ``out`` holds a run and ``resume`` is False, or none and it is True; nothing can be written; all
            checkpoints are damaged.
        DataError: the store lacks the splits train and valid, or a field that the model reads.
        Interrupted: stopped by the user, state saved.
        NotFinite: a loss or gradient became NaN or infinite.
        Elsewhere: another process failed, or does not answer; Unlike: has other weights.
    """
    with trainer(store, out, config, console, resume) as ready:
        return ready.train()


@contextmanager
def trainer(store: Store, out: str | Path, config: TrainConfig, console: Console | PlainConsole | None = None,
            resume: bool | str = False) -> Iterator[Trainer]:
    """The run that `train` trains, ready for its next step and held by this process alone; errors are those of `train`."""
    for split in ("train", "valid"):
        if split not in store.splits or store.size(split) == 0:
            raise DataError(store.path, f"the store has no {split} examples", "Training needs the splits train and valid")
        store.require(split, model_class(config.model.kind).needs)
    keep_freed_memory()
    config = config.resolved(len(store.featurizer.vocabulary))
    with together(config.device) as processes:
        device, run = processes.device(config.device), processes.run(out)
        resume = processes.value(resumes(resume, run))
        with run.held(resume):
            processes.check(config, store)
            if resume:
                ran_on = run.read_manifest().get("store")
                refuse_changes(run.path, run.read_config(), ran_on if isinstance(ran_on, dict) else {}, config, store)
            with (
                reproducible(config.seed, config.deterministic, device),
                matmul_precision(config.matmul_precision),
                processes.stop_request() as stop,
                Display(processes.console(console or open_console())) as display,
                Workers(store, config.workers) as workers,
                ThreadPoolExecutor(1, "case_fast batches") as pool,
            ):
                ready = Trainer(store, run, config, device, processes, display, stop, workers, pool, resume)
                try:
                    yield ready
                finally:
                    ready.close()


class Trainer:
    """One run, from its set-up or newest checkpoint to its end. ``step`` counts optimizer steps over all phases; ``began`` holds
    where each phase up to the present one began."""

    def __init__(self, store: Store, run: Run, config: TrainConfig, device: torch.device, processes: Processes, display: Display,
                 stop: StopRequest, workers: Workers, pool: ThreadPoolExecutor, resume: bool):
        self.store, self.run, self.config, self.device, self.processes = store, run, config, device, processes
        self.display, self.stop, self.workers, self.pool = display, stop, workers, pool
        costs = None if config.batching == "shuffled" else store.costs("train")
        self.sampler = Sampler(store.size("train"), config.batch_size, config.seed, config.batching, costs)
        self.valid_size = min(store.size("valid"), config.valid_limit or store.size("valid"))
        self.lengths = config.lengths(self.sampler.examples)
        self.step = 0
        self.began = self._began_by(0)
        self.validated = 0  # step of the last validation
        self.stopping = EarlyStopping(config.patience, self.length.min_steps)  # of the phase
        self.best: dict[str, Any] = {}

        self.model = self._new_model()
        self.form = processes.make_step(store, self.sampler, self.model, config, device)
        self.optimizer, self.parameters = self.form.optimizer, self.form.parameters
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.names = [names[id(parameter)] for parameter in self.parameters]
        self.checkpoints = Checkpoints(run.checkpoints, config.keep_checkpoints)
        if resume:
            self._restore()
        # a checkpoint holds both moments of Adam too; it is written before the one in whose place it comes is removed
        run.require_room(self._weight_bytes * (3 if resume else 7), begun=resume)
        run.set_up(config.as_dict(), store, device)
        self.model.set_phase(self.phase_name)
        with writing("the log", run.path):
            self.log = processes.log(run, self.step if resume else None)
        self.batches = self._ahead(self._training_batch, itertools.count(self.step))
        self.recent: deque[StepTaken] = deque(maxlen=config.log_every)

    def _new_model(self) -> DialogueModel:
        config = self.config
        model = model_class(config.model.kind)(config.model)
        pretrained = self.store.embeddings()
        if pretrained is not None:
            ids, vectors = pretrained
            if vectors.shape[1] != config.model.d_model:
                own, theirs = config.model.d_model, vectors.shape[1]
                raise ConfigError(
                    f"model.d_model is {own} and the store's word vectors have {theirs} numbers: set model.d_model to {theirs}, "
                    "or prepare a store without vectors"
                )
            model.load_embeddings(ids, vectors)
        return model.to(self.device).train()

    # ---- where the run stands

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def _began_by(self, step: int) -> list[int]:
        """Where phases have begun by a step, as far as lengths alone decide it."""
        began = [0]
        for length in self.lengths[:-1]:
            if length.validate_every is not None or step < began[-1] + length.steps:
                break
            began.append(began[-1] + length.steps)
        return began

    @property
    def phase(self) -> int:
        """Its number, from 1; the last phase trains the whole objective."""
        return sum(began <= self.step for began in self.began)

    @property
    def length(self) -> Length:
        return self.lengths[self.phase - 1]

    @property
    def phase_name(self) -> str:
        return self.model.phases[self.phase - 1]

    @property
    def in_last_phase(self) -> bool:
        return self.phase == len(self.lengths)

    @property
    def phase_step(self) -> int:
        return self.step - self.began[self.phase - 1]

    @property
    def phase_total(self) -> int:
        """Steps of this phase: of one that early stopping may end, the fewest that it can still have."""
        every, most = self.length.validate_every, self.length.steps
        if every is None:
            return most or 0
        earliest = self.stopping.earliest_stop(self.phase_step, every)
        return min(earliest, most or earliest)

    @property
    def at_the_limit(self) -> bool:
        return self.length.steps is not None and self.phase_step >= self.length.steps

    @property
    def validation_due(self) -> bool:
        every = self.length.validate_every
        due = every is not None and self.phase_step > 0 and (self.phase_step % every == 0 or self.at_the_limit)
        return due and self.validated != self.step

    @property
    def stopped(self) -> str:
        """Why the phase is over, or ""; with the last one the run is."""
        if self.stopping.stop:
            return "early stopping"
        return "max_steps" if self.at_the_limit and (self.length.validate_every is None or self.validated == self.step) else ""

    # ---- the run

    def train(self) -> TrainResult:
        """Every step that is left, to the end or to a stop request; raises what the function `train` does."""
        self._introduce()
        begun = 0
        while True:
            if self.stopped and not self.in_last_phase:
                self._next_phase()
            if self.phase != begun:
                begun = self.phase
                self._begin_phase()
            if self.validation_due:
                self.collect()
                self._validate()
            if self.stopped and self.in_last_phase:
                break
            if self.stopped:
                continue
            if signal := self.processes.signal:
                path = self._save()
                self.processes.wait()
                raise Interrupted(f"stopped by {signal} after step {self.step}; the state is in {path}. "
                                  f"Continue with the same command and --resume")
            if self.step and self.step % self.config.checkpoint_every == 0:
                self._save()
            self.train_step()
        self._save()
        return self._finish()

    def close(self) -> None:
        try:
            self.log.close()
        except OSError as error:  # TensorBoard's last lines; the run itself is safe or has said why not
            self.display.line(f"TensorBoard's files are incomplete: {error}")

    def _introduce(self) -> None:
        self.display.line(
            f"{type(self.model).__name__} with {self.parameter_count:,} trained parameters on {self.device} "
            f"({device_name(self.device)}){self.processes.in_words}; {self.sampler.examples:,} training dialogues, "
            f"{self.sampler.steps_per_epoch:,} steps an epoch; {self.valid_size:,} for validation"
        )
        self.display.line(", then ".join(said for number in range(len(self.lengths)) if (said := self._said_of(number))))
        unknown = self.store.manifest.get("counts", {}).get("unknown_response_words", {})
        if unknown:
            shares = ", ".join(f"{100 * share:.2f} % ({split})" for split, share in unknown.items())
            self.display.line(f"unknown words among the words of the replies: {shares}")
        if self.step:
            self.display.line(f"resumed after step {self.step:,}")
            self.log.write("resume", self.phase, self.step)

    def _said_of(self, number: int) -> str:
        """How long a phase is, in words; "" if it has no steps."""
        length, config = self.lengths[number], self.config
        if length.validate_every is None:
            return f"{length.steps:,} steps of phase {number + 1}" if length.steps else ""
        ends = "training" if number + 1 == len(self.lengths) else f"phase {number + 1}"
        most = f"; {length.steps:,} steps at most" if length.steps else ""
        most += f", the learning rate falling over the last {length.cooldown:,}" if length.cooldown else ""
        return (f"{config.fewest(length):,} steps at least: {config.patience} validations in a row without a better perplexity "
                f"end {ends}, one every {length.validate_every:,} steps, counted from step {length.min_steps:,} on{most}")

    def _next_phase(self) -> None:
        """Leave the phase that is over; where it was validated, with its best weights."""
        self.collect()
        began = self.step
        if self.length.validate_every is None:
            began = self.began[-1] + (self.length.steps or 0)
        else:
            self.display.line(f"phase {self.phase} ({self.phase_name}) is over ({self.stopped}); what follows begins with its "
                              f"best weights, of step {self.best_step:,}: {in_words(self.best)}")
            self.processes.load_weights(self.model, self.run.best_of(self.phase_name) / "model.safetensors")
        self.began.append(began)
        self.stopping, self.best = EarlyStopping(self.config.patience, self.length.min_steps), {}

    @property
    def best_step(self) -> int:
        return self.began[-1] + self.stopping.best_step

    def _begin_phase(self) -> None:
        self.collect()
        self.model.set_phase(self.phase_name)
        self.log.write("phase", self.phase, self.step, name=self.phase_name)
        title = f"phase {self.phase} ({self.phase_name})" if len(self.model.phases) > 1 else "training"
        self.display.bar(title, self.phase_step, self.phase_total)
        self.recent.clear()  # the phases have other losses

    def _finish(self) -> TrainResult:
        result = TrainResult(self.run.path, self.step, self.began[-1], self.stopped, self.best_step, self.best)
        self.log.write("end", self.phase, self.step, stopped=self.stopped, best_step=self.best_step, best=self.best)
        self.run.finish(parameters=self.parameter_count, result=asdict(result) | {"run": str(self.run.path)})
        self.display.line(f"done after {self.step:,} steps ({self.stopped}); best after step {self.best_step:,}: "
                          f"{in_words(self.best)}")
        self.processes.wait()
        return result

    # ---- batches

    def _ahead(self, ask: Callable[[Any], Callable[[], Any]], keys: Iterable[Any]) -> Iterator[Any]:
        """``ask(key)()`` for each key in turn, the next ones being made in the background meanwhile: by a thread, or by the
        workers, from whom the thread fetches them."""
        waiting: deque[Future[Any]] = deque()
        for key in keys:
            waiting.append(self.pool.submit(ask(key)))
            if len(waiting) > max(1, self.config.workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _batch(self, split: str, indices: Sequence[int], seed: int) -> Callable[[], Batch]:
        make = self.workers.ask if self.config.workers else partial(partial, self.store.batch)
        return make(split, indices, self.model.needs, seed)

    def _training_batch(self, step: int) -> Callable[[], Prepared]:
        indices, negatives = self.sampler.indices(step), self.config.gather_negatives
        batch = self._batch("train", self.processes.share(indices), step_seed(self.config.seed, step))
        return lambda: self.form.prepared(self.processes.shared(batch(), len(indices), negatives))

    def _validation_batch(self, start: int) -> Callable[[], Batch]:
        batch = self._batch("valid", range(start, min(start + VALIDATION_BATCH, self.valid_size)), seed=0)
        return lambda: batch().pin_memory() if self.device.type == "cuda" else batch()

    # ---- one step

    def train_step(self) -> None:
        """One step of the optimizer, the last of ``recent``; its numbers come at the latest when a record of the log is due."""
        config, started = self.config, time.perf_counter()
        batch = next(self.batches)
        lr = noam(self.step + 1, config.model.d_model, config.warmup, config.lr_scale)
        lr *= cooling(self.phase_step + 1, self.length.steps, self.length.cooldown)
        self.model.set_turn(self.phase_step)
        self.form.take(batch, lr)
        # step and phase before the count moves on: the last step of phase 1 is one of phase 1
        phase, phase_step, phase_total = self.phase, self.phase_step + 1, self.phase_total
        self.step += 1
        taken = StepTaken(batch.dialogues, batch.words)
        self.recent.append(taken)
        due = self.step % config.log_every == 0
        if due or self.form.at_once:
            self.collect()
        taken.seconds = time.perf_counter() - started
        if due:
            self._log_step(phase, lr)
        self.display.step(phase_step, phase_total, self._status(lr))

    def collect(self) -> None:
        """The numbers of the latest steps, as far as they have not come yet; raises `NotFinite` where one of them had to."""
        found = self.form.collect()
        first = self.step - len(found) + 1
        for taken, numbers in zip(list(self.recent)[len(self.recent) - len(found) :], found, strict=True):
            taken.numbers = numbers
        for step, numbers in enumerate(found, first):
            if not numbers.finite:
                self._fail(step, numbers)

    def _fail(self, step: int, numbers: Taken) -> None:
        self.step = step - 1  # where the weights are
        self.model.set_turn(self.phase_step)
        losses, norm = numbers.losses, numbers.norm
        indices, seed = self.sampler.indices(self.step), step_seed(self.config.seed, self.step)
        self.form.examine(lambda: self.form.prepared(self.store.batch("train", indices, self.model.needs, seed)))
        bad = [name for name, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        kept = self._dump("train", step, indices=indices, seed=seed, losses=losses, grad_norm=norm,
                          parameters_with_bad_gradients=bad)
        what = f"loss {losses['loss']}" if not math.isfinite(losses["loss"]) else f"norm of the gradients {norm}"
        raise NotFinite(f"step {step}: {what}; nothing was changed by this step. {kept}; the last checkpoint is untouched")

    def _dump(self, split: str, step: int, **facts: Any) -> str:
        """Keep what is known of a failure; in words, where. A disk that is full as well does not hide the failure."""
        at = {"phase": self.phase, "phase_name": self.phase_name, "phase_step": self.phase_step, "split": split}
        try:
            path = self.run.dump(step, at | facts, self.model.state_dict())
            self.log.write("failure", self.phase, step, **facts)
        except CheckpointError as error:
            return f"What is known could not be kept ({error})"
        return f"Batch and losses are in {path}, and case-fast debug {path} looks into them"

    # ---- numbers of the latest steps

    def _speed(self) -> tuple[float, float]:
        """Dialogues and words (of contexts and replies) a second; validation and saving are left out."""
        seconds = max(sum(taken.seconds for taken in self.recent), 1e-9)
        return sum(taken.dialogues for taken in self.recent) / seconds, sum(taken.words for taken in self.recent) / seconds

    def _status(self, lr: float) -> str:
        dialogues, words = self._speed()
        losses = next((taken.losses for taken in reversed(self.recent) if taken.numbers), {})
        shown = f"loss {losses['loss']:.3f}" if losses else "loss to come"
        if "generation" in losses:
            shown += f", perplexity {perplexity(losses['generation']):.1f}"
        return f"{shown}, lr {lr:.1e}, {dialogues:.0f} dialogues/s, {words:,.0f} words/s"

    def _log_step(self, phase: int, lr: float) -> None:
        """Losses are means over the steps since the last record, those of a turn over its own, the rest is of the last step."""
        found: dict[str, list[float]] = {}
        for taken in self.recent:
            for name, value in taken.losses.items():
                found.setdefault(name, []).append(value)
        means = {name: sum(values) / len(values) for name, values in found.items()}
        dialogues, words = self._speed()
        last = self.recent[-1].numbers
        assert last is not None
        self.log.write(
            "step", phase, self.step, loss=means.pop("loss"), losses=means, lr=lr, grad_norm=last.norm,
            diagnostics=last.diagnostics,
            examples_per_second=round(dialogues, 2), words_per_second=round(words, 1), **peak_memory(self.device),
        )

    # ---- validation

    def _validate(self) -> None:
        """Measure the validation split; keep the weights if they are the best. A stop request ends it without a result."""
        started = time.perf_counter()
        batches = self._ahead(self._validation_batch, self.processes.part(range(0, self.valid_size, VALIDATION_BATCH)))
        found = read_references(self.model, itertools.takewhile(lambda _: not self.stop.signal, batches), self.form.forward)
        found = self.processes.joined(found)
        if self.processes.signal:
            return
        mean, losses = found.mean_nll, dict(found.losses)
        metrics: dict[str, Any] = {"ppl": perplexity(mean), "ppl_geometric": perplexity(found.mean_nll_of_replies),
                                   "accuracy": found.accuracy, "loss": losses.pop("loss"), "losses": losses,
                                   "examples": self.valid_size, "target_words": found.words}
        if not math.isfinite(mean):
            kept = self._dump("valid", self.step, metrics=metrics)
            raise NotFinite(f"validation after step {self.step}: mean negative log-likelihood {mean}. {kept}")
        better = self.stopping.update(self.phase_step, mean)
        if better:
            self.best = metrics
            self.run.save_best(self.model, "" if self.in_last_phase else self.phase_name)
        self.validated = self.step
        diagnosis = self._diagnosis() if self.processes.first else {}
        seconds = time.perf_counter() - started
        self.log.write("validation", self.phase, self.step, **metrics, best=better, failures=self.stopping.failures,
                       diagnosis=diagnosis, seconds=round(seconds, 2))
        verdict = "the best so far" if better else f"not better than at step {self.best_step:,}"
        if self.stopping.failures:
            verdict += f", {self.stopping.failures} of {self.config.patience} before stopping"
        self.display.line(f"validation after step {self.step:,}: {in_words(metrics)}; {verdict}")
        if diagnosis:
            said = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in diagnosis.items())
            self.display.line(f"diagnosis after step {self.step:,}: {said}")

    @cached_property
    def _held_out(self) -> list[Batch]:
        """What each validation looks inside the model with: always the same batches."""
        groups = held_out(self.store, "valid", DIAGNOSED)
        return list(self._ahead(lambda group: self._batch("valid", group, seed=0), groups))

    def _diagnosis(self) -> dict[str, float]:
        """Whether knowledge is read and the alignments align, in short; {} of a model that has nothing to look at."""
        insides = look(self.model, self._held_out, self.form.forward)
        return in_short(figures(insides)) if insides else {}

    # ---- saving and coming back

    @property
    def _weight_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.model.state_dict().values())

    def _save(self) -> Path:
        self.collect()  # a checkpoint is of steps that are known to be sound
        self.processes.compare(self.model)
        if not self.processes.first:
            return self.checkpoints.path(self.step)
        started = time.perf_counter()
        state = {
            "config": self.config.as_dict(),
            "store": {"path": str(self.store.path.resolve()), "fingerprint": self.store.fingerprint},
            "rng": rng_state(self.device),
            "began": self.began,
            "validated": self.validated,
            "stopping": {"best": self.stopping.best, "best_step": self.stopping.best_step, "failures": self.stopping.failures},
            "best": self.best,
        }
        tensors = {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.optimizer, self.names)}
        path = self.checkpoints.save(self.step, tensors, state)
        seconds = time.perf_counter() - started
        self.log.write("checkpoint", self.phase, self.step, seconds=round(seconds, 3))
        return path

    def _restore(self) -> None:
        found = self.processes.checkpoint(self._newest)
        if found is None:
            self.display.line("there is no checkpoint yet: the run starts from the beginning")
        else:
            self._take(found)

    def _newest(self) -> Checkpoint | None:
        self.checkpoints.clean()
        return self.checkpoints.newest(max_bytes=3 * self._weight_bytes + MAX_HEADER_BYTES)

    def _take(self, found: Checkpoint) -> None:
        try:
            ran, ran_on, state = found.state["config"], found.state["store"], found.state["stopping"]
            if retired := self.model.load_tensors(found.tensors["model"]):
                self.display.line(f"the run is of an earlier version ({', '.join(retired)} is not used any more): dropout and "
                                  "drawn negatives follow another rule from here on")
            load_optimizer(self.optimizer, self.names, found.tensors["optimizer"])
            self.step, self.validated, self.best = found.step, int(found.state["validated"]), dict(found.state["best"])
            self.began = list(found.state.get("began", self._began_by(found.step)))  # not there: of an earlier version
            done = self.phase_step if self.phase_name == self.config.open_phase else 0
            refuse_changes(self.run.path, ran, ran_on, self.config, self.store, done)
            self.stopping = EarlyStopping(self.config.patience, self.length.min_steps, **state)
            set_rng_state(found.state["rng"], self.device)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, CaseFastError):
                raise
            raise CheckpointError(f"{found.path}: its state cannot be used ({error!r})") from error
