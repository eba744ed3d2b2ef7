"""`case-fast bench bilinear_mim`: the op against its peers, forward and with gradients, time and memory."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.bilinear_mim_peers import PEERS, QUICK
from benchmarks.measure import Truth
from benchmarks.pairs import PairCase, case_of
from benchmarks.run import Family
from case_fast import equations

_AT_ONCE = {"cpu": 6 << 20, "cuda": 256 << 20}  # scores; some ten arrays of so many float64: the truth in little memory


def truth(case: PairCase) -> Truth:
    """Losses and gradients by equations.py in float64; limits by how far the same in the case's dtype is off."""
    names = ("loss", "grad_x", "grad_y", "grad_weight")
    return Truth.of(names, _by_parts(case, torch.float64), _by_parts(case, case.x.dtype))


def _by_parts(case: PairCase, dtype: torch.dtype) -> list[Tensor]:
    """The sum over rows of y needs all of y and some rows of x at once; the sum over rows of x all of x and some rows of y, with
    one more that stands for the positives left out."""
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in case.inputs]
    x, y, weight = leaves
    if dtype in (torch.float16, torch.bfloat16):  # x W in that dtype, as torch has it; the equation itself would take float32
        projected = x @ weight
        x, weight = projected.detach().requires_grad_(), torch.eye(len(weight), device=x.device, dtype=dtype)

    def finished(loss: Tensor) -> list[Tensor]:
        if x is not leaves[0]:
            projected.backward(x.grad)
        return [loss, *(t.grad for t in leaves)]

    grad = case.grad_out.to(equations.full_precision(x).dtype)
    if case.negatives is not None:
        side_y, side_x, _ = equations.mim_sides(x, y, weight, case.positive, case.negatives, case.seed)
        (side_y + side_x).backward(grad)
        return finished((side_y + side_x).detach())
    loss = torch.zeros_like(grad)
    pairs, rows = case.scores
    at_once = _AT_ONCE[x.device.type]
    for part in torch.arange(pairs, device=x.device).split(max(1, at_once // rows)):
        side, *_ = equations.mim_sides(x[part], y, weight, case.positive[part])
        side.backward(grad[part])
        loss[part] += side.detach()
    for part in torch.arange(rows, device=x.device).split(max(1, at_once // pairs)):
        here = (case.positive >= part[0]) & (case.positive <= part[-1])
        among = torch.where(here, case.positive - part[0], part.numel())
        _, side, _ = equations.mim_sides(x, torch.cat([y[part], y[:1] * 0]), weight, among)
        side[here].backward(grad[here])
        loss[here] += side[here].detach()
    return finished(loss)


FAMILY = Family(
    name="bilinear_mim",
    case_of=case_of,
    truth=truth,
    peers=PEERS,
    quick=QUICK,
    sizes=["coarse", "fine", "sampled", "1024", "2048", "4096", "8192", "16384"],
    quick_sizes=["24x10", "24:5"],
    axis="pairs, all others in the batch as negatives",
)
