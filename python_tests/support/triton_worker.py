"""What the workers share that run Triton kernels in its interpreter, and the tests that read what they print.

A worker is a process of its own, since Triton reads TRITON_INTERPRET on import. It prints a JSON line for each case.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

SEED = 0x1234_5678_9ABC_DEF0
SEED_AT = -0x0FED_CBA9_8765_4321  # what a tensor may hold: any int64
MARKS = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.slow,
]


def in_own_process(*command: str, folder: Path, **environment: str) -> list[dict]:
    """The JSON lines that a Python command prints; ``folder`` keeps what Triton compiles."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")} | environment
    here = Path(__file__).resolve()
    env |= {"PYTHONPATH": str(here.parents[2]), "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def interpreted_by(script: str) -> Callable:
    """A fixture: the lines of a worker of this folder by their case, interpreted once for a file of tests."""

    @pytest.fixture(scope="module")
    def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
        worker = str(Path(__file__).with_name(script))
        lines = in_own_process(worker, folder=tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")
        return {line["case"]: line for line in lines}

    return interpreted


def print_lines(lines: Iterable[dict]) -> None:
    torch.set_num_threads(1)
    for line in lines:
        print(json.dumps(line), flush=True)


def worst(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [(a.double() - b.double()).abs().max().item() if b.numel() else 0.0 for a, b in zip(found, expected, strict=True)]


def same_bits(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
