"""What the replay of a step that was not finite found, as values and in words."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from case_fast.training.trace import Origin, Range

LISTED = 8  # bad rows, weights, dialogues that are named


@dataclass(frozen=True)
class Variant:
    """How a step is replayed. ``backend``: "kernels", those that served the run, or "reference", plain torch everywhere."""

    backend: str
    precision: str

    @property
    def said(self) -> str:
        return f"{self.backend} {self.precision}"


@dataclass(frozen=True)
class Replayed:
    """One replay: its losses and the norm of the gradients (NaN where there are none), which of them, and which parameters'
    gradients, are not finite, and where it began."""

    variant: Variant
    losses: dict[str, float]
    norm: float
    bad_losses: list[str]
    bad_gradients: list[str]
    origin: Origin | None = None

    @property
    def finite(self) -> bool:
        return not self.bad_losses and not self.bad_gradients


@dataclass
class Debugged:
    """What a dump comes from.

    Attributes:
        weights_from: in words; exact: they are those of the step.
        then: the losses and the norm that training saw.
        bad_weights, bad_inputs: what was not finite before anything was computed.
        checkpoint: the step of the newest sound one that is not later; bad_in_checkpoint: those of its weights not finite.
        alone: the dialogues of the batch, as places in the split, that make it by themselves; together: where none does, some
            that do and of which none can be left out.
        words: those of the rows that are bad where it began.
        verdict, remedy: what it comes from, and a line to paste.
    """

    dump: str
    run: str
    store: str
    step: int
    split: str
    phase: str
    indices: list[int]
    weights_from: str
    exact: bool
    then: dict[str, Any]
    replays: list[Replayed] = field(default_factory=list)
    bad_weights: list[Range] = field(default_factory=list)
    bad_inputs: list[Range] = field(default_factory=list)
    checkpoint: int | None = None
    bad_in_checkpoint: list[Range] = field(default_factory=list)
    largest_weight: Range | None = None
    alone: list[int] = field(default_factory=list)
    together: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    verdict: str = ""
    remedy: str = ""

    @property
    def again(self) -> Replayed | None:
        """The first replay that was not finite."""
        return next((each for each in self.replays if not each.finite), None)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verdict(found: Debugged, as_trained: str) -> tuple[str, str]:
    """What it comes from, and the line to paste."""
    run, store = shlex.quote(found.run), shlex.quote(found.store)
    resume = f"case-fast train --config {run}/config.json --data {store} --out {run} --resume"
    other = f"case-fast train --config {run}/config.json --data {store} --out {shlex.quote(found.run + '.2')}"
    if found.bad_weights:
        said = f"weights are not finite before the step: {named(found.bad_weights)}"
        if found.checkpoint is None:
            return said, other
        if not found.bad_in_checkpoint:
            return f"{said}; those of the checkpoint of step {found.checkpoint:,} are", resume
        aside = shlex.quote(f"{found.run}/checkpoints/{found.checkpoint:08d}")
        return f"{said}; so in the checkpoint of step {found.checkpoint:,}", f"mv {aside} {aside}.bad && {resume}"
    if found.bad_inputs:
        return (f"the batch holds what is not finite: {named(found.bad_inputs)}", f"case-fast doctor {store}")
    if found.again is None:
        of = "" if found.exact else " with the weights of an earlier step"
        return f"it does not happen again{of}: another device, a fault of the machine, or what is not in the dump", resume
    bad = {each.variant.said for each in found.replays if not each.finite}
    if not any(said.startswith("reference") for said in bad):
        return ("it happens with the kernels alone, not in plain torch: a fault of case_fast; please report it",
                f"CASE_FAST_BACKEND=reference {resume}")
    if bad == {f"kernels {as_trained}"} and as_trained == "bf16":
        return "it happens in bfloat16 alone", f"{other} --precision float32"
    if not any(said.endswith("float64") for said in bad):
        return "float32 is too narrow for these numbers, float64 is not: weights or gradients have grown too large", (
            f"{other} --clip_norm 1.0 --lr_scale 0.5")
    return "it happens in every precision: these numbers have no finite result", f"{other} --clip_norm 1.0 --lr_scale 0.5"


def named(ranges: list[Range]) -> str:
    return ", ".join(each.name for each in ranges[:LISTED]) + f" and {len(ranges) - LISTED} more" * (len(ranges) > LISTED)


# ---- in words


def lines(found: Debugged) -> Iterator[tuple[str, str]]:
    """(what, the answer), in order."""
    of = "validation after step" if found.split == "valid" else "step"
    yield "step", f"{of} {found.step:,} ({found.phase}), {len(found.indices)} dialogues of {found.split}: {_few(found.indices)}"
    if was := found.then.get("losses"):
        yield "then", ", ".join(f"{name} {_number(value)}" for name, value in was.items()) + (
            f"; norm of the gradients {_number(found.then.get('grad_norm'))}")
    yield "weights", found.weights_from
    if found.largest_weight:
        each = found.largest_weight
        yield "", f"the largest is in {each.name}: {_span(each)}"
    for each in found.bad_weights[:LISTED]:
        yield "", f"not finite: {each.name} {list(each.shape)}, {each.bad:,} of {each.count:,} numbers{_rows(each)}"
    if found.checkpoint is None:
        yield "checkpoint", "none before it"
    else:
        bad = f"not finite: {named(found.bad_in_checkpoint)}" if found.bad_in_checkpoint else "all weights finite"
        yield "checkpoint", f"of step {found.checkpoint:,}: {bad}"
    for each in found.bad_inputs:
        yield "input", f"not finite: {each.name} {list(each.shape)}, {each.bad:,} numbers{_rows(each)}"
    said = None
    for each in found.replays:
        if each.finite:
            yield each.variant.said, f"finite: loss {_number(each.losses['loss'])}, norm of the gradients {_number(each.norm)}"
            continue
        losses = f"losses {', '.join(each.bad_losses)}" if each.bad_losses else (
            f"losses finite, gradients of {', '.join(each.bad_gradients[:LISTED])}")
        yield each.variant.said, f"again: {losses}"
        if each.origin:
            at = each.origin.op, each.origin.module, each.origin.line
            yield from [("", "first at the same place")] if at == said else _origin(each.origin)
            said = at
    if found.words:
        yield "words", "; ".join(found.words)
    if found.again is not None and found.indices:
        if found.alone:
            yield "dialogues", f"{len(found.alone)} of {len(found.indices)} make it alone: {_few(found.alone)}"
        elif found.together:
            yield "dialogues", f"none alone; together {_few(found.together)}"
    yield "so", found.verdict
    yield "next", found.remedy


def _origin(origin: Origin) -> Iterator[tuple[str, str]]:
    where = " of ".join(filter(None, [origin.module, origin.line])) or "the model"
    yield "", f"first in {'the gradient of ' * origin.backward}{where}: {origin.op}"
    for each in origin.inputs:
        yield "", f"  of {each.name or 'a tensor'} {each.dtype} {list(each.shape)}: {_span(each)}{_rows(each)}"
    yield "", f"  gives {origin.output.dtype} {list(origin.output.shape)}: {_span(origin.output)}{_rows(origin.output)}"


def _span(each: Range) -> str:
    span = "no finite number" if each.least is None else f"{_number(each.least)} to {_number(each.greatest)}"
    return span + f", {each.bad:,} of {each.count:,} not finite" * bool(each.bad)


def _rows(each: Range) -> str:
    return f"; rows {_few(each.rows)}" if each.rows else ""


def _few(numbers: Any) -> str:
    return ", ".join(map(str, list(numbers)[:LISTED])) + (", ..." if len(numbers) > LISTED else "")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
