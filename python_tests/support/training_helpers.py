"""A store in memory and a run of a dozen steps, for the tests of training."""

from __future__ import annotations

import hashlib
import io
import json
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_examples, tiny_config, tiny_featurizer
from rich.console import Console
from torch import Tensor

from case_fast.batch import PARTS, Batch
from case_fast.data.featurizer import Example
from case_fast.data.pack import make_batch
from case_fast.errors import Interrupted
from case_fast.training import TrainConfig, TrainResult, loop, train

PHASE_1, PHASE_2 = 4, 9  # steps


class MemoryStore:
    """What `train` uses of a store. ``on_batch`` is called with (split, indices) and may replace the batch."""

    splits = ("train", "valid")
    knowledge = {"spec": "made up", "cache": None}

    def __init__(self, examples: int = 22, valid: int = 5, seed: int = 0, vectors: Tensor | None = None):
        self.path, self.fingerprint = Path("memory.store"), hashlib.sha256(bytes([seed])).hexdigest()
        self.manifest = {"counts": {"unknown_response_words": {"train": 0.125, "valid": 0.25}}}
        self.featurizer = tiny_featurizer()
        found, self.texts = random_examples(examples + valid, seed)
        self._splits = {"train": found[:examples], "valid": found[examples:]}
        self._vectors = vectors
        self.on_batch = lambda split, indices, batch: batch

    def size(self, split: str) -> int:
        return len(self._splits[split])

    def example(self, split: str, index: int) -> Example:
        return self._splits[split][index]

    def batch(self, split: str, indices: Sequence[int], parts: Sequence[str] = PARTS, seed: int = 0) -> Batch:
        made = make_batch([self._splits[split][i] for i in indices], self.texts, parts, seed)
        return self.on_batch(split, list(indices), made)

    def require(self, split: str, parts: Sequence[str]) -> None:
        """It has all of them."""

    def costs(self, split: str) -> np.ndarray:
        return np.array([len(example.context) for example in self._splits[split]])

    def embeddings(self) -> tuple[Tensor, Tensor] | None:
        return None if self._vectors is None else (torch.arange(8, 8 + len(self._vectors)), self._vectors)


def tiny_run(**changes: object) -> TrainConfig:
    """4 steps of phase 1 and 9 of phase 2, dropout everywhere, sampled negatives: all that a resumption has to bring back."""
    model = tiny_config(graph_dropout=0.2, encoder_dropout=0.1, decoder_dropout=0.1, num_negatives=2)
    values = {
        "model": model, "device": "cpu", "batch_size": 4, "phase1_steps": PHASE_1, "max_steps": PHASE_2, "warmup": 8,
        "validate_every": 3, "min_steps": 3, "log_every": 2, "checkpoint_every": 3,
    }
    return TrainConfig(**(values | changes))


def run(store: MemoryStore, out: Path, config: TrainConfig | None = None, resume: bool = False) -> TrainResult:
    """`train` without a terminal."""
    return train(store, out, config or tiny_run(), Console(file=io.StringIO()), resume)


def outcome(out: Path) -> dict[str, str]:
    """sha256 of everything that must come out equal: best weights, last weights, last optimizer state."""
    last = out / "checkpoints" / (out / "checkpoints" / "latest").read_text().strip()
    files = (out / "best" / "model.safetensors", last / "model.safetensors", last / "optimizer.safetensors")
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def records(out: Path, event: str) -> list[dict]:
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record for record in found if record["event"] == event]


def at_step(patch: pytest.MonkeyPatch, step: int, action) -> None:
    """Call ``action`` right after the training step that makes ``step``, or right before the first one."""
    real = loop.Trainer.train_step

    def train_step(self) -> None:
        if step == 0 == self.step:
            action()
        real(self)
        if step == self.step:
            action()

    patch.setattr(loop.Trainer, "train_step", train_step)


def interrupt_at(store, out: Path, step: int, config: TrainConfig | None = None, resume: bool = False) -> str:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(random.choice([signal.SIGINT, signal.SIGTERM])))
        with pytest.raises(Interrupted) as caught:
            run(store, out, config, resume)
    return str(caught.value)
