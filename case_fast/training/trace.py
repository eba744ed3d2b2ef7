"""Where a number first is not finite: every op of a step is looked at, forward and backward.

A mask of -inf is not finite either, and harmless. So the way goes backwards from what must be finite, the loss or a gradient,
over the ops that handed on what was not, to the one that all came from.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_UNWRITTEN = ("empty", "new_empty", "resize")  # their memory holds whatever it held


@dataclass(frozen=True)
class Range:
    """What a tensor holds.

    Attributes:
        name: of a weight or of a part of the batch, else "".
        least, greatest: of its finite numbers; None where there are none.
        bad: how many of ``count`` are not finite; rows: the first places in its first dimension that hold such.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    least: float | None
    greatest: float | None
    bad: int
    count: int
    rows: tuple[int, ...] = ()

    @classmethod
    def of(cls, x: Tensor, name: str = "", most: int = 8) -> Self:
        x = x.detach()
        if not x.is_floating_point():
            return cls(name, tuple(x.shape), str(x.dtype)[6:], *((x.min().item(), x.max().item()) if x.numel() else (None, None)),
                       0, x.numel())
        good = x.isfinite()
        finite = x[good]
        least, greatest = (finite.min().item(), finite.max().item()) if finite.numel() else (None, None)
        rows = (~good).reshape(len(x), -1).any(1).nonzero()[:most, 0].tolist() if x.dim() and x.numel() else []
        return cls(name, tuple(x.shape), str(x.dtype)[6:], least, greatest, int((~good).sum()), x.numel(), tuple(rows))


@dataclass(frozen=True)
class Origin:
    """The op that all came from. ``module``: which called it, "" the model itself; ``line``: of the model's code; of an op of the
    backward pass both are those of the op that it derives. ``inputs``: its tensors; ``output``: the one that is not finite. An
    input that is not finite is a weight or a part of the batch, and has its name."""

    op: str
    module: str
    line: str
    backward: bool
    inputs: tuple[Range, ...]
    output: Range


@dataclass
class _Event:
    op: str
    module: str
    line: str
    backward: bool
    inputs: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)


class Trace(TorchDispatchMode):
    """While it is entered, remembers each op that gave or got what is not finite.

    Args:
        model: whose modules the ops belong to.
        named: the tensors that come from outside, by name: weights and the batch.
    """

    def __init__(self, model: nn.Module, named: Mapping[str, Tensor]):
        super().__init__()
        self._named = {_place(x): name for name, x in named.items() if x.numel()}
        self._made: dict[int, _Event] = {}  # by the memory that the output lies in, which the event keeps
        self._stack = [""]
        self._calls: list[tuple[int, str, str]] = []  # of each op: how many nodes of autograd there were, module, line
        self._hooks = [hook for name, module in model.named_modules() if name for hook in self._watched(name, module)]

    def _watched(self, name: str, module: nn.Module) -> list[Any]:
        def enter(*_: Any) -> None:
            self._stack.append(name)

        def leave(*_: Any) -> None:
            self._stack.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        node = torch._C._current_autograd_node()
        if node is None:
            self._calls.append((torch.autograd._get_sequence_nr(), self._stack[-1], _line()))
        found = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name.removeprefix("aten::").startswith(_UNWRITTEN):
            return found
        outputs = [x for x in tree_leaves(found) if _bad(x)]
        if outputs:
            module, line = self._calls[-1][1:] if node is None else self._derived(node._sequence_nr())
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            event = _Event(name, module, line, node is not None, inputs, outputs)
            for x in outputs:
                # an op in place on what was bad already hands it on; an alias is no op of its own
                self._made.setdefault(_place(x), event)
        return found

    def _derived(self, sequence: int) -> tuple[str, str]:
        """Module and line of the op that made a node of autograd in the forward pass."""
        at = bisect_left(self._calls, (sequence + 1,))
        return self._calls[at][1:] if at < len(self._calls) else ("", "")

    def origin(self, targets: Iterable[Tensor]) -> Origin | None:
        """Where it began that one of these is not finite; None if all are, or nothing is known of how they were made."""
        event = next((self._made[_place(x)] for x in targets if _bad(x) and _place(x) in self._made), None)
        seen: set[int] = set()
        while event is not None:
            seen.add(id(event))
            sources = sorted((x for x in event.inputs if _bad(x)), key=lambda x: not bool(x.isnan().any()))
            before = [self._made[_place(x)] for x in sources if _place(x) in self._made]
            earlier = next((each for each in before if id(each) not in seen), None)
            if earlier is None:
                inputs = tuple(Range.of(x, self._named.get(_place(x), "")) for x in event.inputs)
                return Origin(event.op, event.module, event.line, event.backward, inputs, Range.of(event.outputs[0]))
            event = earlier
        return None


def _line() -> str:
    """Where the model's code is: "case.py:120 in read"; "" outside of it."""
    frame = sys._getframe(2)
    while frame is not None:
        if file := _of_a_model(frame.f_code.co_filename):
            return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


@cache
def _of_a_model(file: str) -> str:
    path = Path(file)
    return path.name if path.parent.name == "models" and path.name != "base.py" else ""


def _bad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and not bool(x.isfinite().all())


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
