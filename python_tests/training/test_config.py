"""Settings of training: what is refused, what presets and ablations change, how they read from a command line and YAML."""

from __future__ import annotations

import math
from dataclasses import fields

import jsonargparse
import pytest
from helpers import tiny_config

from case_fast.errors import ConfigError
from case_fast.models import CASE, CASEConfig
from case_fast.models.base import Length
from case_fast.training import TrainConfig, config_class, preset
from case_fast.training.config import ADJUSTABLE, differences


def test_defaults_are_the_recipe_of_the_paper():
    config = preset("paper")
    assert config == TrainConfig()
    assert (config.batch_size, config.warmup, config.betas, config.eps) == (16, 12_000, (0.9, 0.98), 1e-9)
    assert (config.validate_every, config.min_steps, config.patience, config.clip_norm) == (2_000, 13_000, 3, None)
    assert config.lengths(40_278) == [Length(4 * 2_518), Length(None, 2_000, 13_000)]
    assert TrainConfig(phase1_steps=7, max_steps=9).lengths(40_278) == [Length(7), Length(9, 2_000, 13_000)]
    assert config.fewest_steps(40_278) == 28_072 and TrainConfig(phase1_steps=7, max_steps=9).fewest_steps(40_278) == 16


def test_a_models_own_lengths_of_phases_come_before_the_recipe():
    config = preset("released", "empdg-d", max_steps=50, phase1_steps=3, model={"rounds": 10, "validate_rounds": 2})
    assert config.open_phase == "generator"
    assert config.lengths(100) == [Length(50, 2_000, 13_000), Length(1_000), Length(60, 12)]
    assert config.fewest_steps(100) == 50 + 1_000 + 48  # the first validation of the last phase is its best so far
    assert preset("", "cem", phase1_steps=3).lengths(9) == [Length(None, 2_000, 13_000)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0), ("batch_size", 1.5), ("batch_size", True), ("batch_size", "16"), ("warmup", 0), ("patience", 0),
        ("validate_every", 0), ("log_every", 0), ("checkpoint_every", 0), ("keep_checkpoints", 0), ("phase1_epochs", -1),
        ("phase1_steps", -1), ("max_steps", 0), ("valid_limit", 0), ("min_steps", -1), ("seed", -1), ("seed", 1 << 63),
        ("betas", (0.9,)), ("betas", (0.9, 1.0)), ("betas", (0.9, math.nan)), ("betas", 0.9), ("eps", 0.0), ("lr_scale", 0),
        ("lr_scale", math.inf), ("clip_norm", 0.0), ("clip_norm", "1"), ("ablation", "w/o Everything"), ("precision", "fp16"),
        ("matmul_precision", "tf32"), ("batching", "sorted"), ("workers", -1), ("deterministic", 1), ("model", {"d_model": 16}),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} "):
        TrainConfig(**{name: value})


def test_presets():
    assert preset("demo").model.d_model == CASE.presets["demo"]["model"]["d_model"]
    changed = preset("demo", model={"heads": 4}, seed=3)
    assert (changed.model.heads, changed.model.d_model, changed.seed) == (4, CASE.presets["demo"]["model"]["d_model"], 3)
    with pytest.raises(ConfigError, match="case has no preset 'dmeo'; it has paper, printed, demo"):
        preset("dmeo")
    with pytest.raises(ConfigError, match="unknown setting batchsize; there are model, ablation"):
        preset("demo", batchsize=4)
    with pytest.raises(ConfigError, match="unknown setting dmodel of case"):
        preset("demo", model={"dmodel": 4})


def test_plain_values_and_back():
    config = preset("demo", ablation="w/o Align", clip_norm=1.0).resolved(77)
    assert TrainConfig.from_dict(config.as_dict()) == config
    with pytest.raises(ConfigError, match="model must be a mapping"):
        TrainConfig.from_dict({"model": 3})


def test_a_cooldown_is_a_part_of_max_steps():
    assert TrainConfig(max_steps=9, cooldown=9).lengths(1)[-1].cooldown == 9
    for steps in (None, 8):
        with pytest.raises(ConfigError, match=f"cooldown is the last part of max_steps, which is {steps}; 9 is more"):
            TrainConfig(max_steps=steps, cooldown=9)


@pytest.mark.parametrize("name", CASEConfig.ablations)
def test_resolved_carries_out_the_ablation_and_takes_the_vocabulary(name):
    config = TrainConfig(model=tiny_config(), ablation=name).resolved(99)
    assert config.model == CASEConfig(**{**vars(tiny_config()), "vocab_size": 99, **CASEConfig.ablations[name]})
    assert config.resolved(99) == config


def test_differences_name_settings_and_leave_out_the_adjustable_ones():
    one, other = TrainConfig(), preset("paper", seed=1, model={"d_model": 100}, log_every=3, device="cpu", max_steps=9)
    assert differences(one.as_dict(), other.as_dict()) == [
        "model.d_model is 300 in the run and 100 now", "seed is 0 in the run and 1 now",
    ]
    earlier = {name: value for name, value in one.as_dict().items() if name != "batching"}  # of a version that had it not
    assert differences(earlier, one.as_dict()) == []
    assert differences(earlier, preset("paper", batching="bucketed").as_dict()) == [
        "batching is 'shuffled' in the run and 'bucketed' now",
    ]
    before = CASEConfig.came_later
    lacking = one.as_dict() | {"model": {name: x for name, x in one.as_dict()["model"].items() if name not in before}}
    assert differences(lacking, TrainConfig(model=CASEConfig(**before)).as_dict()) == []
    now = TrainConfig(model=CASEConfig(**before | {"kl_reduction": "mean"}))
    assert differences(lacking, now.as_dict()) == ["model.kl_reduction is 'sum' in the run and 'mean' now"]
    assert ADJUSTABLE <= {item.name for item in fields(TrainConfig)}


def test_command_line_and_yaml(tmp_path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config_class("case"), as_group=False)
    file = tmp_path / "settings.yaml"
    file.write_text(
        "batch_size: 8\neps: 1e-8\nmodel:\n  d_model: 64\n  intensity: off\nablation: w/o Graph\n".replace("off", "'off'")
    )
    found = parser.parse_args(["--config", str(file), "--model.heads", "4", "--betas", "[0.8, 0.9]", "--max_steps", "5",
                               "--model.mim_score", "dot", "--model.num_negatives", "64"])
    found.pop("config")
    config = TrainConfig(**vars(parser.instantiate(found)))
    assert (config.batch_size, config.eps, config.betas, config.max_steps) == (8, 1e-8, (0.8, 0.9), 5)
    assert (config.model.d_model, config.model.heads, config.model.intensity) == (64, 4, "off")
    assert (config.model.mim_score, config.model.num_negatives) == ("dot", 64)
    assert config.ablation == "w/o Graph"
    with pytest.raises(jsonargparse.ArgumentError, match="batch_size"):
        parser.parse_args(["--batch_size", "many"])
