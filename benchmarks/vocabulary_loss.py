"""`case-fast bench vocabulary_loss`: both losses of the decoder over the vocabulary, and its most probable words."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.measure import Truth
from benchmarks.run import Family
from benchmarks.vocabulary_loss_peers import PEERS, QUICK
from benchmarks.words import DIVERSITY, GENERATION, WordCase, case_of
from case_fast import equations

_AT_ONCE = {"cpu": 12 << 20, "cuda": 256 << 20}  # scores; some five arrays of so many float64: the truth in little memory


def truth(case: WordCase) -> Truth:
    """Loss and gradients, or log-probabilities and words, by equations.py in float64; limits by how far the same in the case's
    dtype is off."""
    if case.best is not None:
        names = ("log-probability", "word")
        return Truth.of(names, _best(case, torch.float64), _best(case, case.hidden.dtype))
    names = ("loss", "grad_hidden", "grad_weight", "grad_bias")
    found = Truth.of(names, _by_parts(case, torch.float64), _by_parts(case, case.hidden.dtype))
    rounding = torch.finfo(case.hidden.dtype).eps * float(found.values[0].abs())  # torch's own loss has the inputs' dtype
    return replace(found, limits=(found.limits[0] + rounding, *found.limits[1:]))


def _parts(case: WordCase) -> tuple[Tensor, ...]:
    rows = torch.arange(case.hidden.shape[0], device=case.hidden.device)
    return rows.split(max(1, _AT_ONCE[case.hidden.device.type] // case.weight.shape[0]))


def _by_parts(case: WordCase, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in case.inputs]
    hidden, weight, bias = leaves
    full = equations.full_precision(hidden).dtype
    share = (GENERATION + DIVERSITY * case.word_weight.to(full)) / case.target.numel()
    total = torch.zeros((), dtype=full, device=hidden.device)
    for part in _parts(case):
        cu, span = None, slice(int(part[0]), int(part[-1]) + 1)
        if case.cu_target is not None:
            cu = case.cu_target[span.start : span.stop + 1]
            span = slice(int(cu[0]), int(cu[-1]))
            cu = cu - cu[0]
        target = case.target[span]
        nll, _ = equations.linear_cross_entropy(hidden[part], weight, bias, target, cu)
        loss = (share[target] * nll).sum()
        loss.backward(case.grad_out.to(full))
        total += loss.detach()
    return [total, *(x.grad for x in leaves)]


def _best(case: WordCase, dtype: torch.dtype) -> list[Tensor]:
    hidden, weight, bias = (x.to(dtype) for x in case.inputs)
    found = [equations.top_words(hidden[part], weight, bias, case.best) for part in _parts(case)]
    values, words = (torch.cat(parts) for parts in zip(*found, strict=True))
    return [values, words.double()]  # a wrong word is off by 1 at least, far above its limit


FAMILY = Family(
    name="vocabulary_loss",
    case_of=case_of,
    truth=truth,
    peers=PEERS,
    quick=QUICK,
    sizes=[
        "480x24000", "480x24000:recomputed", *(f"480x{v}" for v in (8000, 16000, 32000, 64000, 128000)),
        *(f"{t}x24000" for t in (16, 64, 256, 1024, 4096)), "bow16",
        *(f"{t}x24000:top{k}" for k in (1, 5) for t in (1, 16, 80)),
    ],
    quick_sizes=["16x24000", "64x24000", "30x2000:recomputed", "16x2000:bow", "16x2000:top5"],
    axis="rows, 24,000 words",
    op="linear_cross_entropy",
)
