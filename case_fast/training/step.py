"""One step of the optimizer: launched call by call, or replayed from a CUDA graph.

All forms have one contract, which the training loop uses:

    prepared(batch)       in the background: the batch as `take` wants it
    take(prepared, lr)    queue the step
    collect()             the numbers of the steps since the last call, the oldest first; at least every ``log_every`` steps
    examine(make)         leave the gradients of a step that was not finite in the parameters; make() prepares its batch again

A step whose loss or gradients are not finite changes nothing, and no step after it does: weights, counts and the optimizer's
state stay as they were before it until someone has collected its numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from case_fast import ops
from case_fast.batch import Batch
from case_fast.data.capacity import Capacity, capacities, fitted
from case_fast.data.store import Store
from case_fast.errors import ConfigError
from case_fast.models import DialogueModel, Output
from case_fast.models.base import POSITIONS, raise_pending
from case_fast.training.adam import Adam
from case_fast.training.config import TrainConfig
from case_fast.training.sampler import Sampler, step_seed

SUMMED_WHOLE = 1 << 14  # numbers; torch's threads share a sum of twice as many
Objective = tuple[str, str]  # a model's phase and turn
SEEN = 256  # batches of the first epoch that capacities are measured by
_log = logging.getLogger("case_fast")


@dataclass(frozen=True)
class Taken:
    """Numbers of one step: ``losses`` by name, "loss" the whole; the gradients' norm before clipping."""

    losses: dict[str, float]
    norm: float
    diagnostics: dict[str, float]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.losses["loss"]) and math.isfinite(self.norm)


@dataclass
class StepTaken:
    """One step; ``numbers``: when they have come from the device."""

    dialogues: int
    words: int
    seconds: float = 0.0
    numbers: Taken | None = None

    @property
    def losses(self) -> dict[str, float]:
        return {} if self.numbers is None else self.numbers.losses


@dataclass
class Prepared:
    """A batch on its way to a step; ``dialogues`` and ``words`` (of contexts and replies) are the real ones.

    Attributes:
        block: the bytes that the batch's tensors are views of, where it was filled up; place: which capacity it has.
    """

    batch: Batch
    dialogues: int
    words: int
    block: Tensor | None = None
    place: int = -1


class EagerStep:
    """Every op launched by itself; the numbers of a step come at once."""

    at_once = True

    def __init__(self, model: DialogueModel, config: TrainConfig, device: torch.device):
        self.model, self.config, self.device = model, config, device
        groups = [group | {"keeps_its_rate": "lr" in group} for group in model.parameter_groups()]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = Adam(groups, self._rate(), config.betas, config.eps)
        self._taken: list[Taken] = []
        saved = model.state_dict()
        self._counts = [buffer for name, buffer in model.named_buffers() if name in saved]  # what forward changes

    def _rate(self) -> float | Tensor:
        return 0.0

    def prepared(self, batch: Batch) -> Prepared:
        return Prepared(batch.pin_memory() if self.device.type == "cuda" else batch, batch.size, _words(batch))

    def forward(self, batch: Batch) -> Output:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.model(batch.to(self.device, non_blocking=True))

    def _backward(self, batch: Batch) -> tuple[Output, Tensor]:
        """Forward and backward; the output, and the norm of all gradients."""
        output = self.forward(batch)
        output.loss.backward()
        return output, total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _update(self, norm: Tensor) -> None:
        if self.config.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def take(self, prepared: Prepared, lr: float) -> None:
        before = [count.clone() for count in self._counts]
        output, norm = self._backward(prepared.batch)
        names, values = _numbers(output, norm)
        taken = _taken(names, values.tolist())  # one transfer for all
        self._taken.append(taken)
        if taken.finite:
            self._follow(lr)
            self._update(norm)
        else:  # the gradients stay, to be examined
            self._count_as(before)

    def _count_as(self, before: Sequence[Tensor]) -> None:
        for count, kept in zip(self._counts, before, strict=True):
            count.copy_(kept)

    def _follow(self, lr: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            if not group["keeps_its_rate"]:
                group["lr"] = lr

    def collect(self) -> list[Taken]:
        taken, self._taken = self._taken, []
        return taken

    def examine(self, prepared: Callable[[], Prepared]) -> None:
        """They are still there."""


class PaddedStep(EagerStep):
    """The step as it is captured, of filled batches in memory that stays where it is, but launched op by op; on any device.

    The host asks the device for nothing until the numbers are collected. A batch that no capacity holds is taken as it is.
    """

    at_once = False

    def __init__(self, model: DialogueModel, config: TrainConfig, device: torch.device, sizes: Sequence[Capacity]):
        self._lr = torch.zeros((), device=device)
        super().__init__(model, config, device)
        self.sizes = list(sizes)
        self._inputs: dict[int, tuple[Batch, Tensor]] = {}  # of each capacity
        self._rings: dict[Objective, tuple[list[str], Tensor]] = {}  # names, and (log_every, names) of the latest steps
        self._row = torch.zeros(1, dtype=torch.int64, device=device)  # of the ring, that the next step writes
        self._bad = torch.zeros((), device=device)  # 1 from the first step on that is not finite: Adam then writes nothing
        self.optimizer.found_inf = self._bad
        self._queued: list[Objective] = []  # of the steps that were not collected

    def _rate(self) -> float | Tensor:
        return self._lr

    def prepared(self, batch: Batch) -> Prepared:
        for place, capacity in enumerate(self.sizes):
            filled = fitted(batch, capacity)
            if filled is not None:
                joined, block = filled.joined(pin=self.device.type == "cuda")
                return Prepared(joined, batch.size, _words(batch), block, place)
        return super().prepared(batch)

    def take(self, prepared: Prepared, lr: float) -> None:
        if len(self._queued) == self.config.log_every:
            raise RuntimeError(f"the numbers of {len(self._queued)} steps were not collected")
        self._lr.fill_(lr)
        if prepared.block is None:
            self._step(prepared.batch)
        else:
            self._run(prepared.place, self._placed(prepared))
        self._queued.append(_objective(self.model))

    def _placed(self, prepared: Prepared) -> Batch:
        """The batch in the memory that belongs to its capacity: one copy."""
        if prepared.place not in self._inputs:
            block = torch.empty_like(prepared.block, device=self.device)
            self._inputs[prepared.place] = prepared.batch.laid_over(block), block
        batch, block = self._inputs[prepared.place]
        block.copy_(prepared.block, non_blocking=True)
        return batch

    def _run(self, place: int, batch: Batch) -> None:
        """`_step` of a batch in the memory of the capacity at ``place``."""
        self._step(batch)

    def _step(self, batch: Batch) -> None:
        """The whole step, which reads nothing back: what it decides, it decides on the device."""
        before = [count.clone() for count in self._counts]
        output, norm = self._backward(batch)
        names, values = _numbers(output, norm)
        key = _objective(self.model)
        if key not in self._rings:
            self._rings[key] = names, values.new_zeros(self.config.log_every, len(names))
        self._rings[key][1].index_copy_(0, self._row, values.unsqueeze(0))
        self._row.add_(1)
        self._bad.copy_(torch.maximum(self._bad, (~values[:2].isfinite().all()).to(self._bad.dtype)))
        self._update(norm)
        for count, kept in zip(self._counts, before, strict=True):
            count.copy_(torch.where(self._bad > 0, kept, count))

    def collect(self) -> list[Taken]:
        if not self._queued:
            return []
        rings = {key: (self._rings[key][0], self._rings[key][1].tolist()) for key in set(self._queued)}  # waits for the steps
        found = [_taken(rings[key][0], rings[key][1][row]) for row, key in enumerate(self._queued)]
        if self.device.type == "cuda":
            raise_pending()
        self._row.zero_()
        self._bad.zero_()
        self._queued.clear()
        return found

    def examine(self, prepared: Callable[[], Prepared]) -> None:
        self.optimizer.zero_grad()
        before = [count.clone() for count in self._counts]
        self._backward(prepared().batch)
        self._count_as(before)


class CapturedStep(PaddedStep):
    """One CUDA graph of the whole step for each capacity, phase and turn, all in one pool of memory.

    The first step of a capacity and phase is launched op by op, which makes the optimizer's state and compiles kernels; for the
    second one the graph is captured, which that one and all further ones replay.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._stream = torch.cuda.Stream(self.device)  # of what is captured, and of what is launched before it
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, Objective], torch.cuda.CUDAGraph | None] = {}  # None: launched once
        self._gave_up = False

    def _run(self, place: int, batch: Batch) -> None:
        key = place, _objective(self.model)
        if self._graphs.get(key) is None:
            if key not in self._graphs or self._gave_up:
                self._graphs.setdefault(key, None)
                self._launch(batch)
                return
            try:
                self._graphs[key] = self._captured(batch)
            except RuntimeError as error:
                if self.config.step == "captured":
                    said = f"the step cannot be captured in a CUDA graph ({error}); set step to eager or auto"
                    raise ConfigError(said) from error
                _log.warning("the step cannot be captured in a CUDA graph and is launched op by op (%s)", error)
                self._gave_up = True
                self.optimizer.zero_grad()
                self._launch(batch)
                return
        self._graphs[key].replay()

    def _launch(self, batch: Batch) -> None:
        """On the stream that captures, as its kernels' workspaces belong to it."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step(batch)
        current.wait_stream(self._stream)

    def _captured(self, batch: Batch) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that makes the next batches may allocate pinned memory meanwhile
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self._pool, stream=self._stream,
                                                              capture_error_mode="thread_local"):
            self._step(batch)
        return graph


def make_step(store: Store, sampler: Sampler, model: DialogueModel, config: TrainConfig, device: torch.device) -> EagerStep:
    """The step that ``config.step`` asks for on this device.

    Raises:
        ConfigError: it cannot be captured here.
    """
    kind = config.step
    if kind in ("auto", "captured"):
        obstacle = _obstacle(model, device)
        if obstacle and kind == "captured":
            raise ConfigError(f"step captured: {obstacle}. Set step to eager or auto")
        if obstacle and device.type == "cuda":
            _log.warning("the step is launched op by op: %s", obstacle)
        kind = "eager" if obstacle else "captured"
    if kind == "eager":
        return EagerStep(model, config, device)
    steps = range(0, sampler.steps_per_epoch, max(1, sampler.steps_per_epoch // SEEN))
    seen = (store.batch("train", sampler.indices(step), model.needs, step_seed(config.seed, step)) for step in steps)
    form = CapturedStep if kind == "captured" else PaddedStep
    return form(model, config, device, capacities(seen, POSITIONS))


def _objective(model: DialogueModel) -> Objective:
    """Which loss its next step has: steps with the same one give the same numbers, by the same work."""
    return model.phase, model.turn


def _ops_that_ask(device: torch.device) -> list[str]:
    """The ops that run in plain torch on this device and ask it for sizes: a step that has them cannot be captured."""
    asking = ("packed_attention", "cross_attention")
    return [name for name in asking if ops.backend_name(name, device.type) == "reference"]


def _obstacle(model: DialogueModel, device: torch.device) -> str:
    """Why no step of this model can be captured on this device; empty where it can."""
    if model.asks:
        return f"of {model.config.kind} no step can be captured: {model.asks}"
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, and this run is on {device}"
    asking = _ops_that_ask(device)
    return f"the plain form of {' and '.join(asking)}, which runs here, asks the device for sizes" if asking else ""


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """() the norm of all gradients together, with the same bits for any number of threads.

    As `torch.nn.utils.get_total_norm`, which on CPU divides what it sums by the number of threads.
    """
    if not gradients or not gradients[0].is_cpu:
        return nn.utils.get_total_norm(gradients)
    norm = torch.linalg.vector_norm
    rows = torch.cat([norm(x.flatten(1), dim=1) if x.dim() > 1 else x.reshape(-1) for x in gradients])
    return norm(torch.stack([norm(part) for part in rows.split(SUMMED_WHOLE)]))


def _words(batch: Batch) -> int:
    return batch.context.numel() - batch.size + batch.target.numel()


def _numbers(output: Output, norm: Tensor) -> tuple[list[str], Tensor]:
    """Names of a step's numbers, and the numbers; the first two are the norm and the loss."""
    numbers = {"norm": norm, "losses/loss": output.loss} | {f"losses/{name}": x for name, x in output.losses.items()}
    numbers |= {f"diagnostics/{name}": x for name, x in output.diagnostics.items()}
    return list(numbers), torch.stack([number.detach().float() for number in numbers.values()])


def _taken(names: Sequence[str], values: Sequence[float]) -> Taken:
    parts: dict[str, dict[str, float]] = {"losses": {}, "diagnostics": {}}
    for name, value in zip(names[1:], values[1:], strict=True):
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    return Taken(norm=values[0], **parts)
