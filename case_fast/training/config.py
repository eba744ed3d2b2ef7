"""Settings of a training run, and named sets of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from case_fast.arguments import settle
from case_fast.data import Store
from case_fast.errors import ConfigError
from case_fast.models import CASEConfig, ModelConfig, model_class
from case_fast.models.base import Length
from case_fast.training.sampler import BATCHINGS
from case_fast.training.schedule import EarlyStopping

PRECISIONS = ("float32", "bf16")
MATMUL_PRECISIONS = ("highest", "high", "medium")
STEPS = ("auto", "eager", "captured", "padded")

# What may differ between a run and its resumption: none of these changes what is computed up to the step resumed from (of
# max_steps and cooldown together `refuse_changes` sees to that).
ADJUSTABLE = frozenset({"max_steps", "cooldown", "device", "step", "workers", "log_every", "checkpoint_every",
                        "keep_checkpoints"})

@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run, but for its data; the defaults are the paper's recipe for CASE.

    Attributes:
        model: the model's settings, whose class says which model it is; vocab_size is always taken from the store.
        ablation: a row of the model's ablations (for CASE Table 2: "w/o Graph", ...) to switch off.
        seed: seed of the weights, of dropout and of the order of examples.
        phase1_epochs: epochs of phase 1, for a model with a phase before the one that early stopping ends (CASE: on L_BOW alone).
        phase1_steps: steps of it, in place of epochs.
        batch_size: dialogues a step.
        batching: shuffled: the order of an epoch as it comes (the paper's recipe). bucketed: within each 64 batches of it,
            dialogues of about one cost together. balanced: within these, each batch costs about as much as the next.
        warmup: Noam warm-up in steps, counted across all phases.
        lr_scale: factor on Noam's learning rate.
        betas: of Adam.
        eps: of Adam.
        clip_norm: largest norm of all gradients together; None: no clipping.
        validate_every: steps between validations of the last phase (of the last one that the model gives no length of its own, as
            of EmpDG with discriminators the first of three; so what follows).
        min_steps: steps of the last phase before early stopping counts.
        patience: validations in a row without a better perplexity that end training: the last phase takes
            (ceil(min_steps / validate_every) + patience - 1) x validate_every steps at least.
        max_steps: most steps of the last phase; None: until early stopping.
        cooldown: of these the last ones, in which the learning rate falls linearly to 0; it needs max_steps.
        valid_limit: validate on the first so many examples of the split; None: on all.
        device: auto, cpu, cuda or cuda:N.
        step: eager, each op launched by itself; captured, the whole step in CUDA graphs; auto, captured on CUDA and eager
            elsewhere; padded, what is captured, launched op by op, to compare with.
        precision: float32, or bf16 (autocast; weights and losses stay float32).
        matmul_precision: what products of float32 are rounded to inside, as `torch.set_float32_matmul_precision` names it; sums,
            weights and all else stay float32. highest: nothing is. high: TF32 on a GPU, nothing on CPU. medium: bf16 on a CPU
            that multiplies it (AVX512_BF16), TF32 on a GPU.
        deterministic: the same weights bit for bit each time on one device.
        workers: processes that make batches; 0: a thread of this one makes them. The batches are the same.
        gather_negatives: where several processes train together, the negatives of a pair come from the whole batch, as with one
            process; off: from the dialogues of the process that holds it.
        log_every: steps between two records of the log.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: how many of them are kept.
    """

    model: ModelConfig = field(default_factory=CASEConfig)
    ablation: str | None = None
    seed: int = 0
    phase1_epochs: int = 4
    phase1_steps: int | None = None
    batch_size: int = 16
    batching: Literal["shuffled", "bucketed", "balanced"] = "shuffled"
    warmup: int = 12_000
    lr_scale: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-9
    clip_norm: float | None = None
    validate_every: int = 2_000
    min_steps: int = 13_000
    patience: int = 3
    max_steps: int | None = None
    cooldown: int = 0
    valid_limit: int | None = None
    device: str = "auto"
    step: Literal["auto", "eager", "captured", "padded"] = "auto"
    precision: Literal["float32", "bf16"] = "float32"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    deterministic: bool = True
    workers: int = 0
    gather_negatives: bool = True
    log_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        settle(self)
        for name in ("seed", "phase1_epochs", "min_steps", "cooldown", "workers"):
            self._whole(name, 0)
        for name in ("batch_size", "warmup", "validate_every", "patience", "log_every", "checkpoint_every", "keep_checkpoints"):
            self._whole(name, 1)
        for name, least in (("phase1_steps", 0), ("max_steps", 1), ("valid_limit", 1)):
            if getattr(self, name) is not None:
                self._whole(name, least)
        if self.cooldown > (self.max_steps or 0):
            raise ConfigError(f"cooldown is the last part of max_steps, which is {self.max_steps}; {self.cooldown} is more")
        if self.seed >= 1 << 63:
            raise ConfigError(f"seed must be below 2^63, not {self.seed}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"betas must be two numbers in [0, 1), not {self.betas!r}")
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        for name in ("lr_scale", "eps", *(["clip_norm"] if self.clip_norm is not None else [])):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a number above 0, not {value!r}")
        if self.ablation is not None and self.ablation not in self.model.ablations:
            known = ", ".join(self.model.ablations) or f"none, {self.model.kind} has no ablations"
            raise ConfigError(f"ablation must be one of {known}, not {self.ablation!r}")
        choices = {"precision": PRECISIONS, "matmul_precision": MATMUL_PRECISIONS, "batching": BATCHINGS, "step": STEPS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")

    def resolved(self, vocab_size: int) -> Self:
        """These settings for a vocabulary of this size, with the ablation carried out."""
        model = replace(self.model, vocab_size=vocab_size)
        return replace(self, model=model.ablated(self.ablation) if self.ablation is not None else model)

    @property
    def open_phase(self) -> str:
        """The phase whose length these settings decide by early stopping, the last one that the model gives none."""
        return [phase for phase in model_class(self.model.kind).phases if self.model.length(phase) is None][-1]

    def lengths(self, examples: int) -> list[Length]:
        """How long each phase is, with so many training examples."""
        first = self.phase1_steps
        first = self.phase1_epochs * math.ceil(examples / self.batch_size) if first is None else first
        last = Length(self.max_steps, self.validate_every, self.min_steps, self.cooldown)
        return [self.model.length(phase) or (last if phase == self.open_phase else Length(first))
                for phase in model_class(self.model.kind).phases]

    def fewest(self, length: Length) -> int:
        """The fewest steps that a phase of this length can have."""
        if length.validate_every is None:
            return length.steps or 0
        earliest = EarlyStopping(self.patience, length.min_steps).earliest_stop(0, length.validate_every)
        return min(earliest, length.steps or earliest)

    def fewest_steps(self, examples: int) -> int:
        """The fewest steps of all phases together."""
        return sum(map(self.fewest, self.lengths(examples)))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them."""
        return {"kind": self.model.kind} | asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], saved: bool = False) -> Self:
        """Settings from plain values: "kind" the model's name (absent: case), "model" a mapping of its settings; what is left out
        keeps its default. ``saved``: the model's are those of a run, see `ModelConfig.from_dict`.

        Raises:
            ConfigError: an unknown name, or a value that cannot work.
        """
        values = dict(values)
        model, named = values.get("model", {}), values.pop("kind", None)
        kind = named or getattr(model, "kind", "case")
        if isinstance(model, ModelConfig) and model.kind != kind:
            raise ConfigError(f"kind is {kind}, and model are the settings of {model.kind}")
        if not isinstance(model, ModelConfig):
            if not isinstance(model, Mapping):
                raise ConfigError(f"model must be a mapping of names to values, not {model!r}")
            values["model"] = model_class(kind).Config.from_dict(model, saved)
        names = [item.name for item in fields(cls)]
        if unknown := [name for name in values if name not in names]:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; there are {', '.join(names)}")
        return cls(**values)


def preset(name: str = "", kind: str = "case", **changes: Any) -> TrainConfig:
    """The settings of a model's preset ("": its first) with ``changes`` on top; ``model`` may be a mapping of some of its fields.

    Raises:
        ConfigError: no such model or preset, an unknown setting, or a value that cannot work.
    """
    values = preset_values(name, kind)
    if isinstance(changes.get("model"), Mapping):
        changes["model"] = values.get("model", {}) | changes["model"]
    return TrainConfig.from_dict(values | changes)


def preset_values(name: str = "", kind: str = "case") -> dict[str, Any]:
    """The plain values of a preset, "model" among them."""
    presets = model_class(kind).presets
    name = name or next(iter(presets))
    if name not in presets:
        raise ConfigError(f"{kind} has no preset {name!r}; it has {', '.join(presets)}")
    return {"kind": kind, **presets[name]}


def config_class(kind: str) -> type[TrainConfig]:
    """`TrainConfig` with the type of one model's settings in it, as the command line reads types."""
    settings = model_class(kind).Config
    model = ("model", settings, field(default_factory=settings))
    made = make_dataclass("TrainConfig", [model], bases=(TrainConfig,), frozen=True)
    made.__doc__ = TrainConfig.__doc__
    return made


def differences(run: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two `TrainConfig.as_dict` differ in, in words, without the `ADJUSTABLE` settings.

    ``run`` may be of an earlier version: what it lacks is what that version did, what is retired is left out.
    """
    run, now = _flat(TrainConfig.from_dict(run, saved=True).as_dict()), _flat(now)
    if run["kind"] != now["kind"]:  # then hardly anything else is comparable
        return [f"the model is {run['kind']} in the run and {now['kind']} now"]
    names = [name for name in {**run, **now} if name not in ADJUSTABLE]
    return [
        f"{name} is {run.get(name)!r} in the run and {now.get(name)!r} now" for name in names if run.get(name) != now.get(name)
    ]


def refuse_changes(run: Path, ran: Mapping[str, Any], ran_on: Mapping[str, Any], config: TrainConfig, store: Store,
                   done: int = 0) -> None:
    """`ConfigError` naming what differs between what ``run`` was started with, as far as it is known, and what it resumes with.

    Args:
        ran: its `TrainConfig.as_dict`. ran_on: "path" and "fingerprint" of its store. done: its steps of the last phase.
    """
    found = differences(ran, config.as_dict()) if ran else []
    before, now = ((each.get("max_steps"), each.get("cooldown", 0)) for each in (ran or {}, config.as_dict()))
    if ran and before != now and any(cooldown and done > steps - cooldown for steps, cooldown in (before, now)):
        found.append(f"max_steps and cooldown are {before[0]} and {before[1]} in the run and {now[0]} and {now[1]} now, and "
                     f"after {done} steps the learning rate would have begun to fall")
    if ran_on.get("fingerprint", store.fingerprint) != store.fingerprint:
        of_run = f"{ran_on.get('path')} ({str(ran_on['fingerprint'])[:12]})"
        found.append(f"the store is {of_run} in the run and {store.path} ({store.fingerprint[:12]}) now")
    if found:
        raise ConfigError(f"{run} cannot be resumed so: {'; '.join(found)}. Use what it ran with, or start another run")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**{f"model.{name}": value for name, value in values["model"].items()},
            **{name: value for name, value in values.items() if name != "model"}}
