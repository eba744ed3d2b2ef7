"""The training programs of the GPU machine, on the CPU: what they measure and leave, and that a call goes on with the last."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import gpu_training
from case_fast.data.travel import pack_store
from case_fast.errors import CheckpointError
from case_fast.models import build, load
from case_fast.runs import Run, load_model
from case_fast.training import NotFinite, TrainConfig, preset
from case_fast.training.loop import Trainer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


@pytest.fixture(scope="module")
def config(sample_store) -> TrainConfig:
    small = preset("demo", model={"d_model": 16, "ffn": 16}, device="cpu", phase1_steps=STEPS, max_steps=STEPS, validate_every=2,
                   valid_limit=8, log_every=1, checkpoint_every=3)
    return small.resolved(len(sample_store.featurizer.vocabulary))


def read(folder: Path) -> dict:
    return json.loads((folder / "recipe.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("weights-*") for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- steps


def test_steps_of_each_phase_are_timed_and_their_losses_compared(sample_store, config, tmp_path):
    out = tmp_path / "steps.json"
    assert gpu_training.steps(sample_store, out, config, 3)
    found = json.loads(out.read_text())
    assert list(found["phases"]) == ["bow", "all"] and found["steps"] == 3
    for phase in found["phases"].values():
        assert 0 < phase["ms_least"] <= phase["ms"] <= phase["ms_most"] and phase["max_rss_mib"] > 0
        assert len(phase["losses"]) == len(phase["cpu_losses"]) == 3 and phase["losses"] == phase["cpu_losses"]
        assert phase["agree"] and phase["launches"] is None
    first, last = (phase["losses"][0] for phase in found["phases"].values())
    assert last > first, "the whole objective is a sum over more than L_BOW"


def test_what_a_phase_gave_is_written_before_the_next_begins(sample_store, config, tmp_path, monkeypatch):
    def timed(store, config, count):
        if config.phase1_steps == 0:
            raise RuntimeError("an illegal address")
        return {"ms": 1.0}

    monkeypatch.setattr(gpu_training, "_timed", timed)
    monkeypatch.setattr(gpu_training, "_losses", lambda store, config: [1.0, float("nan"), 1.0])
    out = tmp_path / "steps.json"
    with pytest.raises(RuntimeError, match="an illegal address"):
        gpu_training.steps(sample_store, out, config, 3)
    (phase,) = json.loads(out.read_text())["phases"].values()
    assert phase["ms"] == 1.0 and phase["losses"] == [1.0, "nan", 1.0] and not phase["agree"]


def test_losses_that_differ_by_more_than_the_tolerance_are_a_failure(sample_store, config, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_training, "_timed", lambda *_: {})
    for share, expected in ((0.5e-4, True), (2e-4, False)):
        device = iter([1.0, 1.0 + share] * 2)
        monkeypatch.setattr(gpu_training, "_losses", lambda store, config, device=device: [next(device)] * 3)
        assert gpu_training.steps(sample_store, tmp_path / "steps.json", config, 3) is expected


def test_kernels_copies_and_busy_time_are_told_apart(monkeypatch):
    def event(name, start, end, kind=torch.autograd.DeviceType.CUDA, note=False):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=kind, is_user_annotation=note, time_range=span)

    events = [event("sgemm", 0, 100), event("mul", 50, 150), event("Memcpy HtoD", 200, 250), event("add", 400, 500),
              event("Optimizer.step", 0, 10_000, note=True), event("aten::mul", 0, 9_000, torch.autograd.DeviceType.CPU)]

    class Profile(SimpleNamespace):
        def __init__(self, activities):
            super().__init__(events=lambda: events)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    steps = []
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    run = SimpleNamespace(train_step=lambda: steps.append(1), device=torch.device("cuda"))
    found = gpu_training._profiled(run, ms=0.1)
    assert len(steps) == gpu_training.PROFILED == 5
    assert found == pytest.approx({"launches": 3 / 5, "copies": 1 / 5, "busy_ms": 0.3 / 5, "busy": 0.6})
    assert gpu_training.covered([]) == 0 and gpu_training.covered([(3, 4), (0, 2), (1, 2), (0, 1)]) == 3


# ---- the recipe


@pytest.fixture(scope="module")
def whole(sample_store, config, tmp_path_factory) -> Path:
    """A folder of a call that went to the end: ``out``, and the run beside it."""
    folder = tmp_path_factory.mktemp("whole")
    assert gpu_training.recipe(sample_store, folder / "out", folder / "run", config, 600, limit=4)
    return folder


def test_a_recipe_leaves_a_few_small_files_and_weights_that_open(whole, tmp_path):
    out, found = whole / "out", read(whole / "out")
    assert found["state"] == "done" and found["step"] == 2 * STEPS and found["result"]["stopped"] == "max_steps"
    assert found["evaluation"]["examples"] == 4
    assert {metric["name"] for metric in found["evaluation"]["metrics"]} >= {"ppl", "acc_1", "dist_1"}
    names = ["log.jsonl", "predictions.jsonl", "recipe.json", "weights-1-of-1.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names
    gpu_training.join(out, tmp_path / "joined")
    joined, (trained, _) = load(tmp_path / "joined"), load_model(whole / "run", "cpu")
    assert joined.config == trained.config
    for (name, one), other in zip(joined.state_dict().items(), trained.state_dict().values(), strict=True):
        assert one.dtype == other.dtype
        expected = other.bfloat16().float() if other.dtype == torch.float32 else other
        assert torch.equal(one, expected), name


def test_a_call_whose_time_is_over_is_gone_on_with_to_the_same_end(sample_store, config, whole, tmp_path):
    out, run = tmp_path / "out", tmp_path / "run"
    calls, seconds = 0, gpu_training.RESERVE  # nothing is left for training: a step or two before it is noticed
    while not gpu_training.recipe(sample_store, out, run, config, seconds, limit=4):
        calls += 1
        found = read(out)
        assert found["state"] == "to be resumed" and "the end of its time" in found["said"]
        assert found["weights"]["of"] in ("best", f"step {found['step']}") and weights(out)
        seconds = gpu_training.RESERVE if calls == 1 else 600
    assert calls == 2 and read(out)["state"] == "done"
    assert same(weights(out), weights(whole / "out"))


def test_a_training_that_fails_leaves_its_log_and_weights(sample_store, config, tmp_path, monkeypatch):
    out, real = tmp_path / "out", Trainer.train_step

    def train_step(self):
        if self.step == STEPS + 3:
            raise NotFinite("step 7: loss nan")
        real(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(NotFinite):
        gpu_training.recipe(sample_store, out, tmp_path / "run", config, 600)
    found = read(out)
    assert (found["state"], found["said"], found["step"]) == ("failed", "NotFinite: step 7: loss nan", STEPS + 3)
    assert found["weights"]["of"] == "best" and weights(out) and (out / "log.jsonl").read_text()


def test_an_evaluation_whose_time_is_over_is_made_by_the_next_call(sample_store, config, whole, tmp_path, monkeypatch):
    out, run = tmp_path / "out", tmp_path / "run"
    shutil.copytree(whole / "run", run)
    for evaluated, done in ((True, True), (False, False)):
        if not evaluated:
            (Run(run).evaluation("test") / "metrics.json").unlink()
        with monkeypatch.context() as patch:  # the time is over once training has ended
            patch.setattr(gpu_training, "time", SimpleNamespace(monotonic=iter([0.0, 0.0, 1e6]).__next__))
            assert gpu_training.recipe(sample_store, out, run, config, 600, limit=4) is done
    assert "the time was over within the evaluation" in read(out)["said"] and weights(out)
    assert gpu_training.recipe(sample_store, out, run, config, 600, limit=4)
    assert read(out)["evaluation"]["examples"] == 4


@pytest.mark.slow
def test_a_killed_recipe_goes_on_from_its_checkpoint_to_the_same_end(sample_store, tmp_path, capsys):
    pack_store(sample_store, tmp_path / "sample.travel")

    def words(name: str) -> list[str]:
        return ["recipe", "--store", str(tmp_path / "sample.travel"), "--out", str(tmp_path / name), "--run",
                str(tmp_path / f"{name}.run"), "--preset", "demo", "--device", "cpu", "--steps", "8", "--checkpoint_every", "2",
                "--limit", "2"]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu_training", *words("killed")], cwd=ROOT, env=environment)
    until = time.monotonic() + 120
    while not Run(tmp_path / "killed.run").checkpoints.joinpath("00000006").is_dir():
        assert killed.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    assert read(tmp_path / "killed")["state"] == "training"
    for name in ("killed", "whole"):
        assert gpu_training.main(words(name)) == 0
        said = capsys.readouterr().out
        assert said.endswith("done\n") and ("resumed after step" in said) == (name == "killed")
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert read(tmp_path / "killed")["evaluation"]["metrics"] == read(tmp_path / "whole")["evaluation"]["metrics"]


# ---- weights in small files


def test_shards_stay_below_the_limit_and_hold_everything_in_order(tmp_path):
    tensors = {f"part.{i}": torch.randn(400 + 37 * i) for i in range(9)} | {"count": torch.arange(300)}
    (tmp_path / "weights-1-of-99.safetensors").touch()  # of an earlier call
    files = gpu_training.write_shards(tensors, tmp_path, limit=8192)
    assert len(files) > 1 and sorted(files) == sorted(path.name for path in tmp_path.iterdir())
    assert all((tmp_path / name).stat().st_size < 8192 for name in files)
    found = weights(tmp_path)
    assert found.keys() == tensors.keys() and torch.equal(found["count"], tensors["count"])
    assert all(torch.equal(found[name], tensors[name].bfloat16()) for name in tensors if name != "count")
    with pytest.raises(CheckpointError, match=r"count takes .* bytes, more than a file of 2048"):
        gpu_training.write_shards({"count": tensors["count"]}, tmp_path, limit=2048)
    with pytest.raises(CheckpointError, match="the weights make 9 files of 3000 bytes; with the 3 others that is more than 7"):
        gpu_training.write_shards({str(i): torch.randn(700) for i in range(9)}, tmp_path, limit=3000)


def test_the_weights_of_the_paper_s_model_fit():
    model = build("case", vocab_size=22_796)
    assert sum(parameter.numel() for parameter in model.parameters()) == 26_623_492
    planned = gpu_training.shards(model.state_dict())
    assert len(planned) == 4 and sorted(sum(planned, [])) == sorted(model.state_dict())


def test_damaged_or_missing_weights_are_not_put_together(whole, tmp_path, capsys):
    for name, content in (("recipe.json", b"{}"), ("weights-1-of-1.safetensors", b"x"), ("recipe.json", None)):
        folder = tmp_path / f"{name} {content}"
        folder.mkdir()
        for path in (whole / "out").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).write_bytes(content) if content else (folder / name).unlink()
        assert gpu_training.main(["join", str(folder), str(tmp_path / "joined")]) == 1
        assert "no weights that can be put together" in capsys.readouterr().err
    assert not (tmp_path / "joined").exists()


def test_the_settings_are_the_preset_s_with_few_checkpoints(capsys):
    given = SimpleNamespace(what="recipe", device="cpu", checkpoint_every=5_000, steps=None, preset="", model="case",
                            matmul_precision="medium")
    expected = replace(preset("paper"), device="cpu", checkpoint_every=5_000, matmul_precision="medium")
    assert gpu_training.settings_of(given) == expected
    assert gpu_training.main(["steps", "--store", "absent.store", "--out", "x"]) == 1
    assert "absent.store" in capsys.readouterr().err
