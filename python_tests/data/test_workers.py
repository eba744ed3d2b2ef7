"""Processes that make batches: the same batches in the same order, errors that name them, and none that outlives its run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import tensors

import case_fast
from case_fast.batch import PARTS, Batch
from case_fast.data.workers import WorkerError, Workers

PACKAGE = str(Path(case_fast.__file__).parents[1])


def equal(found: Batch, expected: Batch) -> bool:
    ours, theirs = dict(tensors(found)), dict(tensors(expected))
    alike = all(x.dtype == theirs[name].dtype and torch.equal(x, theirs[name]) for name, x in ours.items())
    return alike and (*ours, found.size, found.longest) == (*theirs, expected.size, expected.longest)


@pytest.fixture(scope="module")
def workers(sample_store):
    with Workers(sample_store, 2) as ready:
        yield ready


def test_batches_are_those_of_the_store_in_the_order_of_asking(sample_store, workers):
    asked = [(split, range(first, first + 3), parts, first) for first in range(3) for split in ("train", "test")
             for parts in (PARTS, ("dialogue",), ("dialogue", "concept"))]
    waiting = [workers.ask(*request) for request in asked]
    assert all(equal(wait(), sample_store.batch(*request)) for wait, request in zip(waiting, asked, strict=True))


def test_a_batch_of_a_worker_can_be_changed(sample_store, workers):
    batch = workers.ask("train", [0], PARTS, 0)()
    for _, tensor in tensors(batch):
        tensor.zero_()
    assert equal(workers.ask("train", [0], PARTS, 0)(), sample_store.batch("train", [0], PARTS, 0))


def test_an_error_in_a_worker_names_the_batch_and_the_next_one_is_made(sample_store, workers):
    size = sample_store.size("train")
    bad, good = workers.ask("train", [1, size], PARTS, 0), workers.ask("train", [1], PARTS, 0)
    with pytest.raises(WorkerError, match=rf"could not make the batch of train \[1, {size}\]: IndexError: index {size} is"):
        bad()
    assert equal(good(), sample_store.batch("train", [1], PARTS, 0))


def test_a_worker_leaves_signals_to_the_process_that_trains(sample_store, workers):
    workers.ask("train", [0], PARTS, 0)(), workers.ask("train", [0], PARTS, 0)()  # both run
    for process in workers.processes:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert os.getsid(process.pid) == process.pid  # Ctrl-C reaches the terminal's session alone
    assert equal(workers.ask("train", [0], PARTS, 0)(), sample_store.batch("train", [0], PARTS, 0))
    assert all(process.poll() is None for process in workers.processes)


def test_a_worker_that_has_ended_is_told(sample_store):
    with Workers(sample_store, 1) as one:
        one.ask("train", [0], PARTS, 0)()
        one.processes[0].kill()
        one.processes[0].wait()
        with pytest.raises(WorkerError, match=r"make the batch of train \[2\] has ended \(status -9\); train with workers 0"):
            one.ask("train", [2], PARTS, 0)()


def test_closing_ends_workers_that_are_not_listened_to(sample_store):
    with Workers(sample_store, 1) as one:
        for _ in range(8):  # more than a pipe holds
            one.ask("train", range(sample_store.size("train")), PARTS, 0)
        started = time.monotonic()
    assert time.monotonic() - started < 30 and one.processes[0].poll() is not None


def test_another_store_at_the_same_place_is_refused(sample_store, monkeypatch):
    monkeypatch.setattr(sample_store, "fingerprint", "0" * 64)
    with Workers(sample_store, 1) as one, pytest.raises(WorkerError, match="not the store any more that training began with"):
        one.ask("train", [0], PARTS, 0)()


def test_no_worker_outlives_a_process_that_is_killed(sample_store):
    code = ("import sys, time; from case_fast.data import open_store; from case_fast.data.workers import Workers\n"
            "workers = Workers(open_store(sys.argv[1]), 2)\n"
            "[workers.ask('train', range(100), ['dialogue', 'case', 'concept'], 0) for _ in range(20)]\n"
            "print(*[process.pid for process in workers.processes], flush=True); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code, str(sample_store.path)], stdout=subprocess.PIPE,
                              env=os.environ | {"PYTHONPATH": PACKAGE})
    pids = [int(word) for word in parent.stdout.readline().split()]
    parent.kill()
    parent.communicate()
    assert len(pids) == 2
    until = time.monotonic() + 20  # they may still be importing
    while time.monotonic() < until and any(running(pid) for pid in pids):
        time.sleep(0.05)
    assert not any(running(pid) for pid in pids)


def running(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and that no one has asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
