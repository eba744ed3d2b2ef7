"""Training on a GPU machine, by the package's own trainer. STORE is a store's folder, or what `case-fast pack` made of one.

    python -m benchmarks.gpu_training steps --store STORE --out FILE     some steps of each phase: time, launches, memory, losses
    python -m benchmarks.gpu_training recipe --store STORE --out FOLDER  a whole training within minutes, then its evaluation
    python -m benchmarks.gpu_training join FOLDER OUT                    what `recipe` left, as a folder of weights

`recipe` stops in time, saves its state below build/, and goes on there when it is called again. FOLDER gets recipe.json (how far
it is, settings, metrics), log.jsonl, predictions.jsonl and the best weights so far as bf16 in files below 16 MiB: small enough
to be carried away. `case_fast.models.load` opens what `join` makes of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from case_fast.data import Store, open_store
from case_fast.data.travel import unpack_store
from case_fast.devices import device_in_words, resolve_device
from case_fast.errors import CaseFastError, CheckpointError, Interrupted
from case_fast.files import plain, sha256, write_json
from case_fast.models import build, model_class
from case_fast.models.base import read_config
from case_fast.runs import Run, load_model
from case_fast.training import TrainConfig, preset
from case_fast.training.checkpoint import Checkpoints
from case_fast.training.loop import trainer
from case_fast.training.process import peak_memory

BUILD = Path(__file__).resolve().parents[1] / "build"
# A loss of the first steps may differ from the CPU's in float32 by this share: sums in another order; bf16 has 8 bits.
TOLERANCE = {"float32": 1e-4, "bf16": 2e-2}
COMPARED = 3  # steps
PROFILED = 5  # steps
SHARD_BYTES = 16 << 20
FILES, OTHERS = 7, 3  # that `recipe` leaves at most, so that one more may go with them; those that are no weights
RESERVE = 20.0  # seconds for the last checkpoint and the weights when the time is over
REPLIES = 64  # dialogues a batch of the evaluation


def opened(path: Path) -> Store:
    """The store at ``path``; a packed one is unpacked below build/ once."""
    if not path.is_file():
        return open_store(path)
    folder = BUILD / "unpacked" / sha256(path)[:16]
    return open_store(folder) if folder.is_dir() else unpack_store(path, folder)


# ---- some steps of each phase


def steps(store: Store, out: Path, config: TrainConfig, count: int) -> bool:
    """Measure ``count`` steps of each phase; ``out`` is written anew after each.

    Returns:
        whether the first losses agree with the CPU's.
    """
    device = resolve_device(config.device)
    tolerance = TOLERANCE[config.precision if config.matmul_precision == "highest" else "bf16"]
    found: dict[str, Any] = {
        "device": device_in_words(device), "store": store.fingerprint, "config": config.as_dict(), "steps": count,
        "tolerance": tolerance, "phases": {},
    }
    write_json(out, found)
    names = model_class(config.model.kind).phases
    for name in names:
        phase = replace(config, phase1_steps=count + PROFILED if name != names[-1] else 0)
        measured = _timed(store, phase, count)
        if device.type == "cuda" and config.step != "eager":
            measured["eager"] = _timed(store, replace(phase, step="eager"), count)
        exact = replace(phase, device="cpu", precision="float32", matmul_precision="highest")
        here, cpu = _losses(store, phase), _losses(store, exact)
        measured |= {"losses": here, "cpu_losses": cpu, "agree": _agree(here, cpu, tolerance)}
        found["phases"][name] = measured
        write_json(out, plain(found))
        print(f"{name}: {json.dumps(measured)}", flush=True)
    return all(phase["agree"] for phase in found["phases"].values())


def _losses(store: Store, config: TrainConfig) -> list[float]:
    """The first losses without dropout, whose plain-torch part draws other numbers on each kind of device."""
    off = {name: 0.0 for name in asdict(config.model) if name.endswith("dropout")}
    config = replace(config, model=replace(config.model, **off))
    with tempfile.TemporaryDirectory() as folder, trainer(store, folder, config) as run:
        return [_loss_of_a_step(run) for _ in range(COMPARED)]


def _loss_of_a_step(run: Any) -> float:
    run.train_step()
    run.collect()
    return run.recent[-1].losses["loss"]


def _agree(here: Sequence[float], cpu: Sequence[float], tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance * abs(b) for a, b in zip(here, cpu, strict=True))


def _timed(store: Store, config: TrainConfig, count: int) -> dict[str, Any]:
    """``ms`` a step: the median from one step's end to the next over the last two thirds; the first compile kernels. Of steps
    that the host only queues, the mean over these: it waits before them and behind them."""
    cuda = resolve_device(config.device).type == "cuda"
    with tempfile.TemporaryDirectory() as folder, trainer(store, folder, config) as run:
        if cuda:
            torch.cuda.reset_peak_memory_stats(run.device)
        ends, late = [time.perf_counter()], count // 3
        for step in range(count):
            run.train_step()  # eager: ends with the losses' way to the host: the step before Adam is over then
            if step + 1 in (late, count):
                run.collect()
            ends.append(time.perf_counter())
        took = [1e3 * (end - start) for start, end in zip(ends, ends[1:], strict=False)]
        spent = took[late:]
        ms = statistics.median(spent) if run.form.at_once else statistics.mean(spent)
        found: dict[str, Any] = {
            "form": type(run.form).__name__, "ms": ms, "ms_least": min(spent), "ms_most": max(spent), "ms_first": took[0],
            **peak_memory(run.device), "launches": None, "copies": None, "busy_ms": None, "busy": None,
        }
        if cuda:
            try:
                found |= _profiled(run, found["ms"])
            except Exception as error:  # what was timed is not to be lost with it
                found["profile_failed"] = f"{type(error).__name__}: {error}"
    return found


def _profiled(run: Any, ms: float) -> dict[str, float]:
    """Launches, copies and busy time a step. The profiler slows the host down, so the share is of ``ms``, measured without."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED):
            run.train_step()
        torch.cuda.synchronize(run.device)
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA
              and not getattr(event, "is_user_annotation", False)]  # as Optimizer.step, which spans kernels and gaps
    copies = [event for event in events if event.name.startswith(("Memcpy", "Memset"))]
    busy = covered((event.time_range.start, event.time_range.end) for event in events) / 1e3 / PROFILED
    return {"launches": (len(events) - len(copies)) / PROFILED, "copies": len(copies) / PROFILED, "busy_ms": busy,
            "busy": busy / ms}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length that spans cover together."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


# ---- the whole recipe


def recipe(store: Store, out: Path, run: Path, config: TrainConfig, seconds: float, limit: int | None = None) -> bool:
    """Train into the folder ``run``, from where it stands, and evaluate the test split; leave in ``out`` what is to be carried.

    Args:
        seconds: that it may take, evaluation and saving included; when they are over, the state is saved.
        limit: evaluate the first so many examples alone.

    Returns:
        whether it is done; if not, another call goes on.
    """
    until = time.monotonic() + seconds - RESERVE
    resume = Run(run).config.exists()
    record: dict[str, Any] = {"state": "training", "device": device_in_words(resolve_device(config.device)),
                              "store": store.fingerprint, "config": config.as_dict()}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "recipe.json", record)
    try:
        with trainer(store, run, config, resume=resume) as ready:
            shards(ready.model.state_dict())  # whether they can be carried away is to be known before
            clock = threading.Timer(max(0.0, until - time.monotonic()), setattr, (ready.stop, "signal", "the end of its time"))
            clock.daemon = True
            clock.start()
            try:
                record["result"] = plain(asdict(ready.train()) | {"run": str(run.name)})
            finally:
                clock.cancel()
                record["step"] = ready.step
        record |= {"state": "evaluating"} | _carried(run, out)
        write_json(out / "recipe.json", record)
        record["evaluation"] = _evaluated(store, run, config.device, limit, until)
        record["state"] = "done"
    except Interrupted as stopped:
        record |= {"state": "to be resumed", "said": str(stopped)}
    except Exception as error:
        record |= {"state": "failed", "said": f"{type(error).__name__}: {error}"}
        raise
    finally:
        write_json(out / "recipe.json", record | _carried(run, out))
    return record["state"] == "done"


def _evaluated(store: Store, run: Path, device: str, limit: int | None, until: float) -> dict[str, Any]:
    """The metrics of RUN/evaluation/test, made where they are not there yet; `Interrupted` when the time is over before."""
    from case_fast.evaluation import evaluate
    from case_fast.generation import GenerationConfig, generate_all

    def told(done: int, total: int) -> None:
        if time.monotonic() > until:
            raise Interrupted(f"the time was over within the evaluation, {done:,} of {total:,}")

    folder, settings = Run(run).evaluation("test"), GenerationConfig()
    if not (folder / "metrics.json").is_file():
        model, chosen = load_model(run, device)
        evaluate(model, store, "test", folder, limit=limit, batch_size=REPLIES, device=chosen, progress=told,
                 settings=asdict(settings),
                 generate=lambda indices: generate_all(model, store, "test", indices, settings, REPLIES, chosen, told))
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def _carried(run: Path, out: Path) -> dict[str, Any]:
    """Write the weights, the log and the replies into ``out``; what of the weights belongs into recipe.json."""
    files = Run(run)
    for name, kept in (("log.jsonl", files.log), ("predictions.jsonl", files.evaluation("test") / "predictions.jsonl")):
        if kept.is_file():
            shutil.copyfile(kept, out / name)
    if files.best.is_dir():
        of, tensors = "best", load((files.best / "model.safetensors").read_bytes())
        config = read_config(files.best)
    elif newest := Checkpoints(files.checkpoints).newest():
        of, tensors = f"step {newest.step}", newest.tensors["model"]
        config = {"model": newest.state["config"]["kind"], **newest.state["config"]["model"]}
    else:
        return {}
    return {"weights": {"of": of, "config": config, "files": write_shards(tensors, out)}}


def write_shards(tensors: dict[str, Tensor], out: Path, limit: int = SHARD_BYTES) -> dict[str, str]:
    """Write tensors, floats as bf16, into the safetensors files that `shards` plans; the files' names, each with its sha256."""
    planned = shards(tensors, limit)
    for old in out.glob("weights-*.safetensors"):
        old.unlink()
    written: dict[str, str] = {}
    for place, names in enumerate(planned, 1):
        path = out / f"weights-{place}-of-{len(planned)}.safetensors"
        save_file({name: tensors[name].to(_carried_as(tensors[name])).contiguous() for name in names}, path)
        path.chmod(0o644)  # safetensors makes files for their owner alone
        written[path.name] = sha256(path)
    return written


def shards(tensors: dict[str, Tensor], limit: int = SHARD_BYTES) -> list[list[str]]:
    """The names of the tensors of each file: each goes, the largest first, into the first file below ``limit`` bytes with room.

    Raises:
        CheckpointError: a tensor is too large for a file, or there are more files than may be carried.
    """
    sizes = {name: x.numel() * _carried_as(x).itemsize + len(name) + 128 for name, x in tensors.items()}  # with its entry ahead
    planned: list[list[str]] = []
    room: list[int] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        place = next((place for place, left in enumerate(room) if sizes[name] <= left), len(room))
        if place == len(room):
            planned.append([])
            room.append(limit - 1024)
        planned[place].append(name)
        room[place] -= sizes[name]
        if room[place] < 0:
            raise CheckpointError(f"{name} takes {sizes[name]} bytes, more than a file of {limit}")
    if len(planned) + OTHERS > FILES:
        raise CheckpointError(f"the weights make {len(planned)} files of {limit} bytes; with the {OTHERS} others that is more "
                              f"than {FILES}")
    return planned


def _carried_as(tensor: Tensor) -> torch.dtype:
    return torch.bfloat16 if tensor.dtype == torch.float32 else tensor.dtype


def join(folder: Path, out: Path) -> None:
    """Put the weights of ``folder`` together into the folder ``out``, which `case_fast.models.load` opens.

    Raises:
        CheckpointError: something of them is missing or damaged.
    """
    try:
        weights = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["weights"]
        settings, tensors = dict(weights["config"]), {}
        for name, expected in weights["files"].items():
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != expected:
                raise ValueError(f"the checksum of {name} does not match")
            tensors |= load(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: no weights that can be put together ({error!r})") from error
    model = build(settings.pop("model", "case"), **settings)
    model.load_tensors({name: x.float() if x.dtype == torch.bfloat16 else x for name, x in tensors.items()})
    model.save_pretrained(out)


# ---- the command


def settings_of(given: argparse.Namespace) -> TrainConfig:
    """The preset, checkpoints rarely: reading back 320 MB takes its time. With --steps in a recipe all is made as small."""
    changes: dict[str, Any] = {"device": given.device, "checkpoint_every": given.checkpoint_every,
                               "matmul_precision": given.matmul_precision}
    if given.what == "recipe" and given.steps is not None:
        changes |= {"phase1_steps": given.steps, "max_steps": given.steps, "validate_every": max(1, given.steps // 2),
                    "valid_limit": 16}
    return preset(given.preset, given.model, **changes)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("steps", "recipe"):
        command = commands.add_parser(name)
        command.add_argument("--store", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--model", default="case")
        command.add_argument("--preset", default="", help="default: the model's first; demo is small")
        command.add_argument("--device", default="auto")
        command.add_argument("--matmul_precision", default="highest", help="as in the settings of training")
        command.add_argument("--steps", type=int, help="of each phase; default: 60, and for the recipe its own number")
        command.add_argument("--checkpoint_every", type=int, default=5_000)
    command.add_argument("--minutes", type=float, default=8.5, help="that a call may take")
    command.add_argument("--run", type=Path, help="default: a folder below build/ for the model and preset")
    command.add_argument("--limit", type=int, help="evaluate the first so many examples alone")
    command = commands.add_parser("join")
    command.add_argument("folder", type=Path)
    command.add_argument("out", type=Path)
    given = parser.parse_args(words)
    try:
        if given.what == "join":
            join(given.folder, given.out)
            return 0
        config, store = settings_of(given), opened(given.store)
        config = config.resolved(len(store.featurizer.vocabulary))
        if given.what == "steps":
            return 0 if steps(store, given.out, config, given.steps or 60) else 1
        run = given.run or BUILD / "recipe" / f"{given.model}-{given.preset or 'first'}"
        done = recipe(store, given.out, run, config, 60 * given.minutes, given.limit)
        print("done" if done else "not done yet: the same command goes on", flush=True)
        return 0
    except CaseFastError as error:
        print(f"benchmarks.gpu_training: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
