"""What the public ops share around their kernels: the dtype of a call, addresses, and the refusal of second derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as _dispatch_modes
from torch._C._functorch import peek_interpreter_stack as _transform

HALF = (torch.float16, torch.bfloat16)
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # enum case_fast_dtype


def compute_dtype(like: Tensor) -> tuple[torch.dtype, bool]:
    """The dtype that a call on ``like`` computes in, and whether its inputs must be cast to it: under autocast, autocast's;
    on CPU, float32 in place of half precision."""
    device = like.device.type
    autocast = torch.is_autocast_enabled(device)
    compute = torch.get_autocast_dtype(device) if autocast else like.dtype
    if device == "cpu" and compute in HALF:
        compute = torch.float32
    return compute, autocast or compute != like.dtype


def cast(compute: torch.dtype, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """The inputs in that dtype; float64, as autocast does, and None stay as they are."""
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(compute) for x in inputs)


def check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be a whole number, not {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63), not {seed!r}")


def restored(out: Tensor, given: torch.dtype) -> Tensor:
    """A result in the dtype that the caller gave; under autocast as it is."""
    return out if out.dtype == given or torch.is_autocast_enabled(out.device.type) else out.to(given)


def pointer(x: Tensor | None) -> int:
    """Its address; 0 stands for an absent one."""
    return 0 if x is None else x.data_ptr()


_PLAIN = {Tensor, torch.nn.Parameter, str, int, float, bool, type(None)}
_PLAIN_OR_LIST = _PLAIN | {list}


def call(op: Callable, implementation: Callable, *arguments):
    """``op(*arguments)``, a registered op of this package that runs ``implementation``: straight where nothing watches, since the
    dispatcher's way from Python to Python can take longer than a step of decoding. Compilers, dispatch modes (fake tensors,
    tracing, counting), transforms of torch.func and subclasses of Tensor see the op.
    """
    return (op if watched(arguments) else implementation)(*arguments)


def watched(arguments: tuple) -> bool:
    """Whether anything but the op itself would see a call with these arguments."""
    return torch.compiler.is_compiling() or _dispatch_modes() > 0 or _transform() is not None or not _are_plain(arguments)


def _are_plain(arguments: tuple | list) -> bool:
    types = set(map(type, arguments))
    if types <= _PLAIN:
        return True
    return types <= _PLAIN_OR_LIST and all(_are_plain(x) for x in arguments if type(x) is list)


class _NoSecondDerivative(torch.autograd.Function):
    """Passes gradients through as functions of all that they were computed from, and refuses to differentiate them."""

    @staticmethod
    def forward(ctx, family, count, *tensors):
        ctx.family = family
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(f"case_fast.ops.{ctx.family} has no second derivative; with CASE_FAST_BACKEND=reference it has")


def gradients(family: str, backward: Callable[..., list[Tensor]], tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    """``backward(*tensors)``, the gradients of a family's op, which refuse to be differentiated again."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        with torch.no_grad():
            found = backward(*tensors)
        return _NoSecondDerivative.apply(family, len(found), *found, *tensors)
    return backward(*tensors)
