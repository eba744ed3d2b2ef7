"""Evaluating a tiny model on a store of the bundled sample: values against an oracle without torch, and the files."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from case_fast.data import EMOTIONS
from case_fast.errors import CheckpointError, ConfigError
from case_fast.evaluation import Evaluation, compare, evaluate
from case_fast.evaluation.evaluate import markdown
from case_fast.evaluation.measures import of_replies, predicted
from case_fast.evaluation.replies import read_replies
from case_fast.models import CASE, CASEConfig

SETTINGS = {"strategy": "greedy", "beams": 4, "max_words": 30}


@pytest.fixture(scope="module")
def store(sample_store):
    return sample_store


def tiny(store, **settings):
    torch.manual_seed(0)
    return CASE(CASEConfig(vocab_size=len(store.featurizer.vocabulary), d_model=16, ffn=16, **settings))


def first_words(store, n=5):
    return lambda indices: (store.example("test", index).response.tolist()[:n] for index in indices)


@pytest.fixture(scope="module")
def found(store, tmp_path_factory):
    model = tiny(store, graph_dropout=0.5).train()
    model.set_phase("bow")
    out = tmp_path_factory.mktemp("out") / "evaluation" / "test"
    evaluation = evaluate(model, store, "test", out, first_words(store), batch_size=16, settings=SETTINGS)
    return SimpleNamespace(model=model, evaluation=evaluation, out=out)


def test_values_are_those_of_an_oracle_in_numpy(store, found):
    model = found.model.eval()
    model.set_phase("all")
    nll, right, replies = [], [], []
    for index in range(store.size("test")):
        batch = store.batch("test", [index])
        with torch.no_grad():
            output = model(batch)
            scores = model.output(output.hidden)
        logits, target = scores.double().numpy(), batch.target.numpy()
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        nll.append([-log_p[place, word] for place, word in enumerate(target)])
        right.append(output.emotion_logits.numpy()[0].argmax() == batch.emotion.item())
        replies.append(store.example("test", index).response.tolist()[:5])
    tokens = sum(map(len, nll))
    e = found.evaluation
    assert e["ppl"].value == pytest.approx(math.exp(sum(map(sum, nll)) / tokens), rel=1e-5)
    assert e["ppl_geometric"].value == pytest.approx(math.exp(np.mean([np.mean(row) for row in nll])), rel=1e-5)
    assert e["ppl_response"].value == pytest.approx(np.mean([math.exp(np.mean(row)) for row in nll]), rel=1e-5)
    assert e["acc_1"].value == pytest.approx(np.mean(right))
    pairs = [pair for reply in replies for pair in zip(reply, reply[1:], strict=False)]
    assert e["dist_2"].value == pytest.approx(100 * len(set(pairs)) / len(pairs))
    assert e["ppl"].count == tokens == sum(len(store.example("test", i).response) + 1 for i in range(len(nll)))


def test_the_model_is_given_back_as_it_was(store, tmp_path):
    model = tiny(store).train()
    model.set_phase("bow")
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, store, "test", tmp_path, first_words(store), limit=3)
    assert model.training and model.phase == "bow"
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_values_do_not_depend_on_the_batch_size(store, found, tmp_path):
    model = tiny(store, graph_dropout=0.5)
    other = evaluate(model, store, "test", tmp_path, first_words(store), batch_size=64, settings=SETTINGS)
    for ours, theirs in zip(found.evaluation.metrics, other.metrics, strict=True):
        assert ours.value == pytest.approx(theirs.value, rel=1e-5) and ours.signature == theirs.signature


def test_the_files_hold_the_metrics_and_a_line_an_example(store, found):
    assert sorted(path.name for path in found.out.iterdir()) == [
        "confusion.png", "metrics.json", "metrics.md", "predictions.jsonl",
    ]
    written = json.loads((found.out / "metrics.json").read_text())
    assert written["store"]["fingerprint"] == store.fingerprint
    assert written["settings"]["strategy"] == "greedy" and written["settings"]["batch_size"] == 16
    assert written["counts"]["target_tokens"] == found.evaluation["ppl"].count
    names = {"ppl", "ppl_geometric", "ppl_response", "dist_1", "dist_2", "acc_1", "acc_5"}
    assert {metric["name"] for metric in written["metrics"]} >= names
    assert "decoding=greedy,max_words:30|" in found.evaluation["dist_1"].signature  # greedy uses no beams
    table = (found.out / "metrics.md").read_text()
    for metric in found.evaluation.metrics:
        assert metric.title in table and metric.text in table and metric.signature.replace("|", "\\|") in table
    picture = imread(found.out / "confusion.png")
    assert min(picture.shape[:2]) > 1000 and picture.std() > 0.01

    lines = [json.loads(line) for line in (found.out / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == store.size("test")
    for index, line in enumerate(lines):
        source = store.example("test", index).source
        assert (line["id"], line["context"], line["reference"]) == (source["id"], source["context"], source["response"])
        assert line["emotion"] in EMOTIONS and line["top"][0] == [line["predicted"], line["probability"]]
        assert len(line["top"]) == 5 and line["tokens"] == len(store.example("test", index).response) + 1
        assert 0 < line["probability"] <= 1 and line["nll"] > 0
    assert lines[0]["reply"].lower().startswith(store.featurizer.vocabulary.decode(store.example("test", 0).response[:1])[0])
    assert sum(line["nll"] for line in lines) / found.evaluation["ppl"].count == pytest.approx(
        math.log(found.evaluation["ppl"].value), rel=1e-6
    )


def test_load_gives_back_what_was_written(found):
    loaded = Evaluation.load(found.out)
    assert loaded.metrics == found.evaluation.metrics and loaded.bundled
    assert (loaded.split, loaded.examples, loaded.size) == ("test", found.evaluation.size, found.evaluation.size)
    assert loaded.about["store"] == found.evaluation.about["store"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"metrics": [{"name": "ppl"}], "split": "test"}'])
def test_load_names_a_damaged_file(tmp_path, text):
    with pytest.raises(CheckpointError, match="case-fast evaluate"):
        Evaluation.load(tmp_path)
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(CheckpointError, match="metrics.json: not the metrics"):
        Evaluation.load(tmp_path)


def test_a_failed_evaluation_leaves_no_metrics(store, tmp_path):
    model = tiny(store)
    evaluate(model, store, "test", tmp_path, first_words(store), limit=2)
    with pytest.raises(ValueError, match="1 replies for 2 examples"):
        evaluate(model, store, "test", tmp_path, lambda indices: [[8]], limit=2)
    assert not (tmp_path / "metrics.json").exists()


def test_replies_may_be_objects_tensors_or_empty(store, tmp_path):
    replies = [SimpleNamespace(words=[8, 9]), torch.tensor([8, 9]), []]
    evaluation = evaluate(tiny(store), store, "test", tmp_path, lambda indices: replies, limit=3)
    assert evaluation["distinct_replies"].value == 2
    assert evaluation["dist_1"].value == pytest.approx(50) and evaluation.about["counts"]["empty_replies"] == 1
    evaluation = evaluate(tiny(store), store, "test", tmp_path, lambda indices: [[] for _ in indices], limit=3)
    assert evaluation["dist_2"].value is None and "n/a" in (tmp_path / "metrics.md").read_text()


def test_a_model_with_nan_weights_gives_reasons_not_a_crash(store, tmp_path):
    model = tiny(store)
    with torch.no_grad():
        model.output.bias.fill_(math.nan)
        model.w_emo.fill_(math.nan)
    evaluation = evaluate(model, store, "test", tmp_path, first_words(store), limit=3)
    assert evaluation["ppl"].value is None and "not finite" in evaluation["ppl"].reason
    assert evaluation["acc_1"].value is None
    line = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert line["nll"] is None and line["probability"] is None
    assert "NaN" not in (tmp_path / "metrics.json").read_text()


@pytest.mark.parametrize(
    "split, limit, message", [("dev", None, "it has train, valid, test"), ("test", 0, "limit must be at least 1")]
)
def test_arguments_that_cannot_work_are_refused_before_a_folder_is_made(store, tmp_path, split, limit, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(tiny(store), store, split, tmp_path / "out", first_words(store), limit=limit)
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_store_is_refused(store, tmp_path):
    model = CASE(CASEConfig(vocab_size=20, d_model=16, ffn=16))
    with pytest.raises(ConfigError, match="the model knows 20 words"):
        evaluate(model, store, "test", tmp_path, first_words(store))


def test_progress_is_told_and_the_table_shown(store, tmp_path):
    seen, stream = [], io.StringIO()
    evaluate(tiny(store), store, "test", tmp_path, first_words(store), limit=4, batch_size=3,
             console=Console(file=stream, width=160), progress=lambda *done: seen.append(done))
    assert seen == [(3, 8), (4, 8), (8, 8)]
    said = stream.getvalue()
    assert "Perplexity ↓" in said and "unk=counted" in said and "4 of" in said and "35.37" not in said


def test_the_papers_values_stand_only_beside_a_whole_real_test_split(found):
    real = replace(found.evaluation, bundled=False)
    assert real.paper == {"ppl_geometric": 35.37, "dist_1": 0.74, "dist_2": 4.01, "acc_1": 0.402}
    assert "Zhou et al. (ACL 2023), Table 1" in real.paper_note
    assert "35.37" in markdown(real) and real.paper_note in markdown(real)
    for other in (found.evaluation, replace(real, split="valid"), replace(real, examples=3)):
        assert other.paper == {} and "35.37" not in markdown(other)


def test_compare_marks_what_does_not_compare(found):
    ours = found.evaluation
    metrics = [replace(metric, signature="other", value=1.5) if metric.name == "ppl" else metric for metric in ours.metrics]
    stream = io.StringIO()
    Console(file=stream, width=160).print(compare({"a": ours, "[b]": replace(ours, metrics=metrics)}))
    line = next(line for line in stream.getvalue().splitlines() if "Perplexity ↓" in line)
    assert "1.50*" in line and f"{ours['ppl'].text}*" not in line and "[b]" in stream.getvalue()


def test_scores_of_its_predictions_are_the_figures_that_it_reports(found):
    replies = read_replies(found.out).replies
    scores = {measure.metric.name: measure.metric for measure in [*predicted(replies, 10), *of_replies(replies)]}
    for name in ("ppl_geometric", "dist_1", "dist_2", "distinct_replies", "reply_words", "acc_1"):
        metric = found.evaluation[name]
        assert scores[name].value == pytest.approx(metric.value, rel=1e-5) and scores[name].count == metric.count, name
