"""The vocabulary at the end of a decoder (Eq. 8 and 19): losses of target words with gradients, and the most probable words.

The equations in plain torch are `linear_cross_entropy` and `top_words` of `case_fast.ops.reference`: the oracle of the tests,
and what runs where there is no kernel. The registered ops `case_fast::linear_cross_entropy_forward`, `_backward` and
`case_fast::top_words` call the kernels; autograd stands outside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from case_fast.arguments import whole
from case_fast.ops import backend, common, reference

FAMILY = "linear_cross_entropy"
MOST_WORDS = 2**31
MOST_BEST, MOST_WORDS_OF_BEST = 32, 2**19  # k and V of top_words in Triton, which merges the tiles of a row in one program


@common.public
def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, keep_bytes: int = 64 << 20,
                         cu_target: Tensor | None = None, validate: bool | None = None) -> tuple[Tensor, Tensor]:
    """nll_m = log sum_v exp z_tv - z_ty with z = hidden @ weight.T + bias, for each target word y = target[m] of row t.

    Replaces ``z = F.linear(hidden, weight, bias); F.cross_entropy(z, target, reduction="none"), z.argmax(1)`` by one pass over
    tiles of z. Any weighting of the words is a weighting of this nll: both decoder losses of CASE come from one call,
    ``sum_t (1 / T) (g3 + g4 w[target_t]) nll_t``; and L_BOW (Eq. 8) is the mean over the words of rows with several targets.

    Args:
        hidden: (T, d), weight: (V, d), bias: (V,) or None; one dtype and device. float32 and float64; float16 and bfloat16 are
            accumulated in float32 on GPU, and computed in float32 on CPU. Any strides. A bias of -inf forbids a word.
        target: (M,) int32 or int64 in [0, V).
        keep_bytes: z is kept for backward where T * V numbers (of 4 bytes, 8 for float64) are no more than so many bytes;
            else it is computed again, in tiles: about a third more work in no more than 16 MiB, and 1 MiB a thread.
        cu_target: (T + 1,) int32 or int64: row t has the targets target[cu_target[t]:cu_target[t + 1]], any number of them.
            Default: each row has one, and M == T.
        validate: whether the contents of target and cu_target are checked. Default: on CPU always, elsewhere never, since
            reading the answer would stop the device's queue. The native CPU kernels always check.

    Returns:
        nll (M,), float64 for float64 inputs, else float32, under autocast too; and without gradient the word of greatest z in
        each row (T,), int64, the lowest among equals.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; the message names it.
        IndexError: a target is out of range, or cu_target does not rise from 0 to M. All before any kernel runs.
        ConfigError: CASE_FAST_BACKEND asks for a backend that cannot serve this call.

    On CPU `torch.set_float32_matmul_precision("medium")` lets products of float32 round their factors to bfloat16 as in
    `linear`, but the scores of 24 rows or fewer.

    Deterministic: equal inputs give equal bits, forward and backward, whatever the number of threads. A row whose targets all
    have gradient 0 takes no part in backward. NaN or Inf in a row of hidden stays out of the other rows' nll, prediction and
    grad_hidden; the gradients of weight and bias, sums over all rows that take part, are NaN then. No second derivative but on
    the reference backend.
    """
    device = common.device_type(hidden)
    compute, differs = common.compute_dtype(hidden)
    if differs:
        hidden, weight, bias = common.cast(compute, hidden, weight, bias)
    bias = weight.new_zeros(weight.shape[:1]) if bias is None else bias
    _check(hidden, weight, bias)
    _check_targets(target, cu_target, hidden)
    keep_bytes = whole("keep_bytes", keep_bytes)
    if keep_bytes < 0:
        raise ValueError(f"keep_bytes must be at least 0, not {keep_bytes}")
    target, cu_target = common.like_indices(target, cu_target)
    runs = backend.choose(FAMILY, device)
    if common.reads(validate, runs, device):
        _check_contents(target, cu_target, weight.shape[0])
    if runs == "reference":
        with torch.autocast(device, enabled=False):
            return reference.linear_cross_entropy(hidden, weight, bias, target, cu_target)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad or bias.requires_grad):
        keep = hidden.shape[0] * weight.shape[0] * common.sum_dtype(hidden).itemsize <= keep_bytes
        return _LinearCrossEntropy.apply(runs, hidden, weight, bias, target, cu_target, keep)
    return common.call(_forward_op, _forward, runs, hidden, weight, bias, target, cu_target, False)[:2]


@common.public
def top_words(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable words of each row and their log-probabilities, for decoding; k = 1 is argmax.

    Replaces ``F.log_softmax(F.linear(hidden, weight, bias), 1).topk(k)``: the rows of weight are read once as they lie, and
    neither z nor its softmax is kept. Made for few rows (hypotheses) and a small k.

    Args:
        hidden: (T, d), weight: (V, d), bias: (V,) or None, as in `linear_cross_entropy`. A bias of -inf forbids a word, which
            then has no part in the sum and log-probability -inf.
        k: in [1, V].

    Returns:
        log-probabilities (T, k), the greatest first, and words (T, k), int64; among equals the lowest word comes first. float64
        for float64 inputs, else float32. Without gradient. A NaN in a row makes its log-probabilities NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; the message names it.

    Deterministic, whatever the number of threads; on CPU, a row's result does not depend on the other rows. On GPU, plain torch
    serves a k above 32.
    """
    compute, differs = common.compute_dtype(hidden)
    if differs:
        hidden, weight, bias = common.cast(compute, hidden, weight, bias)
    bias = weight.new_zeros(weight.shape[:1]) if bias is None else bias
    _check(hidden, weight, bias)
    k = whole("k", k)
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k must be in [1, V] = [1, {weight.shape[0]}], not {k}")
    device = common.device_type(hidden)
    with torch.no_grad(), torch.autocast(device, enabled=False):
        runs = backend.choose(FAMILY, device)
        if runs == "native" or runs == "triton" and k <= MOST_BEST and weight.shape[0] <= MOST_WORDS_OF_BEST:
            return common.call(_top_op, _top_words, runs, hidden, weight, bias, k)
        return reference.top_words(hidden, weight, bias, k)


# ------------------------------------------------------------------------------------------------------------------- checks


def _check(hidden: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Shapes, dtypes and devices: whatever is known without reading a tensor."""
    dtype, device = hidden.dtype, hidden.device
    common.check_dtype("hidden", hidden)
    if hidden.dim() != 2 or hidden.shape[1] == 0:
        raise ValueError(f"hidden must be (T, d) with d above 0, not {tuple(hidden.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        common.check_like(name, x, dtype, device, "hidden")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be (V, {hidden.shape[1]}) as hidden, not {tuple(weight.shape)}")
    if not 0 < weight.shape[0] < MOST_WORDS:
        raise ValueError(f"weight must have from 1 to 2^31 - 1 rows, not {weight.shape[0]}")
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias must be (V,) = ({weight.shape[0]},) as weight, not {tuple(bias.shape)}")


def _check_targets(target: Tensor, cu_target: Tensor | None, hidden: Tensor) -> None:
    for name, x in (("target", target), ("cu_target", cu_target)):
        if x is not None:
            common.check_index(name, x, hidden.device, "hidden")
    rows = hidden.shape[0]
    if cu_target is None and target.shape[0] != rows:
        raise ValueError(f"target must be (T,) = ({rows},) as hidden without cu_target, not {tuple(target.shape)}")
    if cu_target is not None and cu_target.shape[0] != rows + 1:
        raise ValueError(f"cu_target must be (T + 1,) = ({rows + 1},) as hidden is, not {tuple(cu_target.shape)}")


def _check_contents(target: Tensor, cu_target: Tensor | None, words: int) -> None:
    """Reads target and cu_target, and raises IndexError at the first entry that is wrong."""
    if cu_target is not None:
        common.check_offsets("cu_target", cu_target, target.shape[0], "targets")
    common.check_within("target", target, words)


# ------------------------------------------------------------------------------------------------------------ registered ops


def _outputs(hidden: Tensor, weight: Tensor, target: Tensor, keep: bool) -> tuple[Tensor, ...]:
    """Uninitialised nll, prediction, state and kept."""
    rows, words = hidden.shape[0], weight.shape[0]
    full = common.sum_dtype(hidden)
    nll, state = hidden.new_empty(target.shape[0], dtype=full), hidden.new_empty(rows, 2, dtype=full)
    kept = hidden.new_empty(rows * words if keep else 0, dtype=full)
    return nll, hidden.new_empty(rows, dtype=torch.int64), state, kept


def _gradients(wanted: list[bool], *inputs: Tensor) -> list[Tensor]:
    """Uninitialised gradients of the inputs that want one."""
    return common.empty_like(*[x if w else None for x, w in zip(inputs, wanted, strict=True)])


def _best(hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Uninitialised log-probabilities and words."""
    found = torch.empty((hidden.shape[0], k), dtype=common.sum_dtype(hidden), device=hidden.device)
    return found, torch.empty_like(found, dtype=torch.int64)


def _run(direction: str, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, cu_target: Tensor | None,
         others: Sequence[Tensor | None]) -> None:
    """Runs the native kernel. others: what its arguments are beside the inputs."""
    rows, dim = hidden.shape
    words = weight.shape[0]
    call = (  # struct case_fast_linear_cross_entropy
        rows, words, target.shape[0], dim, common.DTYPES[hidden.dtype], common.INDEX_BITS[target.dtype],
        common.bf16_products(), target.data_ptr(), 0 if cu_target is None else cu_target.data_ptr(),
    )
    status = common.run_native(f"{FAMILY}_{direction}", hidden, call, common.pointers(hidden, weight, bias, *others))
    if status:
        common.refuse_contents(FAMILY, status, {11: "target", 12: "cu_target"}, lambda: _check_contents(target, cu_target, words))


def _forward(runs: str, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, cu_target: Tensor | None, keep: bool
             ) -> tuple[Tensor, ...]:
    hidden, weight, bias, target, cu_target = common.contiguous(hidden, weight, bias, target, cu_target)
    if runs == "triton":
        from case_fast.ops import linear_cross_entropy_triton as triton

        return triton.forward(hidden, weight, bias, target, cu_target, keep)
    nll, prediction, state, kept = found = _outputs(hidden, weight, target, keep)
    _run("forward", hidden, weight, bias, target, cu_target, (nll, prediction, state, kept if keep else None))
    return found


def _backward(runs: str, grad_nll: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor,
              cu_target: Tensor | None, state: Tensor, kept: Tensor, wanted: list[bool]) -> list[Tensor]:
    grad_nll, hidden, weight, bias = common.contiguous(grad_nll, hidden, weight, bias)
    target, cu_target, state, kept = common.contiguous(target, cu_target, state, kept)
    if runs == "triton":
        from case_fast.ops import linear_cross_entropy_triton as triton

        return triton.backward(grad_nll, hidden, weight, bias, target, cu_target, state, kept, wanted)
    found = _gradients(wanted, hidden, weight, bias)
    given = iter(found)
    gradients = [next(given) if w else None for w in wanted]
    _run("backward", hidden, weight, bias, target, cu_target, (state, kept if kept.numel() else None, grad_nll, *gradients))
    return found


def _top_words(runs: str, hidden: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    hidden, weight, bias = common.contiguous(hidden, weight, bias)
    if runs == "triton":
        from case_fast.ops import linear_cross_entropy_triton as triton

        return triton.top_words(hidden, weight, bias, k)
    value, word = found = _best(hidden, k)
    rows, dim = hidden.shape
    status = backend.native.top_words(
        rows, weight.shape[0], k, dim, common.DTYPES[hidden.dtype], hidden.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        value.data_ptr(), word.data_ptr(), torch.get_num_threads(),
    )
    if status:
        common.refuse(FAMILY, status)
    return found


_INPUTS = "Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor? cu_target"
# nll (M,), prediction (T,), state (T, 2): the greatest z of a row, and log sum exp z less that; kept: z in an order of the
# backend's own, or empty.
_forward_op = common.register(
    f"{FAMILY}_forward(str backend, {_INPUTS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)", _forward,
    lambda runs, hidden, weight, bias, target, cu_target, keep: _outputs(hidden, weight, target, keep),
)
# Those gradients of hidden, weight and bias that are wanted.
_backward_op = common.register(
    f"{FAMILY}_backward(str backend, Tensor grad_nll, {_INPUTS}, Tensor state, Tensor kept, bool[] wanted) -> Tensor[]",
    _backward,
    lambda runs, grad_nll, hidden, weight, bias, target, cu_target, state, kept, wanted: _gradients(wanted, hidden, weight, bias),
)
_top_op = common.register(
    "top_words(str backend, Tensor hidden, Tensor weight, Tensor bias, int k) -> (Tensor, Tensor)", _top_words,
    lambda runs, hidden, weight, bias, k: _best(hidden, k),
)


# --------------------------------------------------------------------------------------------------------------- autograd


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the inputs, two numbers a row, and z where it is small."""

    @staticmethod
    def forward(ctx, runs, hidden, weight, bias, target, cu_target, keep):
        nll, prediction, state, kept = common.call(_forward_op, _forward, runs, hidden, weight, bias, target, cu_target, keep)
        ctx.save_for_backward(hidden, weight, bias, target, cu_target, state, kept)
        ctx.runs = runs
        ctx.mark_non_differentiable(prediction)
        return nll, prediction

    @staticmethod
    def backward(ctx, grad_nll, _):
        wanted = list(ctx.needs_input_grad[1:4])

        def call(*tensors):
            return common.call(_backward_op, _backward, ctx.runs, *tensors, wanted)

        found = iter(common.gradients(FAMILY, call, (grad_nll, *ctx.saved_tensors)))
        return None, *[next(found) if w else None for w in wanted], None, None, None
