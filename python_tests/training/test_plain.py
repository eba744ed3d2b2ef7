"""CASE in other people's loops: three lines of torch, any optimizer, autocast, DistributedDataParallel, accelerate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from helpers import handmade_examples, random_batch, tiny_model
from torch.nn.parallel import DistributedDataParallel

from case_fast.batch import Batch
from case_fast.data.pack import make_batch
from case_fast.models import CASE

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.003),
}


def handmade(*places: int) -> Batch:
    examples, texts = handmade_examples()
    return make_batch([examples[place] for place in places], texts)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("phase", CASE.phases)
def test_three_lines_train(name, phase):
    model, batch = tiny_model(), random_batch(6)
    model.set_phase(phase)
    optimizer = OPTIMIZERS[name](model.parameters())
    losses = []
    for _ in range(12):
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("phase", CASE.phases)
def test_autocast_to_bf16_stays_near_float32(phase):
    model, batch = tiny_model(), random_batch(6)
    model.set_phase(phase)
    exact = model(batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch).loss
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()
    for parameter in model.parameters():
        assert parameter.requires_grad == (parameter.grad is not None)
        assert parameter.grad is None or (parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all())


# ---- several processes

PARTS = {
    "complete": [(0, 1, 6), (3, 5)],
    "one without knowledge": [(0, 1, 6), (4,)],  # every parameter still has to join the graph of both
    "nobody has knowledge": [(4,), (4, 4)],
}


def steps_of_process(rank: int, folder: str, phase: str, parts: list[tuple[int, ...]]) -> None:
    model = tiny_model(seed=rank)  # DDP gives all the weights of the first
    model.set_phase(phase)
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
    batch = handmade(*parts[rank])
    for _ in range(3):
        parallel(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({name: value for name, value in model.named_parameters()}, f"{folder}/{rank}")


def all_cases(rank: int, folder: str) -> None:
    """One group for all of them: it hangs at times where the last to hold a group is a DistributedDataParallel that goes away,
    whose destructor waits for the group's thread while that waits for Python's lock."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name, parts in PARTS.items():
        for phase in CASE.phases:
            case = Path(folder) / f"{name} {phase}"
            case.mkdir(exist_ok=True)
            steps_of_process(rank, str(case), phase, parts)
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_in_both_phases(tmp_path):
    """Two processes end with the same weights, those of one process that averages their gradients."""
    mp.spawn(all_cases, (str(tmp_path),), nprocs=2)
    for name, parts in PARTS.items():
        for phase in CASE.phases:
            ended = [torch.load(tmp_path / f"{name} {phase}" / str(rank), weights_only=True) for rank in (0, 1)]
            models = [tiny_model(seed=0), tiny_model(seed=0)]  # a model each: the word counts are each process's own
            for model in models:
                model.set_phase(phase)
            for _ in range(3):
                counts = models[0].word_counts.clone()  # DDP hands out the first one's buffers before each step
                for model, places in zip(models, parts, strict=True):
                    model.word_counts.copy_(counts)
                    model(handmade(*places)).loss.backward()
                for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
                    if one.grad is not None:
                        step = 0.05 * (one.grad + other.grad) / 2
                        for parameter in (one, other):
                            parameter.data -= step
                            parameter.grad = None
            for key, expected in models[0].named_parameters():
                assert torch.equal(ended[0][key], ended[1][key])
                torch.testing.assert_close(ended[0][key], expected, rtol=1e-5, atol=1e-6)


def test_accelerate_prepares_it():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = tiny_model()
    plain = tiny_model()
    batch = random_batch(6)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    reference = torch.optim.SGD(plain.parameters(), lr=0.01)
    for _ in range(2):
        accelerator.backward(prepared(batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        plain(batch).loss.backward()
        reference.step()
        reference.zero_grad()
    unwrapped = accelerator.unwrap_model(prepared)
    assert all(torch.equal(a, b) for a, b in zip(unwrapped.parameters(), plain.parameters(), strict=True))
