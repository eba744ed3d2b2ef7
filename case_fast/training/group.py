"""The processes that a launcher started together, as such: who they are, and what they send one another.

accelerate says who a process is, gives it its GPU and opens the group: gloo for tensors on a CPU, NCCL on GPUs. All of them call
the same methods in the same order. Every wait is bounded, and whatever goes wrong in one of them ends as a sentence in all.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from case_fast.devices import resolve_device
from case_fast.errors import CaseFastError, ConfigError
from case_fast.optional import needed
from case_fast.training.process import StopRequest

TIMEOUT = "CASE_FAST_TIMEOUT"  # environment variable: seconds that a process waits for the others
PATIENCE = 600.0  # of these where it is not set: longer than a checkpoint or a diagnosis of the first process alone
ECHO = 5.0  # s; see `StopRequest`
_FAILED = "case_fast failed"  # key of the group's store


class Elsewhere(CaseFastError, RuntimeError):
    """Another process has failed or does not answer; the message says which and why, as far as that is known."""


def launched() -> bool:
    """Whether this process is one of several that were started to work together."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ


class Group:
    """The processes, and this one's place among them.

    Args:
        device: the setting of what they do: auto, cpu or cuda.

    Raises:
        ConfigError: accelerate is not installed, or the processes have not a GPU each. Elsewhere: the others were not found.

    Attributes:
        rank: of this one, from 0; count: of them all; device: of this one.
        stop: where this one notices Ctrl-C and SIGTERM. signal: the name of the signal by which all are to stop, or None; all
            learn of it by the same exchange.
    """

    _opened: Any = None  # the store that the processes found one another by; for the life of this one, as the group is

    def __init__(self, device: str | torch.device):
        accelerate = needed("accelerate", "work in several processes")
        import torch.distributed as dist

        self._dist = dist
        self.device = resolve_device(device)
        on_cpu = self.device.type == "cpu"
        if not on_cpu:
            _check_gpus(device)
        patience = timedelta(seconds=_patience())
        try:
            if self._opened is None:
                Group._opened = _store(dist, patience)
                atexit.register(self._close)
            state = accelerate.PartialState(
                cpu=on_cpu, backend="gloo" if on_cpu else "cpu:gloo,cuda:nccl", timeout=patience, store=self._opened,
                rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
            )
        except RuntimeError as error:
            said = f"{_who()}: the others were not found ({_first_line(error)})"
            raise Elsewhere(f"{said}. Look whether all were started, with one MASTER_ADDR and MASTER_PORT that every machine "
                            "reaches") from error
        self.rank, self.count = state.process_index, state.num_processes
        if not on_cpu:
            self.device = state.device
        self.signal: str | None = None
        self.stop = StopRequest()

    def stop_request(self) -> StopRequest:
        """A new `stop`, to be entered."""
        saying = "all processes finish this step, and the first one saves" if self.rank == 0 else None
        self.stop, self.signal = StopRequest(saying, ECHO), None
        return self.stop

    # ---- the end

    def _close(self) -> None:
        if self._dist.is_initialized():
            self._dist.destroy_process_group()

    def fail(self, error: BaseException) -> None:
        """Let the others know why this one ends. Raises `Elsewhere` where one of them was faster, with another error."""
        sentence = str(error) if isinstance(error, CaseFastError) else f"{type(error).__name__}: {error}"
        own = sentence if isinstance(error, Elsewhere) else f"{_who()} has failed: {sentence}"
        try:
            first = self._opened.compare_set(_FAILED, "", own).decode()
        except RuntimeError:
            first = own
        if self.device.type == "cpu":  # closes the connections: who waits for this process is told at once
            self._close()
        else:
            atexit.unregister(self._close)  # NCCL would wait for the others
        if not first.endswith(sentence):
            other = Elsewhere(first)
            other.said = self.rank > 0
            raise other from error
        if isinstance(error, CaseFastError):
            error.said = first != own and self.rank > 0

    def _lost(self, error: RuntimeError) -> Elsewhere:
        try:
            known = self._opened.get(_FAILED).decode() if self._opened.check([_FAILED]) else ""
        except RuntimeError:  # the store lay with a process that has ended
            known = ""
        return Elsewhere(known or f"{_who()}: another process has ended, or did not answer within {_patience():.0f} s "
                         f"({_first_line(error)}). What was saved is untouched: go on from it with the same command")

    # ---- what they send one another

    def call(self, collective: str, *arguments: Any) -> None:
        """A function of torch.distributed."""
        try:
            getattr(self._dist, collective)(*arguments)
        except RuntimeError as error:  # all errors of torch.distributed are
            raise self._lost(error) from error

    def exchange(self, numbers: Sequence[int] = ()) -> list[list[int]]:
        """The whole numbers of every process, each of which gives as many; and whether one was asked to stop."""
        asked = 0 if self.stop.signal is None else signal.Signals[self.stop.signal].value
        own = torch.tensor([asked, *numbers])
        found = [torch.empty_like(own) for _ in range(self.count)]
        self.call("all_gather", found, own)
        rows = torch.stack(found).tolist()
        asked = max(row[0] for row in rows)
        self.signal = signal.Signals(asked).name if asked else None
        return [row[1:] for row in rows]

    def rows(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rows x (n, ...) of all processes, end to end; ``sizes``: how many each has. Without gradient."""
        if not max(sizes):
            return x.detach()
        own = x.new_zeros(max(sizes), *x.shape[1:])
        own[: len(x)] = x.detach()
        found = [torch.empty_like(own) for _ in sizes]
        self.call("all_gather", found, own)
        return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])

    def values(self, value: Any) -> list[Any]:
        """The value of every process, of plain JSON values."""
        own = torch.from_numpy(np.frombuffer(json.dumps(value).encode(), dtype=np.uint8).copy())
        sizes = [size for (size,) in self.exchange([len(own)])]
        return [json.loads(part.numpy().tobytes()) for part in self.rows(own, sizes).split(sizes)]

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the processes, in its place."""
        self.call("all_reduce", x)
        return x

    def hand_out(self, tensors: Mapping[str, Tensor]) -> None:
        """Give tensors of the same names, shapes and types the first process's content."""
        for name in sorted(tensors):
            self.call("broadcast", tensors[name], 0)


def _store(dist: ModuleType, patience: timedelta) -> Any:
    """Where the processes of this attempt leave what the others have to know.

    A launcher that starts its processes anew keeps the store, and in it where those of the last attempt were to be found: each
    attempt has names of its own, by how often it was and by how many came before.
    """
    store, _, count = next(dist.rendezvous("env://", timeout=patience))
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} {count}"
    return dist.PrefixStore(f"{attempt} {(store.add(f'case_fast {attempt}', 1) - 1) // count}", store)


def _who() -> str:
    return f"process {int(os.environ.get('RANK', 0)) + 1} of {os.environ.get('WORLD_SIZE', 1)}"


def _patience() -> float:
    try:
        found = float(os.environ.get(TIMEOUT) or PATIENCE)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e6:
        raise ConfigError(f"{TIMEOUT} must be a number of seconds above 0, not {os.environ[TIMEOUT]!r}")
    return found


def _check_gpus(device: str | torch.device) -> None:
    if str(device) not in ("auto", "cuda"):
        raise ConfigError(f"device {device} would be that of every process: set device to auto or cuda, and each has its own GPU")
    seen, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if here > seen:
        raise ConfigError(f"{here} processes on this machine, and torch sees {seen} GPU{'s' * (seen > 1)}: start one for each "
                          "GPU, or set device to cpu")


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return re.sub(r"^\[[^\]]*\] ", "", line)[:200]  # without the place in gloo's source
