"""Our step by part: which part of the model an op belongs to, forward and backward, as torch's profiler saw it."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from case_fast.models import CASE

# Where a part's forward pass runs: in modules of the model by name, in methods of it.
MODULES = {
    "cognition_encoder": "cognition encoder", "context_encoder": "context encoder", "cognition_graph": "graphs",
    "concept_graph": "graphs", "reaction_encoder": "reactions", "reaction_context_encoder": "reactions", "decoder": "decoder",
    "phi_cognition": "alignment", "phi_concept": "alignment",
}
METHODS = {"look_up": "words", "_reactions": "reactions", "_bow_loss": "vocabulary", "word_losses": "vocabulary",
           "_coarse": "alignment", "_fine": "alignment", "diversity_loss": "vocabulary"}
PARTS = ("words", "cognition encoder", "context encoder", "graphs", "reactions", "decoder", "vocabulary", "alignment", "the rest")
_PREFIX = "part: "


@contextmanager
def scopes(model: CASE) -> Iterator[None]:
    """Every part of the model named to the profiler, by hooks and wrapped methods that go again."""
    hooks, opened = [], []

    def enter(name: str) -> Callable[..., None]:
        def before(*_: Any) -> None:
            opened.append(record_function(_PREFIX + name))
            opened[-1].__enter__()

        return before

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    def wrapped(method: Callable, name: str) -> Callable:
        def call(*arguments: Any, **named: Any) -> Any:
            with record_function(_PREFIX + name):
                return method(*arguments, **named)

        return call

    for name, part in MODULES.items():
        module: nn.Module = getattr(model, name)
        hooks += [module.register_forward_pre_hook(enter(part)), module.register_forward_hook(leave)]
    for name, part in METHODS.items():
        setattr(model, name, wrapped(getattr(model, name), part))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name in METHODS:
            delattr(model, name)


def measure(model: CASE, steps: Callable[[], list[float]], seconds: float) -> dict[str, Any]:
    """{"parts": {part: {"forward_ms", "backward_ms"}}, "adam_ms", "recorded_ms", "ms", "steps"}: of a step.

    A part's time is that of its ops and of the Python between them; ``ms`` is of a step that nobody watches.
    """
    for _ in range(3):
        steps()
    plain = _repeated(steps, seconds / 2)
    with scopes(model), profile(activities=[ProfilerActivity.CPU]) as recorded:
        with record_function("step"):
            taken = _repeated(lambda: _marked(steps), seconds / 2)
    found = attribute(recorded.events(), len(taken))
    return found | {"ms": 1e3 * statistics.median(plain), "recorded_ms": 1e3 * statistics.mean(taken), "steps": len(taken)}


def _repeated(call: Callable[[], object], seconds: float, least: int = 4) -> list[float]:
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < least or time.perf_counter() < until:
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return taken


def _marked(steps: Callable[[], object]) -> None:
    with record_function(_PREFIX + "the rest"):
        steps()


def attribute(events: Iterable[Any], steps: int) -> dict[str, Any]:
    """Self times of events summed by part and direction. A node of the backward pass belongs to the part of the op that made it:
    the last one that was given the node's sequence number, since all ops that make no node have the next node's."""
    events = sorted((event for event in events if event.device_type == DeviceType.CPU), key=lambda event: event.time_range.start)
    of_forward: dict[int, str] = {}
    for event in events:
        part = _part(event)
        if event.sequence_nr >= 0 and part is not None and _node(event) is None:
            of_forward[event.sequence_nr] = part
    ms: defaultdict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        node, part = _node(event), _part(event)
        if node is not None:
            key = ("backward", of_forward.get(node.sequence_nr, "the rest"))
        elif _under(event, "Optimizer.step") or _under(event, "Optimizer.zero_grad"):
            key = ("adam", "")
        elif part is not None:
            key = ("forward", part)
        else:
            continue
        ms[key] += event.self_cpu_time_total / 1e3 / steps
    return {"parts": {part: {"forward_ms": ms["forward", part], "backward_ms": ms["backward", part]} for part in PARTS},
            "adam_ms": ms["adam", ""]}


def _above(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _part(event: Any) -> str | None:
    """Of the innermost scope around an event."""
    return next((e.name.removeprefix(_PREFIX) for e in _above(event) if e.name.startswith(_PREFIX)), None)


def _node(event: Any) -> Any | None:
    """The node of the autograd graph that an event runs for, or None in the forward pass."""
    return next((e for e in _above(event) if e.name.startswith("autograd::engine::evaluate_function")), None)


def _under(event: Any, name: str) -> bool:
    return any(e.name.startswith(name) for e in _above(event))
