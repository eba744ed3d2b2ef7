"""Every way to compute bilinear MIM that we measure ourselves against: losses (P,) from x, y and weight.

Peers of sampled negatives are given the rows drawn; ours draws them itself. No tile or chunk is timed that was not the best of a
few sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.bilinear_mim.cases import PairCase
from benchmarks.measure import MODES, OURS, Unfit, Work, Yardstick
from case_fast import equations, ops
from case_fast.equations import full_precision

MOST_BYTES = 10 << 30  # on CPU; a peer that would need more is left out, and the table says what it would need
YARDSTICK = "bare matrix products (1 forward, 4 with backward)"
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 26}  # scores at once
_TILE = {"cpu": 1024, "cuda": 4096}


def ours(case: PairCase) -> Work:
    def loss(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return ops.bilinear_mim(x, y, weight, positive, case.negatives, case.seed, reduction="none")

    positive = None if case.one_to_one else case.positive
    return Work(loss, case.inputs, case.grad_out)


def _needs(case: PairCase, matrices: int) -> None:
    """Refuses a case whose (P, Q) matrices, as many as are alive at once, would not fit."""
    pairs, rows = case.scores
    needed = matrices * pairs * rows * case.x.element_size()
    most = MOST_BYTES if case.x.device.type == "cpu" else 0.8 * torch.cuda.get_device_properties(case.x.device).total_memory
    if needed > most:
        raise Unfit(f"needs about {needed / 2**30:,.0f} GiB")


def _in_batch(case: PairCase) -> None:
    if case.negatives is not None:
        raise Unfit("has all others as negatives")


def _compile(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def _logits(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b^T in float32 at least; in ``out`` where it has that dtype."""
    return torch.mm(a, b.T, out=out) if out is not None and out.dtype == a.dtype else full_precision(torch.mm(a, b.T))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, multiplied in the dtype of b."""
    if total.dtype == b.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a.to(b.dtype), b))


# ---- the whole matrix


def equation(case: PairCase, compiled: bool = False) -> Work:
    """The fallback of case_fast, in plain torch; sampled, it draws the rows too."""
    _needs(case, 8)

    def loss(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return equations.bilinear_mim(x, y, weight, case.positive, case.negatives, case.seed, reduction="none")

    return Work(_compile(loss) if compiled else loss, case.inputs, case.grad_out)


def usual(case: PairCase, compiled: bool = False) -> Work:
    """As contrastive losses are commonly coded: the matrix of scores, and cross-entropy along both its sides."""
    _in_batch(case)
    _needs(case, 8)
    pairs, rows = case.scores
    positive = case.positive
    own = positive.unsqueeze(1) == torch.arange(rows, device=positive.device)

    def one_to_one(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        score = torch.sigmoid(full_precision(x @ weight @ y.T))
        return F.cross_entropy(score, positive, reduction="none") + F.cross_entropy(score.T, positive, reduction="none")

    def many_to_one(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        score = torch.sigmoid(full_precision(x @ weight @ y.T))
        paired = score.gather(1, positive.unsqueeze(1)).squeeze(1)
        others = score.masked_fill(own, -torch.inf).logsumexp(0)[positive]
        return score.logsumexp(1) + torch.logaddexp(others, paired) - 2 * paired

    loss = one_to_one if case.one_to_one else many_to_one
    return Work(_compile(loss) if compiled else loss, case.inputs, case.grad_out)


# ---- some rows at once


def _sums(z: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The positives' logits, and sums of exp S without them along both sides; z may be overwritten."""
    logit = z.gather(1, own)
    weight = z.sigmoid_().exp_().scatter_(1, own, 0)
    return logit.squeeze(1), weight.sum(1), weight.sum(0)


def _slopes(z: Tensor, spare: Tensor, own: Tensor, of_row: Tensor, of_column: Tensor, of_own: Tensor) -> Tensor:
    """The gradient of the scores; z and spare may be overwritten."""
    s = z.sigmoid_()
    weight = torch.exp(s, out=spare)
    weight.mul_(s.addcmul_(s, s, value=-1))  # S (1 - S)
    weight.mul_(torch.add(of_row.unsqueeze(1), of_column, out=z))
    return weight.scatter_(1, own, of_own.unsqueeze(1))


def _sums_fused(z: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.sigmoid(z).exp().scatter(1, own, 0.0)
    return z.gather(1, own).squeeze(1), weight.sum(1), weight.sum(0)


def _slopes_fused(z: Tensor, spare: Tensor, own: Tensor, of_row: Tensor, of_column: Tensor, of_own: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return (s.exp() * s * (1 - s) * (of_row.unsqueeze(1) + of_column)).scatter(1, own, of_own.unsqueeze(1))


class _Chunked(torch.autograd.Function):
    """Row and column sums of a few rows of x at a time; backward computes their scores again."""

    @staticmethod
    def forward(ctx, x, y, weight, positive, at_once, sums, slopes):
        xw = x @ weight
        row, logit, column = (full_precision(x.new_zeros(n)) for n in (len(x), len(x), len(y)))
        buffer = row.new_empty(min(at_once, len(x)), len(y))
        for first in range(0, len(x), at_once):
            part = slice(first, first + at_once)
            z = _logits(xw[part], y, buffer[: len(xw[part])])
            logit[part], row[part], of_column = sums(z, positive[part].unsqueeze(1))
            column += of_column
        ctx.save_for_backward(x, y, weight, positive, xw, logit, row, column)
        ctx.how = at_once, slopes
        relative = torch.exp(-torch.sigmoid(logit))
        return torch.log1p(row * relative) + torch.log1p(column[positive] * relative)

    @staticmethod
    def backward(ctx, grad):
        x, y, weight, positive, xw, logit, row, column = ctx.saved_tensors
        at_once, slopes = ctx.how
        paired = torch.sigmoid(logit)
        of_row = grad / (paired.exp() + row)
        of_pair = grad / (paired.exp() + column[positive])
        of_own = -(of_row * row + of_pair * column[positive]) * paired * (1 - paired)
        of_column = torch.zeros_like(column).index_add(0, positive, of_pair)
        grad_xw, grad_y = row.new_zeros(x.shape), row.new_zeros(y.shape)
        buffer = row.new_empty(2, min(at_once, len(x)), len(y))
        for first in range(0, len(x), at_once):
            part = slice(first, first + at_once)
            size = len(xw[part])
            z = _logits(xw[part], y, buffer[0, :size])
            slope = slopes(z, buffer[1, :size], positive[part].unsqueeze(1), of_row[part], of_column, of_own[part])
            _add_product(grad_xw[part], slope, y)
            _add_product(grad_y, slope.T, xw[part])
        grad_xw = grad_xw.to(x.dtype)
        return grad_xw @ weight.T, grad_y.to(y.dtype), x.T @ grad_xw, None, None, None, None


def chunked(case: PairCase, compiled: bool = False) -> Work:
    """Eager at its best on large batches: some rows at once, in place, gradients by hand from scores computed again."""
    _in_batch(case)
    pieces = (_compile(_sums_fused), _compile(_slopes_fused)) if compiled else (_sums, _slopes)
    pairs, rows = case.scores
    at_once = max(1, min(pairs, _CHUNK[case.x.device.type] // rows))

    def loss(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return _Chunked.apply(x, y, weight, case.positive, at_once, *pieces)

    return Work(loss, case.inputs, case.grad_out)


# ---- tiles, one direction a call


class _Direction(torch.autograd.Function):
    """log sum_j exp sigmoid(a_i . b_j) by tiles with a running maximum; ``group`` (of b) names the row of a that leaves j out.
    Backward computes each tile again: the method of Inf-CL (Cheng et al., 2024), in plain torch."""

    @staticmethod
    def forward(ctx, a, b, group, tile):
        result = full_precision(a.new_empty(len(a)))
        for i in range(0, len(a), tile):
            peak, total = torch.full_like(result[i : i + tile], -torch.inf), torch.zeros_like(result[i : i + tile])
            for j in range(0, len(b), tile):
                score = _Direction.scores(a, b, group, tile, i, j)[0]
                new = torch.maximum(peak, score.amax(1))
                total = total * (peak - new).exp() + score.sub_(new.unsqueeze(1)).exp_().sum(1)
                peak = new
            result[i : i + tile] = peak + total.log()
        ctx.save_for_backward(a, b, group, result)
        ctx.tile = tile
        return result

    @staticmethod
    def backward(ctx, grad):
        a, b, group, result = ctx.saved_tensors
        tile = ctx.tile
        grad_a, grad_b = (full_precision(torch.zeros_like(side)) for side in (a, b))
        for i in range(0, len(a), tile):
            for j in range(0, len(b), tile):
                masked, score = _Direction.scores(a, b, group, tile, i, j)
                weight = (masked - result[i : i + tile].unsqueeze(1)).exp_().mul_(grad[i : i + tile].unsqueeze(1))
                weight.mul_(score.addcmul_(score, score, value=-1) if score is not masked else score * (1 - score))
                _add_product(grad_a[i : i + tile], weight, b[j : j + tile])
                _add_product(grad_b[j : j + tile], weight.T, a[i : i + tile])
        return grad_a.to(a.dtype), grad_b.to(b.dtype), None, None

    @staticmethod
    def scores(a, b, group, tile, i, j):
        """A tile of S, with -inf where group leaves it out; and S itself."""
        score = _logits(a[i : i + tile], b[j : j + tile]).sigmoid_()
        if group is None:
            return score, score
        rows = torch.arange(i, i + len(score), device=a.device)
        return score.masked_fill(group[j : j + tile] == rows.unsqueeze(1), -torch.inf), score


def one_direction_a_call(case: PairCase) -> Work:
    """Two calls, each of which scores all pairs forward and again backward."""
    _in_batch(case)
    positive, tile = case.positive, _TILE[case.x.device.type]

    def loss(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        xw = x @ weight
        paired = torch.sigmoid(full_precision((xw * y[positive]).sum(-1)))
        over_y = _Direction.apply(xw, y, None, tile)
        if case.one_to_one:
            return over_y + _Direction.apply(y, xw, None, tile) - 2 * paired
        over_x = torch.logaddexp(_Direction.apply(y, xw, positive, tile)[positive], paired)
        return over_y + over_x - 2 * paired

    return Work(loss, case.inputs, case.grad_out)


# ---- sampled


def _drawn(case: PairCase) -> tuple[Tensor, Tensor]:
    if case.negatives is None:
        raise Unfit("has sampled negatives")
    return equations.draw_negatives(case.positive, case.scores[1], case.negatives, case.seed)[:2]


def _sampled_loss(paired: Tensor, z_y: Tensor, z_x: Tensor) -> Tensor:
    """Losses from the logits of the positives (P,) and of both sides' negatives (P, k)."""
    paired = torch.sigmoid(full_precision(paired)).unsqueeze(1)
    sides = (torch.log1p((torch.sigmoid(full_precision(z)) - paired).exp().sum(1)) for z in (z_y, z_x))
    return sum(sides)


def gathered(case: PairCase, compiled: bool = False) -> Work:
    """The negatives' rows gathered to (P, k, d), twice."""
    over_y, over_x = _drawn(case)
    positive = case.positive

    def loss(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        xw, own = x @ weight, y[positive]
        z_y = torch.bmm(y[over_y], xw.unsqueeze(2)).squeeze(2)
        z_x = torch.bmm(xw[over_x], own.unsqueeze(2)).squeeze(2)
        return _sampled_loss((xw * own).sum(1), z_y, z_x)

    return Work(_compile(loss) if compiled else loss, case.inputs, case.grad_out)


def dense_then_pick(case: PairCase, compiled: bool = False) -> Work:
    """All logits by one matrix product, of which those drawn are picked."""
    over_y, over_x = _drawn(case)
    _needs(case, 4)
    pairs, rows = case.scores
    cell_y = (torch.arange(pairs, device=over_y.device).unsqueeze(1) * rows + over_y).flatten()
    cell_x = (over_x * rows + case.positive.unsqueeze(1)).flatten()
    own = torch.arange(pairs, device=over_y.device) * rows + case.positive
    cells = torch.cat([own, cell_y, cell_x])
    sizes = [pairs, cell_y.numel(), cell_x.numel()]

    def loss(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        picked = (x @ weight @ y.T).flatten().index_select(0, cells)
        paired, z_y, z_x = picked.split(sizes)
        return _sampled_loss(paired, z_y.view(pairs, -1), z_x.view(pairs, -1))

    return Work(_compile(loss) if compiled else loss, case.inputs, case.grad_out)


# ---- what the arithmetic alone takes


def sgemms(case: PairCase) -> Yardstick:
    """The products that an in-batch loss cannot do without: the scores; with gradients the scores again and two more."""
    _in_batch(case)
    _needs(case, 1)
    x, y, _ = case.inputs
    scores, grad_x, grad_y = x.new_empty(case.scores), torch.empty_like(x), torch.empty_like(y)

    def forward() -> None:
        torch.mm(x, y.T, out=scores)

    def both() -> None:
        forward()
        forward()
        torch.mm(scores, y, out=grad_x)
        torch.mm(scores.T, x, out=grad_y)

    return Yardstick(dict(zip(MODES, (forward, both), strict=True)))


PEERS: dict[str, Callable[[PairCase], Work | Yardstick]] = {
    OURS: ours,
    "equations.py, eager": equation,
    "equations.py, torch.compile": lambda case: equation(case, compiled=True),
    "as usually written, eager": usual,
    "as usually written, torch.compile": lambda case: usual(case, compiled=True),
    "rows in chunks, gradients by hand, eager": chunked,
    "rows in chunks, gradients by hand, torch.compile": lambda case: chunked(case, compiled=True),
    "tiles, one direction a call (Inf-CL's method), eager": one_direction_a_call,
    "gathered negatives, eager": gathered,
    "gathered negatives, torch.compile": lambda case: gathered(case, compiled=True),
    "dense product, then pick, eager": dense_then_pick,
    "dense product, then pick, torch.compile": lambda case: dense_then_pick(case, compiled=True),
    YARDSTICK: sgemms,
}
