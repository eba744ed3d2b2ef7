"""kill -9 at any moment: the newest complete checkpoint loads, and the resumed run ends bit for bit like one never killed.

As a program it does as many as one likes: ``python -m python_tests.training.test_kill --random 100 --inside 100``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))  # what tests share is imported by bare names

from training_helpers import MemoryStore, outcome, run

import case_fast
from case_fast.training.checkpoint import Checkpoints

RANDOM, INSIDE = 3, 7  # kills of the test
PACKAGE = str(Path(case_fast.__file__).parents[1])


def test_killed_at_any_moment_it_resumes_bit_for_bit():
    command = [sys.executable, __file__, "--random", str(RANDOM), "--inside", str(INSIDE)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"random": RANDOM, "inside": INSIDE, "equal": RANDOM + INSIDE}


def child(store: MemoryStore, out: Path, kill_at_call: int = 0) -> int:
    """Train in a forked process, from the start or resuming; it kills itself at the n-th system call on a checkpoint's files."""
    pid = os.fork()
    if pid:
        return pid
    calls = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal calls
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.listdir"):
            if any("/checkpoints/" in str(argument) for argument in arguments):
                calls += 1
                if calls == kill_at_call:
                    os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        if kill_at_call:
            sys.addaudithook(watch)
        run(store, out, resume=(out / "config.json").exists())
        status = 0
    finally:
        os._exit(status)


def killed(pid: int) -> bool:
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert status == 0, f"training ended with status {status}"
    return False


def trial(store: MemoryStore, out: Path, rng: random.Random, seconds: float, inside: bool) -> None:
    """Start, kill once, look at what is left, resume to the end."""
    while True:
        shutil.rmtree(out, ignore_errors=True)
        pid = child(store, out, rng.randint(1, 90) if inside else 0)
        if not inside:
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        if killed(pid):
            break  # else it had ended before: another try
    checkpoints = Checkpoints(out / "checkpoints")
    if checkpoints.steps():
        assert checkpoints.newest().step == checkpoints.steps()[-1], "the newest complete checkpoint does not load"
    assert not killed(child(store, out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=100, help="kills at random moments")
    parser.add_argument("--inside", type=int, default=100, help="kills between the system calls of a checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # also: forking is safe as long as no thread pool has been started
    with suppress(ImportError):
        importlib.import_module("torch.utils.tensorboard")  # likewise
    importlib.import_module("torch._dynamo")  # which a run loads: once for all
    store, rng = MemoryStore(), random.Random(arguments.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        assert not killed(child(store, Path(folder) / "whole"))
        seconds = time.monotonic() - started
        expected = outcome(Path(folder) / "whole")
        for kind in ["random"] * arguments.random + ["inside"] * arguments.inside:
            trial(store, Path(folder) / "run", rng, seconds, kind == "inside")
            equal = outcome(Path(folder) / "run") == expected
            counts.update({kind: 1, "equal": int(equal)})
            print(f"{counts.total() - counts['equal']}: killed ({kind}), {'equal' if equal else 'DIFFERENT'}", flush=True)
    print(json.dumps(counts))
    sys.exit(counts["equal"] != arguments.random + arguments.inside)


if __name__ == "__main__":
    main()
