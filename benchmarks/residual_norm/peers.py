"""Every way to end a layer and normalise for the next that we measure ourselves against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import OURS, Truth, Work
from benchmarks.residual_norm.cases import DROPOUT, ResidualCase
from case_fast import ops


@dataclass
class Dropping(Work):
    """Timed with dropout, which no two peers draw alike, and checked without it."""

    kept: Work | None = None

    def check(self, mode: str, truth: Truth) -> float:
        self.run(mode)  # torch.compile compiles here
        assert self.kept is not None
        return self.kept.check(mode, truth)


def _work(case: ResidualCase, function: Callable[..., tuple[Tensor, Tensor]]) -> Work:
    """function(x, update, weight, bias, dropout_p) -> total, normed"""
    def of(dropout_p: float) -> tuple:
        return lambda *leaves: function(*case.arguments(leaves), dropout_p), case.inputs, (case.grad_total, case.grad_normed)

    return Dropping(*of(DROPOUT), kept=Work(*of(0.0)))


def ours(case: ResidualCase) -> Work:
    def run(x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
        return ops.residual_norm(x, update, weight, bias, dropout_p=dropout_p, seed=5)

    return _work(case, run)


def _plain(x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    total = x if update is None else x + F.dropout(update, dropout_p)
    return total, F.layer_norm(total, weight.shape, weight, bias)


def eager(case: ResidualCase) -> Work:
    return _work(case, _plain)


def compiled(case: ResidualCase) -> Work:
    return _work(case, torch.compile(_plain, dynamic=False))


PEERS: dict[str, Callable[[ResidualCase], Work]] = {
    OURS: ours,
    "dropout, add, layer_norm, eager": eager,
    "dropout, add, layer_norm, torch.compile": compiled,
}
