"""The loop: phases, determinism, interruption and resumption, failures, refusals, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import PRINTED, tiny_config
from rich.console import Console
from training_helpers import PHASE_1, PHASE_2, MemoryStore, at_step, interrupt_at, outcome, records, run, tiny_run

from case_fast import runs
from case_fast.data import Featurizer
from case_fast.diagnosis import figures, held_out, in_short
from case_fast.diagnosis import look as inside_of
from case_fast.errors import CheckpointError, ConfigError, DataError, Interrupted
from case_fast.models import CASE, CASEConfig
from case_fast.training import NotFinite, TrainConfig, loop, train
from case_fast.training.checkpoint import Checkpoints
from case_fast.training.process import matmul_precision, reproducible
from case_fast.training.schedule import cooling, noam

STEPS = PHASE_1 + PHASE_2


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> Path:
    """An uninterrupted run; read only."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(store, out)
    return out


# ---- what a run does and leaves behind


def test_a_run_leaves_settings_manifest_features_weights_and_checkpoints_behind(store, whole):
    names = {path.name for path in whole.iterdir()}
    assert names >= {"config.json", "manifest.json", "log.jsonl", "best", "features", "checkpoints"}
    assert TrainConfig.from_dict(json.loads((whole / "config.json").read_text())) == tiny_run().resolved(
        len(store.featurizer.vocabulary)
    )
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["store"] == {"path": str(store.path.resolve()), "fingerprint": store.fingerprint, "bundled": False}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["started"] <= manifest["finished"] and manifest["seed"] == 0 and manifest["device"].startswith("cpu")
    assert Featurizer.load(whole / "features").vocabulary.words == store.featurizer.vocabulary.words
    assert json.loads((whole / "features" / "knowledge.json").read_text()) == store.knowledge
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["00000012", "00000013", "latest"]
    assert not [name for name in names if name.startswith(".") and name != ".lock"]


def test_the_log_holds_every_step_phase_validation_and_the_end(whole):
    steps = records(whole, "step")
    assert [(record["step"], record["phase"]) for record in steps] == [(2, 1), (4, 1), (6, 2), (8, 2), (10, 2), (12, 2)]
    assert set(steps[0]["losses"]) == {"bow"} and steps[0]["losses"]["bow"] == steps[0]["loss"]
    assert set(steps[2]["losses"]) == {"bow", "kl", "coarse", "fine", "emotion", "generation", "diversity"}
    assert {"lr", "grad_norm", "examples_per_second", "words_per_second", "max_rss_mib"} <= set(steps[2])
    assert steps[2]["diagnostics"]["fine_saturated"] >= 0
    assert [(record["step"], record["phase"]) for record in records(whole, "phase")] == [(0, 1), (4, 2)]
    validations = records(whole, "validation")
    assert [record["step"] for record in validations] == [7, 10, 13]
    assert all(record["examples"] == 5 for record in validations)
    best = min(validations, key=lambda record: record["ppl"])
    (end,) = records(whole, "end")
    assert (end["best_step"], end["best"]["ppl"], end["stopped"]) == (best["step"], best["ppl"], "max_steps")


DIAGNOSED = {"cs_common_share", "ec_common_share", "er_common_share", "r_cog_common_share", "r_emo_common_share",
             "inferences_prior_ratio", "concepts_prior_ratio", "coarse_over_chance", "fine_over_chance"}


def test_each_validation_is_diagnosed_in_the_log(store, whole):
    validations = records(whole, "validation")
    assert all(set(record["diagnosis"]) == DIAGNOSED for record in validations)
    (end,) = records(whole, "end")
    (best,) = [record["diagnosis"] for record in validations if record["step"] == end["best_step"]]
    model = CASE.from_pretrained(str(whole / "best"))
    batches = [store.batch("valid", group) for group in held_out(store, "valid", loop.DIAGNOSED)]
    assert best == pytest.approx(in_short(figures(inside_of(model, batches))))
    assert 0 < best["cs_common_share"] <= 1 and 0 < best["inferences_prior_ratio"] <= 1


def test_the_diagnosis_changes_nothing_of_a_run(store, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Trainer, "_diagnosis", lambda self: {})
    run(store, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(whole)


def test_tensorboard_gets_the_same_numbers(whole):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(
        str(whole / "tensorboard")
    )
    events.Reload()
    (bow,) = [record["losses"]["bow"] for record in records(whole, "step") if record["step"] == 6]
    assert [event.value for event in events.Scalars("step/losses/bow") if event.step == 6] == [pytest.approx(bow)]
    assert [event.step for event in events.Scalars("validation/ppl")] == [7, 10, 13]


def test_without_tensorboard_one_line_says_so(store, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.INFO, "case_fast"):
        run(store, tmp_path / "run")
    assert caplog.text.count("tensorboard is not installed") == 1
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_best_weights_load_and_measure_what_the_log_says(store, whole):
    model = CASE.from_pretrained(str(whole / "best")).eval()
    with torch.no_grad():
        output = model(store.batch("valid", range(5)))
    (end,) = records(whole, "end")
    assert output.nll.double().mean().exp().item() == pytest.approx(end["best"]["ppl"], rel=1e-6)
    replies = output.nll.double().split(store.batch("valid", range(5)).cu_target.diff().tolist())
    geometric = torch.stack([nll.mean() for nll in replies]).mean().exp().item()
    assert geometric == pytest.approx(end["best"]["ppl_geometric"], rel=1e-6) and geometric != pytest.approx(end["best"]["ppl"])
    right = (output.emotion_logits.argmax(-1) == store.batch("valid", range(5)).emotion).float().mean()
    assert right.item() == pytest.approx(end["best"]["accuracy"])


def test_the_result_says_why_it_ended_and_what_was_best(store, tmp_path):
    result = run(store, tmp_path / "run", tiny_run(max_steps=None, patience=1, lr_scale=5.0))
    assert (result.stopped, result.phase_1_steps, result.run) == ("early stopping", PHASE_1, tmp_path / "run")
    assert result.best["ppl"] == min(record["ppl"] for record in records(tmp_path / "run", "validation"))
    assert records(tmp_path / "run", "validation")[-1]["failures"] == 1


def test_a_perplexity_beyond_float_is_no_failure(store, tmp_path):
    """Infinite in words and in the log, saved and brought back; the mean log-likelihood still says what is better."""
    config = tiny_run(max_steps=6, lr_scale=300.0)
    assert run(store, tmp_path / "run", config).best["ppl"] == float("inf")
    assert records(tmp_path / "run", "validation")[0]["ppl"] == "inf"
    assert run(store, tmp_path / "run", config, resume=True).best["ppl"] == float("inf")


def test_without_a_terminal_plain_lines_say_what_happens(store, tmp_path, monkeypatch):
    monkeypatch.setattr("case_fast.training.log.PLAIN_SECONDS", 0.0)
    text = io.StringIO()
    train(store, tmp_path / "run", tiny_run(), Console(file=text, width=50))
    lines = text.getvalue().splitlines()
    assert ("4 steps of phase 1, then 9 steps at least: 3 validations in a row without a better perplexity end training, "
            "one every 3 steps, counted from step 3 on; 9 steps at most") in lines
    assert "unknown words among the words of the replies: 12.50 % (train), 25.00 % (valid)" in lines
    assert [line for line in lines if line.startswith("phase 1 (bow): 3 of 4 steps; loss ") and "lr 3.3e-02" in line]
    assert [line for line in lines if line.startswith("phase 2 (all): 9 of 9 steps; loss ") and "words/s" in line]
    assert [
        line for line in lines if line.startswith("validation after step 7: perplexity ") and line.endswith("the best so far")
    ]
    assert "\x1b" not in text.getvalue()


def test_on_a_terminal_there_is_a_bar_a_phase(store, tmp_path):
    text = io.StringIO()
    train(store, tmp_path / "run", tiny_run(), Console(file=text, force_terminal=True, width=100))
    assert "phase 1 (bow)" in text.getvalue() and "9/9" in text.getvalue() and "validation after step 7" in text.getvalue()


# ---- phases


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return Checkpoints(out / "checkpoints").read(step).tensors["model"]


def test_phase_1_changes_only_what_its_loss_reaches(store, tmp_path):
    every = tiny_run(checkpoint_every=1, keep_checkpoints=99)
    run(store, tmp_path / "run", every)
    torch.manual_seed(every.seed)
    model = CASE(every.resolved(len(store.featurizer.vocabulary)).model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model.set_phase("bow")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {"w_coarse", "decoder.norm.weight", "output.weight"} <= frozen
    after, end = weights(tmp_path / "run", PHASE_1), weights(tmp_path / "run", STEPS)
    names = [name for name, _ in model.named_parameters()]
    assert {name for name in names if torch.equal(start[name], after[name])} == frozen
    assert not [name for name in names if torch.equal(after[name], end[name])]
    assert after["word_counts"].sum() == 0 < end["word_counts"].sum()
    state = Checkpoints(tmp_path / "run" / "checkpoints").read(STEPS).tensors["optimizer"]
    counts = {name: state[f"{name}/step"].item() for name in names}
    assert {counts[name] for name in frozen} == {PHASE_2} and {counts[name] for name in set(names) - frozen} == {STEPS}


@pytest.mark.parametrize("ablation", CASEConfig.ablations)
def test_every_ablation_trains_and_leaves_alone_what_it_switches_off(store, tmp_path, ablation):
    config = tiny_run(ablation=ablation, phase1_steps=1, max_steps=2)
    run(store, tmp_path / "run", config)
    torch.manual_seed(config.seed)
    model = CASE(config.resolved(len(store.featurizer.vocabulary)).model)
    off = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert off
    end = weights(tmp_path / "run", 3)
    assert {name for name, value in model.named_parameters() if torch.equal(value, end[name])} == off


def test_without_phase_1_every_step_is_one_of_phase_2(store, tmp_path):
    assert run(store, tmp_path / "run", tiny_run(phase1_steps=0, phase1_epochs=4)).steps == PHASE_2
    assert {record["phase"] for record in records(tmp_path / "run", "step")} == {2}


def test_pretrained_vectors_are_where_training_starts(tmp_path):
    vectors = torch.randn(6, 16)
    store = MemoryStore(vectors=vectors)
    interrupt_at(store, tmp_path / "run", 0)
    (step,) = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    assert step == 1  # the step goes on to its end
    table = weights(tmp_path / "run", 1)["embedding.weight"]
    assert (table[8:14] - vectors).abs().max() < 0.1 and not torch.equal(table[8:14], vectors)
    with pytest.raises(ConfigError, match="model.d_model is 16 and the store's word vectors have 12 numbers"):
        run(MemoryStore(vectors=torch.randn(6, 12)), tmp_path / "other")
    run(store, tmp_path / "other")  # nothing had begun there


def test_bf16_and_clipping_train_float32_weights_to_another_outcome(store, tmp_path):
    result = run(store, tmp_path / "run", tiny_run(precision="bf16", clip_norm=0.5))
    assert result.best["ppl"] < 200
    assert {value.dtype for value in weights(tmp_path / "run", STEPS).values()} == {torch.float32, torch.int64}
    run(store, tmp_path / "other", tiny_run(clip_norm=0.5))
    assert outcome(tmp_path / "run") != outcome(tmp_path / "other")


# ---- determinism, interruption, resumption


def test_a_cooldown_goes_on_from_a_run_without_one(store, tmp_path):
    whole = run(store, tmp_path / "whole", tiny_run(max_steps=PHASE_2 + 3, cooldown=3))
    rates = [record["lr"] for record in records(tmp_path / "whole", "step") if record["phase"] == 2]
    late = [noam(PHASE_1 + step, 16, 8) * cooling(step, PHASE_2 + 3, 3) for step in range(2, PHASE_2 + 4, 2)]
    assert rates == pytest.approx(late, rel=1e-6)
    run(store, tmp_path / "parts")
    with pytest.raises(ConfigError, match=r"cooldown are 9 and 0 in the run and 9 and 3 now, and after 9 steps"):
        run(store, tmp_path / "parts", tiny_run(cooldown=3), resume=True)
    run(store, tmp_path / "parts", tiny_run(max_steps=PHASE_2 + 3, cooldown=3), resume=True)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"12 and 3 in the run and 15 and 3 now"):
        run(store, tmp_path / "parts", tiny_run(max_steps=PHASE_2 + 6, cooldown=3), resume=True)
    assert whole.stopped == "max_steps"


def test_the_same_seed_gives_the_same_run_bit_for_bit(store, whole, tmp_path):
    torch.manual_seed(123)  # the caller's random state is nothing to it
    torch.rand(3)
    state = torch.get_rng_state()
    run(store, tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(whole)
    assert torch.equal(torch.get_rng_state(), state) and not torch.are_deterministic_algorithms_enabled()
    run(store, tmp_path / "other", tiny_run(seed=1))
    assert outcome(tmp_path / "other") != outcome(whole)


@pytest.mark.parametrize("filled", [True, False])
def test_new_memory_is_not_filled_in_a_run_and_the_caller_s_setting_comes_back(tmp_path, monkeypatch, filled):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", filled)
    made, seen = MemoryStore(), set()

    def look(split, indices, batch):
        seen.add((torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory))
        return batch

    made.on_batch = look
    run(made, tmp_path / "run")
    assert seen == {(True, False)} and torch.utils.deterministic.fill_uninitialized_memory is filled
    with pytest.raises(KeyError), reproducible(0, True, torch.device("cpu")):
        raise KeyError
    assert torch.utils.deterministic.fill_uninitialized_memory is filled
    with reproducible(0, False, torch.device("cpu")):
        assert torch.utils.deterministic.fill_uninitialized_memory is filled


def test_products_have_the_precision_of_the_settings_in_a_run_alone(store, whole, tmp_path):
    seen = []
    made = MemoryStore()
    made.on_batch = lambda split, indices, batch: seen.append(torch.get_float32_matmul_precision()) or batch
    config = tiny_run(matmul_precision="medium")
    run(made, tmp_path / "run", config)
    assert set(seen) == {"medium"} and torch.get_float32_matmul_precision() == "highest"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["matmul_precision"] == "medium"
    with pytest.raises(ConfigError, match="matmul_precision is 'medium' in the run and 'highest' now"):
        run(made, tmp_path / "run", resume=True)
    with pytest.raises(KeyError), matmul_precision("high"):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"
    interrupt_at(made, tmp_path / "other", 6, config)
    run(made, tmp_path / "other", config, resume=True)
    assert outcome(tmp_path / "other") == outcome(tmp_path / "run")


def test_a_run_with_products_of_bfloat16_has_the_loss_curve_of_one_without(tmp_path):
    """50 steps. A product is off by at most 2^-7 of its sum of sizes, either way, and a loss is a mean over many; so one step's
    loss may be off by twice that after what the steps before have added, the curve on average by half. Another seed moves it
    by 7 %, and training by a quarter. As printed: scores standardized over four dialogues divide by what features differ in
    there, and so magnify the rounding."""
    model = tiny_config(graph_dropout=0.2, encoder_dropout=0.1, decoder_dropout=0.1, num_negatives=2, **PRINTED)
    curves = []
    for precision in ("highest", "medium"):
        config = tiny_run(model=model, matmul_precision=precision, phase1_steps=15, max_steps=35, lr_scale=0.03, log_every=1,
                          valid_limit=1, validate_every=35, min_steps=50, checkpoint_every=1000)
        run(MemoryStore(), tmp_path / precision, config)
        curves.append(torch.tensor([record["loss"] for record in records(tmp_path / precision, "step")]))
    exact, rounded = curves
    assert len(exact) == 50 and exact[15] > 1.25 * exact[49]  # phase 2
    off = (rounded - exact).abs() / exact
    assert off.max() < 2**-6 and off.mean() < 2**-8


@pytest.mark.parametrize("step", [0, 1, PHASE_1 - 1, PHASE_1, 6, 7, 11, 12])
def test_resumed_after_an_interruption_it_ends_bit_for_bit_the_same(store, whole, tmp_path, step):
    """Steps at and around a checkpoint, the change of phase and a validation."""
    out = tmp_path / "run"
    said = interrupt_at(store, out, step)
    stopped = max(step, 1)
    assert f"after step {stopped}; the state is in {out / 'checkpoints' / f'{stopped:08d}'}" in said and "--resume" in said
    assert run(store, out, resume=True).steps == STEPS
    assert outcome(out) == outcome(whole)
    same = [[(r["step"], r["ppl"], r["best"]) for r in records(folder, "validation")] for folder in (out, whole)]
    assert same[0] == same[1]
    assert [record["step"] for record in records(out, "resume")] == [stopped]
    assert [record["diagnosis"] for record in records(out, "validation")] == [
        record["diagnosis"] for record in records(whole, "validation")
    ]
    assert len(json.loads((out / "manifest.json").read_text())["resumed"]) == 1


@pytest.mark.parametrize("batching", ["bucketed", "balanced"])
def test_a_run_of_batches_cut_by_cost_resumes_bit_for_bit(store, whole, tmp_path, batching):
    config = tiny_run(batching=batching)
    run(store, tmp_path / "one", config)
    interrupt_at(store, tmp_path / "two", 6, config)
    with pytest.raises(ConfigError, match=f"batching is '{batching}' in the run and 'shuffled' now"):
        run(store, tmp_path / "two", resume=True)
    run(store, tmp_path / "two", config, resume=True)
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two") != outcome(whole)


def test_a_run_does_not_depend_on_workers_and_goes_on_with_others(sample_store, tmp_path):
    model = tiny_config(graph_dropout=0.2, encoder_dropout=0.1, num_negatives=2)
    for name, workers in (("none", 0), ("two", 2)):
        run(sample_store, tmp_path / name, tiny_run(model=model, workers=workers, valid_limit=40, max_steps=4))
    interrupt_at(sample_store, tmp_path / "other", 6, tiny_run(model=model, workers=1, valid_limit=40, max_steps=4))
    run(sample_store, tmp_path / "other", tiny_run(model=model, workers=2, valid_limit=40, max_steps=4), resume=True)
    assert outcome(tmp_path / "none") == outcome(tmp_path / "two") == outcome(tmp_path / "other")


def test_interrupted_again_and_again_it_ends_bit_for_bit_the_same(store, whole, tmp_path):
    rng = random.Random(1)
    done = 0
    while done < STEPS - 1:
        step = rng.randint(done + 1, STEPS - 1)
        interrupt_at(store, tmp_path / "run", step, resume=done > 0)
        done = step
    run(store, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(whole)


def test_interrupted_in_a_validation_it_is_made_up_for(whole, tmp_path):
    store = MemoryStore()

    def stop(split, indices, batch):
        if split == "valid":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return batch

    store.on_batch = stop
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 7"):
        run(store, tmp_path / "run")
    assert not records(tmp_path / "run", "validation") and not (tmp_path / "run" / "best").exists()
    store.on_batch = lambda split, indices, batch: batch
    run(store, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(whole)
    assert [record["step"] for record in records(tmp_path / "run", "validation")] == [7, 10, 13]


def test_a_second_signal_aborts_at_once(store, whole, tmp_path):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, twice)
        with pytest.raises(KeyboardInterrupt):
            run(store, tmp_path / "run")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [3]
    run(store, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_finished_run_resumed_is_finished(store, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    result = run(store, tmp_path / "run", resume=True)
    assert (result.steps, result.stopped, result.best) == (STEPS, "max_steps", records(whole, "end")[0]["best"])
    assert outcome(tmp_path / "run") == outcome(whole)
    longer = run(store, tmp_path / "run", tiny_run(max_steps=PHASE_2 + 2, log_every=1), resume=True)
    assert longer.steps == STEPS + 2


def test_a_run_killed_before_its_first_checkpoint_begins_anew_when_resumed(store, whole, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, lambda: (_ for _ in ()).throw(ZeroDivisionError))
        with pytest.raises(ZeroDivisionError):
            run(store, tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()  # as if killed while it was set up
    shutil.rmtree(tmp_path / "run" / "features")
    (tmp_path / "run" / ".best.left").mkdir()
    run(store, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(whole)
    assert not (tmp_path / "run" / ".best.left").exists() and (tmp_path / "run" / "features").is_dir()


def test_a_damaged_newest_checkpoint_is_reported_and_the_older_one_used(store, whole, tmp_path, caplog):
    out = tmp_path / "run"
    interrupt_at(store, out, 8)
    assert Checkpoints(out / "checkpoints").steps() == [6, 8]
    path = out / "checkpoints" / "00000008" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    run(store, out, resume=True)
    assert "00000008/optimizer.safetensors: damaged" in caplog.text
    assert [record["step"] for record in records(out, "resume")] == [6]
    assert outcome(out) == outcome(whole)


# ---- refusals


def test_a_folder_that_holds_a_run_is_not_overwritten(store, whole):
    before = outcome(whole)
    with pytest.raises(
        CheckpointError, match=r"already holds a run \(config.json, .*\)\. Resume it \(--resume\), or choose another"
    ):
        run(store, whole)
    assert outcome(whole) == before


def test_resuming_where_no_run_is_makes_no_folder(store, tmp_path):
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        run(store, tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_resuming_with_something_else_names_what_differs(store, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    config = tiny_run(batch_size=5)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, d_model=32))
    said = "model.d_model is 16 in the run and 32 now; batch_size is 4 in the run and 5 now"
    with pytest.raises(ConfigError, match=said):
        run(store, tmp_path / "run", config, resume=True)
    with pytest.raises(ConfigError, match="the store is .*memory.store .* in the run and memory.store .* now"):
        run(MemoryStore(seed=1), tmp_path / "run", resume=True)
    # what the checkpoint says counts even where the files beside it are gone
    for name in ("config.json", "manifest.json"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(ConfigError, match="batch_size is 4 in the run and 5 now"):
        run(store, tmp_path / "run", tiny_run(batch_size=5), resume=True)
    run(store, tmp_path / "run", resume=True)  # the refusal has left nothing wrong behind
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: damaged .* Remove this file; resuming writes it anew"):
        run(store, tmp_path / "run", resume=True)


def test_one_process_at_a_time_trains_in_a_folder(store, tmp_path):
    def again() -> None:
        with pytest.raises(CheckpointError, match="another process is training in"):
            run(store, tmp_path / "run", resume=True)

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, again)
        run(store, tmp_path / "run")


def test_a_store_without_a_split_is_refused_before_a_folder_is_made(store, tmp_path):
    empty = MemoryStore(valid=0)
    with pytest.raises(DataError, match="the store has no valid examples"):
        run(empty, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- failures


@pytest.mark.parametrize("step", [2, PHASE_1 + 1, 11])
def test_nan_in_a_batch_is_noticed_in_that_step(tmp_path, step):
    store = MemoryStore()
    seen = []

    def poison(split, indices, batch):
        if split == "train":
            seen.append(indices)
            if len(seen) == step:
                batch.concept.intensity[0] = float("nan")
        return batch

    store.on_batch = poison
    with pytest.raises(NotFinite, match=rf"step {step}: loss nan; nothing was changed by this step. .*step-{step:08d}.json"):
        run(store, tmp_path / "run")
    dump = json.loads((tmp_path / "run" / "failure" / f"step-{step:08d}.json").read_text())
    assert dump["indices"] == seen[step - 1] and dump["losses"]["bow"] == "nan" and dump["step"] == step
    assert dump["phase"] == (1 if step <= PHASE_1 else 2)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps() == ([] if step < 3 else [3] if step < 6 else [6, 9])
    assert all(value.isfinite().all() for at in checkpoints.steps() for value in weights(tmp_path / "run", at).values())


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_bad_gradient_of_a_finite_loss_is_noticed(store, whole, tmp_path, value):
    def poison(self):
        if self.step == 8:
            self.model.fusion.weight.register_hook(lambda gradient: gradient * float(value))
        return real(self)

    real = loop.Trainer.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "train_step", poison)
        with pytest.raises(NotFinite, match=f"step 9: norm of the gradients (nan|{value})"):
            run(store, tmp_path / "run")
    dump = json.loads((tmp_path / "run" / "failure" / "step-00000009.json").read_text())
    assert dump["parameters_with_bad_gradients"] == ["fusion.weight"]
    run(store, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(whole)


def test_nan_in_a_validation_stops_the_run_with_a_dump(tmp_path):
    store = MemoryStore()

    def poison(split, indices, batch):
        if split == "valid":
            batch.concept.intensity[0] = float("nan")
        return batch

    store.on_batch = poison
    with pytest.raises(NotFinite, match="validation after step 7: mean negative log-likelihood nan"):
        run(store, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "failure" / "step-00000007.json").read_text())["metrics"]["ppl"] == "nan"


def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(store, whole, tmp_path):
    real, out = os.fsync, tmp_path / "run"

    def full(handle) -> None:
        if Checkpoints(out / "checkpoints").steps() == [3, 6]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device.* resume"):
            run(store, out)
    run(store, out, resume=True)
    assert outcome(out) == outcome(whole)


@pytest.mark.parametrize(("every", "part"), [(3, "the checkpoint of step 3"), (99, "the best weights")])
def test_a_file_that_cannot_grow_stops_the_run_with_the_reason(store, whole, tmp_path, every, part):
    """The system's limit on a file's size: a write that fails half way, inside torch's, safetensors' and our own code."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        with pytest.raises(CheckpointError, match=rf"{part} could not be written to .*File too large"):
            run(store, tmp_path / "run", tiny_run(checkpoint_every=every))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "run" / "best").exists()
    run(store, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize(("step", "number", "calls"), [
    (PHASE_1, errno.ENOSPC, ("open", "mkdir")), (8, errno.EDQUOT, ("fsync",)), (8, errno.EIO, ("fsync", "replace")),
    (8, errno.EROFS, ("open", "mkdir", "rename", "replace", "unlink")), (11, errno.EACCES, ("open", "mkdir")),
])
def test_where_nothing_can_be_written_any_more_the_last_checkpoint_stays(store, whole, tmp_path, step, number, calls):
    """Full, over a quota, broken, read-only or forbidden from a step on: the run ends with the reason; resumed, it is as ever."""
    out = tmp_path / "run"

    def failing(real):
        def call(path, *others, **named):
            creates = real.__name__ != "open" or (others and others[0] & os.O_CREAT)
            if creates and (isinstance(path, int) or str(path).startswith(str(out))):
                raise OSError(number, os.strerror(number), None if isinstance(path, int) else str(path))
            return real(path, *others, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda: [patch.setattr(os, name, failing(getattr(os, name))) for name in calls])
        before = time.monotonic()
        with pytest.raises(CheckpointError, match=rf"could not be written to .*{os.strerror(number)}.* then resume"):
            run(store, out)
        assert time.monotonic() - before < 10
    checkpoints = Checkpoints(out / "checkpoints")
    last = 3 * (step // 3)
    assert checkpoints.steps()[-1] >= last
    checkpoints.check(last)
    run(store, out, resume=True)
    assert outcome(out) == outcome(whole)


@pytest.mark.parametrize("part", ["write_json", "save_file"])
def test_a_full_disk_does_not_hide_what_was_not_finite(tmp_path, monkeypatch, part):
    store = MemoryStore()

    def poison(split, indices, batch):
        batch.concept.intensity[0] = float("nan")
        return batch

    def full(*arguments):
        if any("failure" in str(argument) for argument in arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    real = getattr(runs, part)
    monkeypatch.setattr(runs, part, full)
    store.on_batch = poison
    kept = r"could not be kept \(the dump .*No space left" if part == "write_json" else "Batch and losses are in"
    with pytest.raises(NotFinite, match=rf"step 1: loss nan; .*{kept}"):
        run(store, tmp_path / "run")
    if part == "save_file":
        (dump,) = (tmp_path / "run" / "failure").iterdir()
        assert json.loads(dump.read_text())["weights"] is None


@pytest.mark.parametrize("gone", ["run", "run/checkpoints"])
def test_a_run_folder_that_vanishes_stops_the_run_and_vanished_checkpoints_do_not(store, tmp_path, gone):
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, lambda: (tmp_path / gone).rename(tmp_path / "moved"))
        if gone == "run":
            with pytest.raises(CheckpointError, match="the log could not be written .*No such file or directory"):
                run(store, tmp_path / "run")
            assert Checkpoints(tmp_path / "moved" / "checkpoints").newest().step == 3
        else:
            run(store, tmp_path / "run")
            assert Checkpoints(tmp_path / "moved").newest().step == 3
    assert (tmp_path / "run").exists() == (gone != "run")


def test_a_folder_that_cannot_be_made_is_named(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="the run could not be written to .*file/run"):
        run(store, tmp_path / "file" / "run")


def test_an_error_of_the_store_is_raised_as_it_is(tmp_path):
    store = MemoryStore()

    def broken(split, indices, batch):
        raise DataError("memory.store", "damaged")

    store.on_batch = broken
    with pytest.raises(DataError, match="memory.store: damaged"):
        run(store, tmp_path / "run")


def test_batches_are_made_ahead_in_order_and_never_two_at_once(tmp_path):
    store = MemoryStore()
    active, made = [], []

    def watch(split, indices, batch):
        assert not active
        active.append(split)
        time.sleep(0.002)
        active.clear()
        made.append((split, indices))
        return batch

    store.on_batch = watch
    run(store, tmp_path / "run")
    sampler = loop.Sampler(22, 4, 0)
    trained = [indices for split, indices in made if split == "train"]
    assert trained == [sampler.indices(step) for step in range(STEPS + 1)]  # one ahead
    held, whole = held_out(store, "valid", loop.DIAGNOSED), list(range(5))
    assert [indices for split, indices in made if split == "valid"] == [whole, *held, whole, whole]  # held out once for all
