"""Adam against torch's own, bit for bit, and what it does without."""

import subprocess
import sys

import pytest
import torch

from case_fast.training.adam import Adam

SHAPES = [(5, 3), (7,), (), (2, 0, 4), (64, 33)]


def parameters() -> list[torch.nn.Parameter]:
    drawn = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=drawn)) for shape in SHAPES]


def pairs(**rate) -> tuple[list, list, Adam, torch.optim.Adam]:
    ours, theirs = parameters(), parameters()
    groups = [[{"params": p[:3]}, {"params": p[3:], "lr": 0.5, "betas": (0.5, 0.9), "eps": 1e-3}] for p in (ours, theirs)]
    return ours, theirs, Adam(groups[0], 0.1, (0.9, 0.98), 1e-9), torch.optim.Adam(
        groups[1], lr=0.1, betas=(0.9, 0.98), eps=1e-9, fused=True, **rate)


@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.02)], ids=["number", "tensor"])
def test_it_is_torchs_bit_for_bit(rate):
    ours, theirs, adam, torchs = pairs()
    drawn = torch.Generator().manual_seed(4)
    for step in range(6):
        for place, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            if (step + place) % 3:  # the others have no gradient in this step; some have their first one late
                p.grad = torch.randn(p.shape, generator=drawn)
                q.grad = p.grad.clone()
        for optimizer in (adam, torchs):
            optimizer.param_groups[0]["lr"] = rate * (step + 1)
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q) and p.grad is None
            assert adam.state.get(p, {}).keys() == torchs.state.get(q, {}).keys()
            assert all(torch.equal(adam.state[p][part], value) for part, value in torchs.state.get(q, {}).items())


def test_a_step_that_found_something_infinite_changes_nothing():
    ours, theirs, adam, torchs = pairs()
    torchs.found_inf = adam.found_inf = torch.zeros(())
    for bad in (0.0, 1.0, 0.0):
        adam.found_inf.fill_(bad)
        before = [p.clone() for p in ours]
        for p, q in zip(ours, theirs, strict=True):
            p.grad, q.grad = torch.ones(p.shape), torch.ones(p.shape)
        adam.step()
        torchs.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
        assert bad == 0 or all(torch.equal(p, q) for p, q in zip(ours, before, strict=True))
    assert {state["step"].item() for state in adam.state.values()} == {2.0}


def test_neither_the_models_nor_training_import_torchs_compiler():
    code = """
import sys, torch, case_fast
from case_fast import CASE
from case_fast.training.adam import Adam
import case_fast.training.loop, case_fast.generation, case_fast.evaluation
layer = torch.nn.Linear(2, 2)
layer(torch.ones(1, 2)).sum().backward()
Adam([{"params": list(layer.parameters())}], 0.1, (0.9, 0.98), 1e-9).step()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
