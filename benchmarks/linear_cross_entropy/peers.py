"""Every way to compute the decoder's losses over the vocabulary that we measure ourselves against, and its most probable words.

What a loss makes of the word weights is timed with it. No chunk is timed that was not the best of a few sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.linear_cross_entropy.cases import DIVERSITY, GENERATION, WordCase
from benchmarks.measure import MODES, OURS, Unfit, Work, Yardstick
from case_fast import equations, ops
from case_fast.equations import full_precision

THREE, FOUR = "three bare matrix products (1 forward)", "four bare matrix products (1 forward)"
_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 26}  # scores at once
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _work(case: WordCase, function: Callable, compiled: bool = False) -> Work:
    """A loss (); or, in cases of the most probable words, log-probabilities and words."""
    function = torch.compile(function, dynamic=False) if compiled else function
    return Work(function, case.inputs, case.grad_out, trains=case.best is None, note="" if case.best is None else "only decodes")


def _trained(case: WordCase) -> None:
    if case.best is not None:
        raise Unfit("is a loss")


def _share(case: WordCase) -> Tensor:
    """(M,): what the nll of each target counts."""
    return (GENERATION + DIVERSITY * case.word_weight[case.target]) / case.target.numel()


def ours(case: WordCase) -> Work:
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        nll, _ = ops.linear_cross_entropy(hidden, weight, bias, case.target, case.keep_bytes, case.cu_target)
        return (_share(case) * nll).sum()

    def top(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return ops.top_words(hidden, weight, bias, case.best)

    return _work(case, loss if case.best is None else top)


# ---- the whole matrix


def equation(case: WordCase) -> Work:
    """The fallback of case_fast, in plain torch."""

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        nll, _ = equations.linear_cross_entropy(hidden, weight, bias, case.target, case.cu_target)
        diverse = equations.diversity_loss(nll, case.target, case.word_weight, 1 / nll.numel())
        return GENERATION * equations.generation_loss(nll, 1 / nll.numel()) + DIVERSITY * diverse

    def top(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return equations.top_words(hidden, weight, bias, case.best)

    return _work(case, loss if case.best is None else top)


def usual(case: WordCase, compiled: bool = False) -> Work:
    """As decoders are commonly coded: log-probabilities of all words, and of these each loss by itself, or the best words. Rows
    with several targets are repeated for each."""
    target, count, several, row_of = case.target, case.target.numel(), case.cu_target is not None, case.row_of

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        log_p = F.log_softmax(full_precision(F.linear(hidden, weight, bias)), dim=-1)
        log_p = log_p[row_of] if several else log_p
        diverse = F.nll_loss(log_p, target, case.word_weight, reduction="sum") / count
        return GENERATION * F.nll_loss(log_p, target) + DIVERSITY * diverse

    def top(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return F.log_softmax(full_precision(F.linear(hidden, weight, bias)), dim=-1).topk(case.best)

    return _work(case, loss if case.best is None else top, compiled)


def _nll(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, row: Tensor | None) -> Tensor:
    """(M,); row None: each row has one target."""
    z = full_precision(F.linear(hidden, weight, bias))
    return F.cross_entropy(z, target, reduction="none") if row is None else z.logsumexp(-1)[row] - z[row, target]


def one_nll(case: WordCase, compiled: bool = False) -> Work:
    """Both losses by one nll of each target."""
    _trained(case)
    row = None if case.cu_target is None else case.row_of

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (_share(case) * _nll(hidden, weight, bias, case.target, row)).sum()

    return _work(case, loss, compiled)


def few_normalised(case: WordCase, compiled: bool = False) -> Work:
    """The best words by their scores, and log-probabilities of these alone."""
    if case.best is None:
        raise Unfit("decodes")

    def top(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        z = full_precision(F.linear(hidden, weight, bias))
        score, word = z.topk(case.best)
        return score - z.logsumexp(-1, keepdim=True), word

    return _work(case, top, compiled)


# ---- some rows at once


def _step(case: WordCase) -> int:
    """How many rows at once."""
    return max(1, min(case.hidden.shape[0], _CHUNK[case.hidden.device.type] // case.weight.shape[0]))


def of_torch(case: WordCase) -> Work:
    """torch's own, by chunks of rows: both losses as weights of the words, gradients in the forward pass."""
    _trained(case)
    if not hasattr(F, "linear_cross_entropy"):
        raise Unfit("is not in this torch")
    if case.cu_target is not None:
        raise Unfit("has one target a row")
    rows = case.hidden.shape[0]
    repeated = case.hidden.is_cuda  # on a GPU the backward pass is timed alone too, many times
    options = torch.nn.LinearCrossEntropyOptions(repeated, batch_chunk_size=_step(case), chunking_method=None)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        counts = ((GENERATION + DIVERSITY * case.word_weight) / rows).to(hidden.dtype)
        return F.linear_cross_entropy(hidden, weight, case.target, linear_bias=bias, weight=counts, reduction="sum",
                                      options=options)

    return _work(case, loss)


def chunked(case: WordCase, compiled: bool = False) -> Work:
    """Some rows at once, whose scores are computed again in backward."""
    _trained(case)
    row_of = case.row_of
    step = _step(case)
    ends = torch.arange(0, case.hidden.shape[0] + step, step, device=row_of.device)
    targets = torch.searchsorted(row_of, ends).tolist()
    parts = [slice(first, last) for first, last in zip(targets, targets[1:], strict=False)]
    rows = [None if case.cu_target is None else row_of[part] - place * step for place, part in enumerate(parts)]

    def part_loss(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, row: Tensor | None, share: Tensor) -> Tensor:
        return (share * _nll(hidden, weight, bias, target, row)).sum()

    part_loss = torch.compile(part_loss, dynamic=False) if compiled else part_loss

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        share = _share(case)
        return sum(
            checkpoint(part_loss, some, weight, bias, case.target[part], row, share[part], use_reentrant=False)
            for some, row, part in zip(hidden.split(step), rows, parts, strict=True)
        )

    return _work(case, loss)


# ---- what the arithmetic alone takes


def sgemms(case: WordCase, again: bool) -> Yardstick:
    """The products that a loss with gradients cannot do without; ``again``: nor one that does not keep z."""
    if case.best is not None and again:
        raise Unfit("has a backward pass")
    hidden, weight, _ = case.inputs
    z, grad_hidden, grad_weight = hidden @ weight.T, torch.empty_like(hidden), torch.empty_like(weight)

    def forward() -> None:
        torch.mm(hidden, weight.T, out=z)

    def both() -> None:
        forward()
        if again:
            forward()
        torch.mm(z, weight, out=grad_hidden)
        torch.mm(z.T, hidden, out=grad_weight)

    return Yardstick(dict(zip(MODES, (forward, both), strict=True)))


PEERS: dict[str, Callable[[WordCase], Work | Yardstick]] = {
    OURS: ours,
    "equations.py, eager": equation,
    "as usually written, eager": usual,
    "as usually written, torch.compile": lambda case: usual(case, compiled=True),
    "one nll for both losses, eager": one_nll,
    "one nll for both losses, torch.compile": lambda case: one_nll(case, compiled=True),
    "topk of scores and logsumexp, eager": few_normalised,
    "topk of scores and logsumexp, torch.compile": lambda case: few_normalised(case, compiled=True),
    "torch.nn.functional.linear_cross_entropy, in chunks": of_torch,
    "rows in chunks, checkpointed, eager": chunked,
    "rows in chunks, checkpointed, torch.compile": lambda case: chunked(case, compiled=True),
    THREE: lambda case: sgemms(case, again=False),
    FOUR: lambda case: sgemms(case, again=True),
}
