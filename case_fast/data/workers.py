"""Batches made by processes of their own, so that packing takes nothing from the one that trains.

A worker reads requests from its standard input, a line of JSON each, and answers on its standard output: two lengths (int64), a
header in JSON, and the bytes of the batch's tensors as `Batch.joined` lays them out. It ends when its input does, so that none
outlives the process that started it, however that one ends.
"""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from case_fast.batch import Batch, CasePart, ConceptPart, EmotionalPart, FeedbackPart, Graphs, RelationsPart
from case_fast.data.store import Store, open_store
from case_fast.errors import CaseFastError, DataError

_LENGTHS = struct.Struct("<qq")  # of the header and of the tensors, in bytes
_KINDS = {kind.__name__: kind for kind in (Batch, CasePart, ConceptPart, EmotionalPart, FeedbackPart, Graphs, RelationsPart)}
_PIPE_BYTES = 1 << 20  # a batch of 16 is 250 kB: one fits, so that the next is begun before it is fetched
_PATIENCE = 5.0  # seconds that a worker has to end


class WorkerError(CaseFastError, RuntimeError):
    """A process that makes batches could not make one, or has ended; the message names split and examples."""


class Workers:
    """``count`` processes that make batches of a store in turn: the same batches, in the same order, as one would make.

    To be used in a with statement, `ask` in one thread and what it returns in one thread, which may be another.
    """

    def __init__(self, store: Store, count: int):
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        # -P: no module of the folder that one happens to be in. A session of its own: Ctrl-C is for the process that trains.
        command = [sys.executable, "-P", "-m", __name__, str(store.path.resolve()), store.fingerprint]
        self._turn = 0
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for _ in range(count):
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
                                           start_new_session=True)
                self.processes.append(process)
                with suppress(ImportError, AttributeError, OSError):  # not on Linux, or more than a user may have
                    import fcntl

                    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, at once or by force."""
        for process in self.processes:
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what a dead one has not read
                    pipe.close()
        for process in self.processes:
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, split: str, indices: Sequence[int], parts: Iterable[str], seed: int) -> Callable[[], Batch]:
        """Have `Store.batch` called with these; a function that waits for the batch, to be called in the order of asking.

        Raises:
            WorkerError: (the function) there is none.
        """
        process = self.processes[self._turn % len(self.processes)]
        self._turn += 1
        request = {"split": split, "indices": [int(index) for index in indices], "parts": list(parts), "seed": seed}
        with suppress(BrokenPipeError):  # it has ended: who waits for the batch says so
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        return partial(_received, process, f"the batch of {split} {request['indices']}")


def _received(process: subprocess.Popen[bytes], what: str) -> Batch:
    head = process.stdout.read(_LENGTHS.size)
    if len(head) == _LENGTHS.size:
        length, size = _LENGTHS.unpack(head)
        header, block = process.stdout.read(length), np.empty(size, dtype=np.uint8)
        if len(header) == length and process.stdout.readinto(block) == size:
            answer = json.loads(header)
            if "error" not in answer:
                return _laid_out(answer, block)
            error = WorkerError(f"a worker process could not make {what}: {answer['error']}")
            error.add_note(answer["traceback"])
            raise error
    raise WorkerError(f"the worker process that was to make {what} has ended (status {process.wait()}); "
                      "train with workers 0 to make batches without one")


def _layout(value: Any) -> Any:
    """What `_laid_out` makes the same batch of, in plain values: of a tensor its type and shape, of a part its fields."""
    if isinstance(value, Tensor):
        return [str(value.dtype).removeprefix("torch."), list(value.shape)]
    if not is_dataclass(value):
        return value
    return {"": type(value).__name__} | {item.name: _layout(getattr(value, item.name)) for item in fields(value)}


def _laid_out(layout: dict[str, Any], block: np.ndarray) -> Batch:
    """The batch whose `joined` block this is; its tensors are views of it."""
    start = 0

    def read(value: Any) -> Any:
        nonlocal start
        if isinstance(value, dict):
            return _KINDS[value[""]](**{name: read(part) for name, part in value.items() if name})
        if not isinstance(value, list):
            return value
        dtype, shape = np.dtype(value[0]), value[1]
        found = np.frombuffer(block, dtype, math.prod(shape), start).reshape(shape)
        start += -(-found.nbytes // 16) * 16
        return torch.from_numpy(found)

    return read(layout)


def main() -> None:
    """A worker; its arguments are the folder and the fingerprint of a store."""
    for number in (signal.SIGINT, signal.SIGTERM):  # who asks it for batches is to end in order
        signal.signal(number, signal.SIG_IGN)
    path, fingerprint = sys.argv[1:]
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # what is printed is no answer
    torch.set_num_threads(1)
    store = None
    with suppress(BrokenPipeError):
        for line in sys.stdin.buffer:
            block: Any = b""
            try:
                if store is None:
                    store = open_store(path, check=False)  # as who asks has done
                if store.fingerprint != fingerprint:
                    raise DataError(store.path, "it is not the store any more that training began with", "Start again")
                joined, tensors = store.batch(**json.loads(line)).joined()
                answer, block = _layout(joined), memoryview(tensors.numpy())
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            header = json.dumps(answer).encode()
            out.write(_LENGTHS.pack(len(header), len(block)) + header)
            out.write(block)
            out.flush()
    os._exit(0)  # nothing is left to be flushed into a pipe that may be gone


if __name__ == "__main__":
    main()
