"""One run that several processes train: each takes its share of every batch, and together they make what one process would.

    torchrun --nproc-per-node 4 -m case_fast train ...        or whatever else sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT

Losses are sums over rows with weights of the whole batch, so that a process's losses and gradients are its part of them, and are
summed. What is not a sum over rows (word counts, in-batch negatives and what standardizes their scores) goes through
`case_fast.batch.Others`. The first process alone writes, and hands out what it read. Of a run of one process nothing here is used
but `Processes`, and neither accelerate nor torch.distributed is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from case_fast import __version__
from case_fast.batch import Batch
from case_fast.data import Store
from case_fast.devices import resolve_device
from case_fast.errors import CaseFastError, ConfigError, Interrupted
from case_fast.knowledge import CachedSource
from case_fast.models import DialogueModel, Output
from case_fast.optional import PlainConsole, SilentConsole
from case_fast.references import References
from case_fast.runs import Run
from case_fast.training.checkpoint import Checkpoint
from case_fast.training.config import TrainConfig
from case_fast.training.group import Group, launched
from case_fast.training.log import RunLog
from case_fast.training.process import StopRequest
from case_fast.training.sampler import Sampler
from case_fast.training.step import EagerStep, Prepared, make_step, total_norm

if TYPE_CHECKING:
    from rich.console import Console

TEXTS = 64  # that a process infers between two exchanges: with COMET on a slow CPU some minutes


class Unlike(CaseFastError, ArithmeticError):
    """The processes of a run, whose weights should be equal bit for bit, have other ones."""


class Processes:
    """The processes that train a run: this one alone. `Several` has the same methods.

    Attributes:
        first: whether it is this one that writes. in_words: how many there are.
    """

    first, in_words = True, ""

    # ---- what a run is made of

    def device(self, name: str) -> torch.device:
        """That of a setting, as `resolve_device`."""
        return resolve_device(name)

    def run(self, path: str | Path) -> Run:
        return Run(path)

    def console(self, console: Console | PlainConsole) -> Console | PlainConsole:
        return console

    def log(self, run: Run, resumed_step: int | None) -> RunLog:
        return RunLog(run, resumed_step)

    def make_step(self, store: Store, sampler: Sampler, model: DialogueModel, config: TrainConfig, device: torch.device
                  ) -> EagerStep:
        return make_step(store, sampler, model, config, device)

    def check(self, config: TrainConfig, store: Store) -> None:
        """`ConfigError` where the processes were not started alike."""

    def compare(self, model: DialogueModel) -> None:
        """`Unlike` where the processes' weights have come apart."""

    # ---- when to stop

    def stop_request(self) -> StopRequest:
        self._stop = StopRequest()
        return self._stop

    @property
    def signal(self) -> str | None:
        """The name of the signal by which all processes stop, once all of them know it."""
        return self._stop.signal

    def wait(self) -> None:
        """Until all have come to this point."""

    # ---- sharing out

    def part(self, items: Sequence[int]) -> Sequence[int]:
        """Those of a list, which all processes have, that are this one's: consecutive ones, in order."""
        return items

    def share(self, items: Sequence[int]) -> Sequence[int]:
        """`part` of a batch's examples; the first of them all where none is left for this process."""
        return items

    def shared(self, batch: Batch, dialogues: int, negatives: bool) -> Batch:
        """The batch of a `share`, as one of a batch of so many dialogues; ``negatives``: as of `Others`."""
        return batch

    def joined(self, references: References) -> References:
        """What all of them read of their `part` of the batches."""
        return references

    def infer(self, cached: CachedSource, texts: Sequence[str], relations: Sequence[str], k: int
              ) -> list[dict[str, list[str]]]:
        """`CachedSource.infer`, each process asking for its share until the cache has all of it; the first alone answers."""
        return cached.infer(texts, relations, k)

    # ---- from the first process to all

    def value(self, value: Any) -> Any:
        """The first process's, of plain JSON values."""
        return value

    def load_weights(self, model: DialogueModel, path: Path) -> None:
        """Those of a file that the first process reads."""
        model.load_weights(path)

    def checkpoint(self, read: Callable[[], Checkpoint | None]) -> Checkpoint | None:
        """What ``read`` reads in the first process."""
        return read()


@contextmanager
def together(device: str | torch.device) -> Iterator[Processes]:
    """The processes that were started together, where this one is of several; else this one alone.

    Args:
        device: the setting of what they do.

    Raises:
        Elsewhere: another process failed first, or does not answer. ConfigError: see `Group`.
    """
    if not launched():
        yield Processes()
        return
    group = Group(device)
    try:
        yield Several(group)
    except Interrupted as stopped:
        stopped.said = group.rank > 0
        raise
    except BaseException as error:
        group.fail(error)
        raise


def resumes(resume: bool | str, run: Run) -> bool:
    """Whether a run is to be gone on with: as ``resume`` says, or, where that is "auto" or a launcher starts its processes anew
    after a failure, if there is one."""
    if resume == "auto" or int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0:
        return run.begun
    return bool(resume)


class Several(Processes):
    """Several processes, with a share each."""

    def __init__(self, group: Group):
        self.group, self.first, self.in_words = group, group.rank == 0, f", in {group.count} processes"

    # ---- what a run is made of

    def device(self, name: str) -> torch.device:
        return self.group.device

    def run(self, path: str | Path) -> Run:
        return Run(path) if self.first else _NoRun(path)

    def console(self, console: Console | PlainConsole) -> Console | PlainConsole:
        return console if self.first else SilentConsole()

    def log(self, run: Run, resumed_step: int | None) -> RunLog:
        return RunLog(run, resumed_step) if self.first else _NoLog()

    def make_step(self, store: Store, sampler: Sampler, model: DialogueModel, config: TrainConfig, device: torch.device
                  ) -> EagerStep:
        if config.step in ("captured", "padded"):
            raise ConfigError(f"step {config.step}: {self.group.count} processes exchange rows whose number is another in each "
                              "step, which no captured step can do. Set step to eager or auto")
        return SharedStep(self.group, model, config, device)

    def check(self, config: TrainConfig, store: Store) -> None:
        own = {"settings": config.as_dict(), "store": store.fingerprint, "device": self.group.device.type,
               "version of case_fast": __version__, "version of torch": torch.__version__}
        others = self.group.values(own)
        for rank, other in enumerate(others):
            if unlike := [name for name in own if other[name] != others[0][name]]:
                raise ConfigError(f"process {rank + 1} of {self.group.count} has another {' and another '.join(unlike)} than the "
                                  "first. Start all by one command, with one version and one store on every machine")

    def compare(self, model: DialogueModel) -> None:
        bits = [x.flatten().view(torch.int32).sum(dtype=torch.int64) for x in model.state_dict().values()]
        sums = self.group.exchange([int(torch.stack(bits).sum())])
        if unlike := [rank + 1 for rank, own in enumerate(sums) if own != sums[0]]:
            raise Unlike(f"the weights of process {unlike[0]} of {self.group.count} are not those of the first: nothing more is "
                         "saved. Go on from the last checkpoint, on machines that are alike")

    # ---- when to stop

    def stop_request(self) -> StopRequest:
        return self.group.stop_request()

    @property
    def signal(self) -> str | None:
        return self.group.signal

    def wait(self) -> None:
        self.group.exchange()

    # ---- sharing out

    def part(self, items: Sequence[int]) -> Sequence[int]:
        return items[slice(*_span(self.group, len(items)))]

    def share(self, items: Sequence[int]) -> Sequence[int]:
        return self.part(items) or items[:1]

    def shared(self, batch: Batch, dialogues: int, negatives: bool) -> Batch:
        return _Others(self.group, int(batch.seed), dialogues, negatives).share_of(batch)

    def joined(self, references: References) -> References:
        own = {"nll": [row.tolist() for row in references.nll], "label": references.label.tolist(), "sums": references.sums,
               "emotion": None if references.emotion is None else references.emotion.tolist()}
        return References.joined([
            References([np.array(row) for row in part["nll"]], None if part["emotion"] is None else np.array(part["emotion"]),
                       np.array(part["label"], dtype=np.int64), part["sums"])
            for part in self.group.values(own)
        ])

    def infer(self, cached: CachedSource, texts: Sequence[str], relations: Sequence[str], k: int
              ) -> list[dict[str, list[str]]]:
        group, progress = self.group, cached.progress
        cached.progress = None
        order = sorted(texts, key=len, reverse=True)
        own, at_once = order[group.rank :: group.count], TEXTS * group.count
        for done in range(0, len(order), at_once):
            cached.infer(own[done // group.count : done // group.count + TEXTS], relations, k)
            group.exchange()  # every few texts they meet, so that one that is gone is missed within the bound
            if progress:
                progress(min(done + at_once, len(order)) * len(relations), len(order) * len(relations))
        return cached.infer(texts, relations, k) if self.first else [{} for _ in texts]

    # ---- from the first process to all

    def value(self, value: Any) -> Any:
        return self.group.values(value if self.first else None)[0]

    def load_weights(self, model: DialogueModel, path: Path) -> None:
        if self.first:
            model.load_weights(path)
        self.group.hand_out(model.state_dict())

    def checkpoint(self, read: Callable[[], Checkpoint | None]) -> Checkpoint | None:
        found = read() if self.first else None
        head = None
        if found is not None:
            kinds = {part: {name: [str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in tensors.items()}
                     for part, tensors in found.tensors.items()}
            head = {"path": str(found.path), "step": found.step, "state": found.state, "tensors": kinds}
        head = self.value(head)
        if head is None:
            return None
        if found is None:
            tensors = {part: {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in kinds.items()}
                       for part, kinds in head["tensors"].items()}
            found = Checkpoint(Path(head["path"]), head["step"], tensors, head["state"])
        for part in sorted(found.tensors):
            self.group.hand_out(found.tensors[part])
        return found


def _span(group: Group, count: int) -> tuple[int, int]:
    """Which places of ``count`` are this process's."""
    return count * group.rank // group.count, count * (group.rank + 1) // group.count


class _Others:
    """`case_fast.batch.Others`, of one batch; ``dialogues``: of the whole batch."""

    def __init__(self, group: Group, seed: int, dialogues: int, negatives: bool):
        self.group, self.seed, self.dialogues, self.negatives = group, seed, dialogues, negatives
        self.count = group.count
        self.start, end = _span(group, dialogues)
        self.empty = self.start == end

    def share_of(self, batch: Batch) -> Batch:
        """The batch of this process's share with the weights of the whole, but for what `weighed` has to ask the others for."""
        case = batch.case
        if self.empty and case is not None:  # no pair of it takes part
            none = torch.zeros_like(case.coarse_sizes)
            case = replace(case, known=case.known[:0], with_reaction=case.with_reaction[:0], paired=case.paired[:0],
                           positive=case.positive[:0], negatives_affection=case.negatives_affection[:0],
                           negatives_cognition=case.negatives_cognition[:0], coarse_sizes=none, fine_sizes=none)
        seed = self.seed
        if self.start:  # rows count from 0 in every share, and would draw what those of the first share draw
            seed = int(np.random.Philox(key=self.seed, counter=self.start).random_raw()) >> 1
        return replace(
            batch, seed=torch.tensor(seed), case=case, others=self,
            dialogue_weight=torch.full_like(batch.dialogue_weight, 0 if self.empty else 1 / self.dialogues),
            bow_weight=batch.bow_weight * (0 if self.empty else batch.size / self.dialogues),
        )

    def weighed(self, batch: Batch, words: int) -> tuple[Batch, int]:
        """`share_of`'s batch with all weights of the whole; and how many words, of contexts and replies, the whole has."""
        feedback = batch.feedback
        own = [len(batch.target), 0 if feedback is None else len(feedback.weight), words]
        found = self.group.exchange([0 if self.empty else number for number in own])
        targets, judged, words = (sum(numbers) for numbers in zip(*found, strict=True))
        if feedback is not None:
            weight = torch.full_like(feedback.weight, 0 if self.empty else 1 / max(judged, 1))
            feedback = replace(feedback, weight=weight)
        return replace(
            batch, sizes=torch.tensor([self.dialogues, targets]), feedback=feedback,
            target_weight=torch.full_like(batch.target_weight, 0 if self.empty else 1 / targets),
        ), words

    def total(self, x: Tensor) -> Tensor:
        return self.group.sum(x.detach().clone())

    def pairs(self, x: Tensor, y: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pairs, rows = zip(*self.group.exchange([len(x), len(y)]), strict=True)
        before = sum(rows[: self.group.rank])
        x, y = _Rows.apply(x, self.group, pairs), _Rows.apply(y, self.group, rows)
        return x, y, self.group.rows(positive + before, pairs), torch.tensor([sum(pairs), sum(rows)], device=x.device)


class _Rows(torch.autograd.Function):
    """`Group.rows` with a gradient: that of the own rows, times the processes, as each process's loss has its share of what all
    of them make of all rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sizes: Sequence[int]) -> Tensor:
        start = sum(sizes[: group.rank])
        ctx.own, ctx.count = slice(start, start + len(x)), group.count
        return group.rows(x, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.own] * ctx.count, None, None


class SharedStep(EagerStep):
    """The eager step of a share; its numbers and its gradients are those of the whole batch."""

    def __init__(self, group: Group, model: DialogueModel, config: TrainConfig, device: torch.device):
        super().__init__(model, config, device)
        self.group = group
        group.hand_out(model.state_dict())

    def prepared(self, batch: Batch) -> Prepared:
        # the thread that makes batches begins with the first GPU, and would take memory of it
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            found = super().prepared(batch)
        found.dialogues = batch.others.dialogues
        return found

    def take(self, prepared: Prepared, lr: float) -> None:
        prepared.batch, prepared.words = prepared.batch.others.weighed(prepared.batch, prepared.words)
        super().take(prepared, lr)

    def _backward(self, batch: Batch) -> tuple[Output, Tensor]:
        output = self.forward(batch)
        output.loss.backward()
        output = self._summed(output)
        return output, total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _summed(self, output: Output) -> Output:
        """The output with the sums of all processes' numbers; likewise each parameter's gradient.

        All in one collective: beside the gradients, whether each is there at all, as Adam leaves alone what has none.
        """
        trained = [p for p in self.parameters if p.requires_grad]
        there = torch.tensor([p.grad is not None for p in trained], dtype=trained[0].dtype, device=self.device)
        numbers = [output.loss, *output.losses.values(), *output.diagnostics.values()]
        numbers = torch.stack([number.detach().to(there.dtype) for number in numbers])
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        summed = self.group.sum(torch.cat([*(part.reshape(-1) for part in parts), there, numbers]))
        *parts, there, numbers = summed.split([*(p.numel() for p in trained), len(trained), len(numbers)])
        for parameter, part, number in zip(trained, parts, there.tolist(), strict=True):
            parameter.grad = part.view_as(parameter) if number else None
        value = iter(numbers)
        return replace(output, loss=next(value), losses={name: next(value) for name in output.losses},
                       diagnostics={name: next(value) for name in output.diagnostics})


# ---- what the processes but the first have in place of what writes


def _nothing(*_: Any, **__: Any) -> None:
    pass


class _NoRun(Run):
    """A run's folder that is not touched."""

    require_room = set_up = finish = save_best = _nothing

    @contextmanager
    def held(self, resume: bool) -> Iterator[Self]:
        yield self

    def read_config(self) -> dict[str, Any]:
        return {}

    read_manifest = read_config

    def dump(self, step: int, facts: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
        return self.failure(step)


class _NoLog(RunLog):
    __init__ = write = close = _nothing
