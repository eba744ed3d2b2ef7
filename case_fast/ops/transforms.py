"""Transforms of torch around an op: those of torch.func, forward-mode derivatives, batched gradients. What of torch says that
one is active is asked in this file alone.

No kernel knows them. A call under one goes to plain torch, which knows them all (`beyond_kernels`, asked where a backend is
chosen). What was computed before can still meet one in its backward pass: there a kernel runs once for each gradient of a batch
(`mapped`, `each_alone`), and a derivative of it is refused by name (`refuse`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType, is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])
_NAMES = {
    TransformType.Vmap: "torch.vmap",
    TransformType.Grad: "torch.func.grad or vjp",
    TransformType.Jvp: "torch.func.jvp",
    TransformType.Functionalize: "torch.func.functionalize",
}


def constant_when_compiled(function: Function) -> Function:
    """Compiled code takes what the function gives as a constant: `torch.compiler.assume_constant_result` without an import of the
    compiler, two seconds and 140 MB, needed or not."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled  # a compiler guards what it compiles by the transforms that it was compiled under
def is_any() -> bool:
    """Whether a call is under a transform; asked before every call."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def names() -> list[str]:
    """Of the transforms that a call is under, the innermost first."""
    found = [_NAMES[one.key()] for one in reversed(_functorch.get_interpreter_stack() or ())]
    if forward_ad._current_level >= 0 and _NAMES[TransformType.Jvp] not in found:
        found.append("torch.func.linearize or forward-mode derivatives")
    return list(dict.fromkeys(found))


@constant_when_compiled
def beyond_kernels() -> str:
    """Which of them need plain torch, in words: all but functionalize, which takes a registered op as it is. Empty for none."""
    return " in ".join(name for name in names() if name != _NAMES[TransformType.Functionalize]) if is_any() else ""


def refuse(op: Callable, arguments: Sequence) -> None:
    """What a kernel cannot do that is about to run under a transform.

    Raises:
        NotImplementedError: one of the arguments is differentiated, forward or by torch.func.
    """
    under = " in ".join(names())
    for x in _tensors(arguments):
        while _functorch.is_batchedtensor(x):
            x = _functorch.get_unwrapped(x)
        dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
        if dual or _functorch.is_gradtrackingtensor(x):
            raise NotImplementedError(
                f"{op.name()} has no derivative under {under}, since the op that it is the gradient of ran outside; call that "
                "op inside as well, or set CASE_FAST_BACKEND=reference"
            )


def reading(function: Callable) -> Callable:
    """``function``, which asks what indices hold, where torch.func.linearize traces the call too: a trace is of these indices."""

    @functools.wraps(function)
    def untraced(*arguments: Any) -> Any:
        if not is_any():
            return function(*arguments)
        from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

        with disable_proxy_modes_tracing():
            return function(*arguments)

    return untraced


listed = reading(Tensor.tolist)


def refusal(name: str, error: Exception) -> NotImplementedError | None:
    """What to raise in place of torch's own error, which tells neither what was called nor under which transform; None for any
    other error."""
    if type(error) is not RuntimeError or not is_any():
        return None
    return NotImplementedError(f"{name} cannot run so under {' in '.join(names())}: {error}")


@contextmanager
def named(name: str) -> Iterator[None]:
    """Inside it `refusal` stands for torch's own errors."""
    try:
        yield
    except RuntimeError as error:
        if found := refusal(name, error):
            raise found from error
        raise


def _tensors(arguments: Sequence) -> list[Tensor]:
    return [x for found in arguments for x in (found if isinstance(found, list) else [found]) if isinstance(x, Tensor)]


# ---------------------------------------------------------------------------------------------------------- batches of tensors


def mapped(op: Callable) -> Callable[..., tuple[Any, Any]]:
    """The rule of a registered op for torch.vmap, as `torch.library.register_vmap` takes it: one call for each place."""

    def rule(info: Any, dims: Sequence, *arguments: Any) -> tuple[Any, Any]:
        return _joined([op(*_at(place, arguments, dims)) for place in range(info.batch_size)])

    return rule


def holds_legacy_batches(arguments: Sequence) -> bool:
    """Whether there are tensors of ``torch.autograd.grad(..., is_grads_batched=True)``, which has a vmap of its own."""
    return any(map(is_legacy_batchedtensor, _tensors(arguments)))


def holds_zeros(arguments: Sequence) -> bool:
    """Whether there are tensors that torch keeps as the word for zeros, as it has them for derivatives; the dispatcher fills
    them in."""
    return any(x._is_zerotensor() for x in _tensors(arguments))


def each_alone(call: Callable, arguments: Sequence) -> Any:
    """``call(*arguments)`` for each place of such tensors, as such tensors again."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()

    def opened(x: Any) -> Any:
        if isinstance(x, list):
            return [opened(one) for one in x]
        return torch._remove_batch_dim(x, level, 1, 0) if isinstance(x, Tensor) and is_legacy_batchedtensor(x) else x

    def dims(x: Any) -> Any:
        if isinstance(x, list):
            return [dims(one) for one in x]
        return 0 if isinstance(x, Tensor) and is_legacy_batchedtensor(x) else None

    def closed(x: Any) -> Any:
        return torch._add_batch_dim(x, 0, level) if isinstance(x, Tensor) else type(x)(closed(one) for one in x)

    whole, of = [opened(x) for x in arguments], [dims(x) for x in arguments]
    size = max(len(x) for x, given in zip(_tensors(whole), _tensors(arguments), strict=True) if is_legacy_batchedtensor(given))
    return closed(_joined([call(*_at(place, whole, of)) for place in range(size)])[0])


def _at(place: int, x: Any, dim: Any) -> Any:
    """An argument, or several, of one place; ``dim`` is None where a tensor is the same for all."""
    if isinstance(x, Tensor):
        return x if dim is None else x.select(dim, place)
    if isinstance(x, (list, tuple)):
        return type(x)([_at(place, *pair) for pair in zip(x, dim if dim is not None else [None] * len(x), strict=True)])
    return x


def _joined(results: list) -> tuple[Any, Any]:
    """The results of all places in one, and in their place 0, the dimension that counts the places."""
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    parts = [_joined(list(of_each)) for of_each in zip(*results, strict=True)]
    kind = type(results[0])
    return kind([x for x, _ in parts]), kind([dim for _, dim in parts])
