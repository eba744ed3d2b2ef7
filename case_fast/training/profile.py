"""Where the time of a training step goes: real steps under torch's profiler, each op beside the least time it could take."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from case_fast.data import Store
from case_fast.devices import resolve_device
from case_fast.errors import ConfigError
from case_fast.files import png_of, require_folder_place, write_bytes
from case_fast.models import DialogueModel
from case_fast.optional import SilentConsole, needed
from case_fast.runs import Run, load_model
from case_fast.training.config import TrainConfig
from case_fast.training.floors import COSTS, Call, Rates, cost, measure_rates
from case_fast.training.loop import Trainer, trainer

WARM_UP = 3  # steps before those that are measured
LARGEST = 10  # parts that a table shows


@dataclass(frozen=True)
class Part:
    """Calls of one op on arguments of one kind of shape, of one step.

    Attributes:
        name: the op, such as aten::mm; shapes: of its tensors, "n" for a size that is not one of the model's.
        calls, ms, gflop, megabytes: of a step; the last two as counted from the shapes (`case_fast.training.floors`).
        floor_ms: what these operations or bytes take at the device's rates, whichever is longer, each call by itself.
    """

    name: str
    shapes: str
    calls: float
    ms: float
    gflop: float
    megabytes: float
    floor_ms: float


@dataclass(frozen=True)
class PhaseProfile:
    """Of a step of a phase: ``ms`` as it is, ``recorded_ms`` under the profiler, its parts, the largest first.

    ``trace``: the file that Perfetto opens.
    """

    phase: str
    steps: int
    ms: float
    recorded_ms: float
    parts: list[Part]
    trace: Path


def profile_training(store: Store, out: str | Path, steps: int = 5, run: str | Path | None = None, device: str = "auto"
                     ) -> tuple[Rates, Iterator[PhaseProfile]]:
    """Record ``steps`` training steps of each phase, of the paper's recipe or with a run's own settings and weights.

    The steps are those of `train`, in a run folder that is thrown away. OUT/PHASE.trace.json.gz is written for each phase.

    Returns:
        The device's rates, measured first, and the phases in turn, each recorded when it is asked for.

    Raises:
        ConfigError: no steps; what `train` refuses.
        PlaceError: ``out`` cannot be written.
        CheckpointError: no such run.
        DataError: the store is damaged or lacks a split.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, not {steps}")
    weights, config = None, TrainConfig(device=device)
    if run is not None:
        weights, _ = load_model(run, device)
        ran = Run(run).read_config()
        config = replace(config, model=weights.config, batch_size=ran["batch_size"], precision=ran["precision"],
                         matmul_precision=ran.get("matmul_precision", config.matmul_precision))
        if weights.config.vocab_size != len(store.featurizer.vocabulary):
            raise ConfigError(f"{run} was trained on another store: it has {weights.config.vocab_size} words, {store.path} has "
                              f"{len(store.featurizer.vocabulary)}")
    out = Path(out)
    require_folder_place(out)
    rates = measure_rates(resolve_device(device))
    out.mkdir(parents=True, exist_ok=True)
    return rates, _phases(store, out, steps, config, weights, rates)


def _phases(store: Store, out: Path, steps: int, config: TrainConfig, weights: DialogueModel | None, rates: Rates
            ) -> Iterator[PhaseProfile]:
    taken = WARM_UP + 2 * steps
    config = replace(config, phase1_steps=taken, max_steps=taken, log_every=9 * taken)  # no record falls into what is measured
    with tempfile.TemporaryDirectory() as folder, trainer(store, Path(folder) / "run", config, SilentConsole()) as ready:
        if weights is not None:
            ready.model.load_state_dict(weights.state_dict())
        for phase in ready.model.phases:
            ready.model.set_phase(phase)
            yield _phase(ready, phase, out / f"{phase}.trace.json.gz", steps, rates)


def _phase(ready: Trainer, phase: str, trace: Path, steps: int, rates: Rates) -> PhaseProfile:
    on_gpu, model = ready.device.type == "cuda", ready.model

    def timed(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            ready.train_step()
        if on_gpu:
            torch.cuda.synchronize(ready.device)
        return 1e3 * (time.perf_counter() - started) / count

    timed(WARM_UP)
    ms = timed(steps)
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu], record_shapes=True) as recorded:
        recorded_ms = timed(steps)
    recorded.export_chrome_trace(str(trace))
    config = model.config
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    sizes |= {1, config.heads, config.d_model // config.heads}
    return PhaseProfile(phase, steps, ms, recorded_ms, parts_of(recorded.events(), steps, rates, sizes, on_gpu), trace)


@dataclass
class _Sum:
    calls: int = 0
    us: float = 0.0
    flop: float = 0.0
    bytes: float = 0.0
    floor: float = 0.0


def parts_of(events: Iterable[Any], steps: int, rates: Rates, sizes: Collection[int], on_gpu: bool = False) -> list[Part]:
    """The parts of what torch's profiler recorded with shapes, the largest first.

    What an op of `COSTS` calls counts as its own. ``sizes``: the model's, which are shown as they are.
    """
    found: defaultdict[tuple[str, str], _Sum] = defaultdict(_Sum)
    for event in events:
        if event.device_type != DeviceType.CPU or event.is_user_annotation:
            continue
        owner = _owner(event)
        part = found[owner.name, _shown(owner, sizes)]
        part.us += event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if owner is event:
            call = Call(event.structured_input_shapes, event.input_dtypes, event.concrete_inputs)
            flop, moved = (0.0, 0.0) if _is_container(event) else cost(event.name, call)
            part.calls, part.flop, part.bytes = part.calls + 1, part.flop + flop, part.bytes + moved
            part.floor += rates.seconds(flop, moved)
    parts = [
        Part(name, shapes, part.calls / steps, part.us / 1e3 / steps, part.flop / 1e9 / steps, part.bytes / 1e6 / steps,
             1e3 * part.floor / steps)
        for (name, shapes), part in found.items()
    ]
    return sorted(parts, key=lambda part: -part.ms)


def _owner(event: Any) -> Any:
    """The outermost op around an event whose cost is known, or the event itself."""
    owner, above = event, event.cpu_parent
    while above is not None:
        if above.name in COSTS:
            owner = above
        above = above.cpu_parent
    return owner


def _is_container(event: Any) -> bool:
    """Whether others do what it is there for, so that its cost is theirs."""
    if event.name in COSTS:
        return False
    return "::" not in event.name or "autograd" in event.name or event.self_cpu_time_total < 0.5 * event.cpu_time_total


def _shown(event: Any, sizes: Collection[int]) -> str:
    """Its tensors' shapes: "n x 300, 300 x 300"; equal ones that follow each other once, with their number."""
    shown: list[list[Any]] = []
    for shape in _tensors(event.structured_input_shapes or ()):
        text = " x ".join(str(size) if size in sizes else "n" for size in shape)
        if shown and shown[-1][0] == text:
            shown[-1][1] += 1
        else:
            shown.append([text, 1])
    return ", ".join(text if count == 1 else f"{count} ({text})" for text, count in shown)


def _tensors(shapes: Sequence[Any]) -> Iterator[Sequence[int]]:
    for shape in shapes:
        if shape and isinstance(shape[0], list | tuple):
            yield from _tensors(shape)
        elif shape:
            yield shape


def _between(profiled: PhaseProfile) -> float:
    """Milliseconds of a recorded step outside all ops."""
    return max(0.0, profiled.recorded_ms - sum(part.ms for part in profiled.parts))


def _short(shapes: str) -> str:
    return shapes if len(shapes) <= 60 else shapes[:57] + "..."


def markdown(profiled: PhaseProfile, rates: Rates) -> str:
    """The ten largest parts as a table."""
    parts = profiled.parts
    rest, between = parts[LARGEST:], _between(profiled)
    lines = [
        f"Phase {profiled.phase}: {profiled.ms:.1f} ms a step, {profiled.recorded_ms:.1f} while recorded ({profiled.steps} steps "
        f"each). Floors at {rates.flop / 1e9:,.0f} GFLOP/s and {rates.bytes / 1e9:,.1f} GB/s, as measured now; what lies in a "
        "cache can be read faster.",
        "",
        "| part | shapes | calls | ms | GFLOP | MB | floor, ms | times its floor |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for part in parts[:LARGEST]:
        times = f"{part.ms / part.floor_ms:.1f}" if part.floor_ms > 0 else ""
        lines.append(f"| {part.name} | {_short(part.shapes)} | {part.calls:.0f} | {part.ms:.2f} | {part.gflop:.2f} | "
                     f"{part.megabytes:.1f} | {part.floor_ms:.2f} | {times} |")
    calls, ms, gflop, megabytes, floor_ms = (
        sum(getattr(part, name) for part in rest) for name in ("calls", "ms", "gflop", "megabytes", "floor_ms"))
    lines.append(f"| {len(rest)} other parts | | {calls:.0f} | {ms:.2f} | {gflop:.2f} | {megabytes:.1f} | {floor_ms:.2f} | |")
    lines.append(f"| between ops: Python, waiting | | | {between:.2f} | | | | |")
    return "\n".join(lines) + "\n"


def picture(profiled: PhaseProfile, rates: Rates, path: Path) -> None:
    """The rows of `markdown` as bars, drawn as PNG: what each part takes, and its floor."""
    needed("matplotlib", "the picture of a profile")
    from matplotlib.figure import Figure

    rest = profiled.parts[LARGEST:]
    rows = [(f"{part.name.removeprefix('case_fast::')}   {_short(part.shapes)}", part.ms, part.floor_ms)
            for part in profiled.parts[:LARGEST]]
    rows.append((f"{len(rest)} other parts", sum(part.ms for part in rest), sum(part.floor_ms for part in rest)))
    rows.append(("between ops: Python, waiting", _between(profiled), 0.0))
    names, ms, floors = zip(*rows, strict=True)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes, places = figure.subplots(), range(len(rows))
    axes.barh(places, ms, 0.72, color="#4a7dbd", label="as it is")
    axes.barh(places, floors, 0.3, color="#1b2a3a",
              label=f"floor: {rates.flop / 1e9:,.0f} GFLOP/s, {rates.bytes / 1e9:,.1f} GB/s")
    axes.set_yticks(places, names, fontsize=7.5)
    axes.invert_yaxis()
    axes.set(xlabel=f"ms of a step, which takes {profiled.recorded_ms:.1f} while recorded and {profiled.ms:.1f} otherwise; "
                    f"{profiled.steps} steps each")
    axes.set_title(f"phase {profiled.phase}", loc="left")
    axes.legend(loc="best", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    write_bytes(path, png_of(figure, dpi=110))
