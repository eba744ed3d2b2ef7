"""`case-fast bench cross_attention`: the decoder's attention to three sources against its peers, one word at a time and in
training; time and memory."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cross_attention_peers import PEERS, QUICK
from benchmarks.measure import Truth
from benchmarks.replies import ReplyCase, case_of
from benchmarks.run import Family
from case_fast import equations
from case_fast.ops.cross_attention import FLOATS


def truth(case: ReplyCase) -> Truth:
    """Output and gradients by equations.py in float64; limits by how far the same in the case's dtype is off."""
    names = ["out", "grad_hidden", *(f"grad_{name} of source {place}" for place in range(len(case.sources)) for name in FLOATS)]
    return Truth.of(names, _results(case, torch.float64), _results(case, case.hidden.dtype))


def _results(case: ReplyCase, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in case.inputs]
    out = equations.cross_attention(leaves[0], case.cu_hidden, case.sources_of(tuple(leaves[1:])))
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad_out.to(dtype))]


FAMILY = Family(
    name="cross_attention",
    case_of=case_of,
    truth=truth,
    peers=PEERS,
    quick=QUICK,
    sizes=["step1", "step16", "step128", "beams16x5", *(f"keys{n}" for n in (0, 16, 64, 256, 512)),
           *(f"rows{4**n}" for n in range(2, 7)), "ragged"],
    quick_sizes=["step4", "rows16", "rows64"],
    axis="words of replies of about 16 words",
)
