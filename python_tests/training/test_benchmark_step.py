"""`case-fast bench step`: its dialogues, its check of the forms, what it tells, and that it goes on where it stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.step import parts, report, run, worker
from benchmarks.step.batches import Choice, examples_of, indices_of
from case_fast import cli
from case_fast.data.vocabulary import UNK
from case_fast.errors import CaseFastError, ConfigError

TINY = {"step": [run.Point("step", "phase 2", run.USUAL, "all", (run.OURS, run.PLAIN, run.COMPILED))],
        "parts": [run.Point("parts", "phase 1", run.USUAL, "bow", (run.OURS,))], "batch": [run.Point("batch", "16", run.USUAL)]}


def test_dialogues_are_as_the_case_asks(sample_store):
    usual = indices_of(sample_store, Choice(4, 3, 100))
    assert np.array(usual).shape == (3, 4) and usual == indices_of(sample_store, Choice(4, 3, 100))
    many = indices_of(sample_store, Choice(256, 6, 100))
    assert np.array(many).shape == (6, 256) and set(np.ravel(many)) == set(range(sample_store.size("train")))

    made, texts = examples_of(sample_store, Choice(4, 3, 100, inferences=1))
    for e, index in zip([e for batch in made for e in batch], np.ravel(usual), strict=True):
        whole = sample_store.example("train", int(index))
        assert np.array_equal(e.context, np.where(whole.context < 100, whole.context, UNK))
        pairs = list(zip(e.knowledge_sub.tolist(), e.knowledge_relation.tolist(), strict=True))
        assert len(pairs) == len(set(pairs)) == len({*zip(whole.knowledge_sub, whole.knowledge_relation, strict=True)})
        assert len(e.cognition_graph.indptr) == 1 + len(e.sub_utterance) + len(e.knowledge)
        for mine, its in zip(e.sub_utterance, whole.sub_utterance, strict=True):
            words = sample_store.texts.tokens(int(its))
            assert np.array_equal(texts.tokens(int(mine)), np.where(words < 100, words, UNK))

    length = {name: np.mean([len(e.context) for batch in examples_of(sample_store, Choice(4, 3, 100, context=name))[0]
                             for e in batch]) for name in ("short", "middle", "long", "longest")}
    assert length["short"] < length["middle"] < length["long"] <= length["longest"]


def test_forms_agree_and_a_wrong_one_is_found(sample_store):
    choice = Choice(3, 1, 200)
    found = []
    for form in (worker.OURS, worker.PLAIN):
        module, losses_of = worker.form_of(form, worker.model_of(choice, "all", dropout=False))
        found.append(worker.fingerprint(module, losses_of, worker.batches_of(form, sample_store, choice)[0]))
    ours, plain = found
    run._check(worker.PLAIN, plain, ours)
    wrong = json.loads(json.dumps(plain))
    wrong["losses"]["kl"] *= 1.01
    with pytest.raises(CaseFastError, match="the loss 'kl' of 'plain, eager'"):
        run._check(worker.PLAIN, wrong, ours)
    for place in (0, 1):
        wrong = json.loads(json.dumps(plain))
        wrong["gradients"]["decoder.norm.weight"][place] += 0.1 * plain["gradients"]["decoder.norm.weight"][0]
        with pytest.raises(CaseFastError, match="gradient of decoder.norm.weight"):
            run._check(worker.PLAIN, wrong, ours)


def test_every_part_of_the_model_has_time_forward_and_backward(sample_store):
    choice = Choice(3, 1, 200)
    model = worker.model_of(choice, "all", dropout=True)
    module, losses_of = worker.form_of(worker.OURS, model)
    steps = worker.Steps(module, losses_of, worker.batches_of(worker.OURS, sample_store, choice))
    found = parts.measure(model, steps, 0.01)
    assert set(found["parts"]) == set(parts.PARTS) and found["adam_ms"] > 0
    for part, ms in found["parts"].items():
        assert ms["forward_ms"] > 0 and ms["backward_ms"] > 0, part
    whole = found["adam_ms"] + sum(sum(ms.values()) for ms in found["parts"].values())
    assert 0.7 * found["recorded_ms"] < whole < 1.05 * found["recorded_ms"]
    assert not model._forward_hooks and "_fine" not in vars(model)


def test_bench_step_measures_tells_and_goes_on(sample_store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "points", lambda: TINY)
    asked = []
    ask = run._ask
    monkeypatch.setattr(run, "_ask", lambda form, request: asked.append((form, request["phase"])) or ask(form, request))
    monkeypatch.setattr(run.families_report, "_commit", lambda: "0123456789ab")
    words = ["bench", "step", "--store", str(sample_store.path), "--quick", "--out", str(tmp_path)]
    assert cli.main([*words, "--sizes", "step"]) == 0
    assert asked == [(run.OURS, "all"), (run.PLAIN, "all")]
    assert cli.main(words) == 0
    assert asked[2:] == [(run.OURS, "bow")]  # the parts alone: the usual batch is measured
    told = capsys.readouterr().out
    assert "x faster than plain, eager" in told and str(tmp_path / "step.json") in told.replace("\n", "")

    results = json.loads((tmp_path / "step.json").read_text())
    assert [f"{case['part']} {case['value']}" for case in results["cases"]] == [
        "step phase 2", "parts phase 1", "batch 16"]
    text = report.markdown(results)
    for row in results["cases"][0]["rows"]:
        assert f"| {row['form']} |" in text and row.get("left_out", "") in text
    assert "the released code (cited, not measured here)" in text and "| cognition encoder |" in text
    assert report.overview(results).count("\n| ") == 1 + len(results["summary"]) == 3
    assert (tmp_path / "step.png").stat().st_size > 10_000
    assert (tmp_path / "step.md").read_text() == text


def test_bench_step_refuses_what_it_cannot_do(tmp_path):
    for arguments, said in (((None, []), "--store"), ((str(tmp_path), ["steps"]), "no part steps"),
                            ((str(tmp_path), [], 0.0), "budget"), ((str(tmp_path), [], 1.0, "cuda"), "on the CPU")):
        store, sizes, *rest = arguments
        with pytest.raises(ConfigError, match=said):
            run.bench(store, sizes, True, tmp_path, print, *(rest or [1.0]))


def test_a_sequence_of_samples_ends_by_time():
    steps = iter(range(1000))
    assert len(worker.timed(lambda: [0.0, float(next(steps) < 0)], 0.0)) == worker.LEAST
    assert len(worker.timed(lambda: [2.0], 0.0)) == 2
    assert torch.get_num_threads() >= 1
