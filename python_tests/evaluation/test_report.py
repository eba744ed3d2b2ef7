"""The report of a run: a real tiny run, runs with parts missing, and hostile ones. It must load nothing and run nothing."""

from __future__ import annotations

import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from case_fast.errors import CheckpointError
from case_fast.evaluation import evaluate, write_report
from case_fast.evaluation.figures import Curve, curve_svg, running_mean
from case_fast.html import Html, page, tag
from case_fast.models import CASE
from case_fast.training import preset, train

HOSTILE = '"><script>alert(1)</script><img src=http://example.org/x onerror=alert(2)>\'&lt;'
VOID = {"img", "meta", "wbr", "path", "use", "rect"}


class Reader(HTMLParser):
    """The page as a browser takes it: texts, tags with attributes, and tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.tags.append((name, dict(attributes)))

    def handle_endtag(self, name):
        if name not in VOID and (not self.open or self.open.pop() != name):
            self.wrong.append(name)

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def read(path) -> Reader:
    """The page, after checking what holds for each: well formed, unique ids, nothing fetched, nothing run."""
    text = path.read_text(encoding="utf-8")
    found = Reader(text)
    assert not found.wrong and not found.open
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name, attributes in found.tags:
        assert name not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for key, value in attributes.items():
            assert not key.startswith("on"), (name, key)
            if key in {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}:
                assert value.startswith(("data:image/png;base64,", "#")), (name, key, value)
                assert not value.startswith("#") or value[1:] in ids
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert {m for m in re.findall(r"url\(#([^)]*)\)", text)} <= set(ids)
    return found


@pytest.fixture(scope="module")
def finished(sample_store, tmp_path_factory):
    """A run of 6 + 12 steps with one evaluation, and its report."""
    run = tmp_path_factory.mktemp("report") / "run"
    config = preset("demo", phase1_steps=6, max_steps=12, min_steps=1, validate_every=4, valid_limit=8, log_every=2,
                    checkpoint_every=50, model={"d_model": 16, "ffn": 16})
    train(sample_store, run, config, console=Console(file=io.StringIO()))
    model = CASE.from_pretrained(run / "best")
    evaluate(model, sample_store, "test", run / "evaluation" / "test",
             lambda indices: [sample_store.example("test", i).response[:6] for i in indices])
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy to damage."""
    return shutil.copytree(finished, tmp_path / "my run")


def test_the_report_of_a_whole_run_shows_all_of_it(finished, sample_store):
    path = write_report(finished)
    assert path == finished / "report.html"
    found = read(path)
    manifest = json.loads((finished / "manifest.json").read_text())
    metrics = json.loads((finished / "evaluation" / "test" / "metrics.json").read_text())["metrics"]
    for said in ("finished", "A toy run.", manifest["versions"]["torch"], manifest["store"]["fingerprint"][:16],
                 "train 431, valid 60, test 53", "Training loss, phase 1", "Training loss, phase 2", "Validation",
                 "reply of the model", "10 of 53"):
        assert said in found.text, said
    assert "What is missing" not in found.text and "35.37" not in found.text
    for metric in metrics:
        assert metric["signature"] in found.text
    charts = [attributes["aria-label"] for name, attributes in found.tags if name == "svg"]
    assert {"Perplexity", "Emotion accuracy", "Generation, L_gen", "Coarse alignment, L_coarse", "Learning rate"} <= set(charts)
    assert {"Common share of the inferences", "Prior's perplexity, concepts", "Top-1 over chance, fine"} <= set(charts)
    assert charts.count("Bag of words, L_BOW") == 2  # one a phase
    pictures = [attributes for name, attributes in found.tags if name == "img"]
    assert len(pictures) == 1 and len(pictures[0]["src"]) > 10_000
    first = sample_store.example("test", 0).source
    assert first["response"] in found.text and all(turn in found.text for turn in first["context"])
    policy = next(attributes["content"] for name, attributes in found.tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_the_report_is_written_where_it_is_asked_for(finished, tmp_path):
    path = write_report(finished, tmp_path / "new" / "page.html")
    assert path == tmp_path / "new" / "page.html" and "CASE run “run”" in read(path).text


def test_an_unfinished_run_is_reported_with_the_commands_that_go_on(run):
    shutil.rmtree(run / "evaluation")
    log = run / "log.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= 11))
    text = read(write_report(run)).text
    store = json.loads((run / "manifest.json").read_text())["store"]["path"]
    assert "not finished" in text and "the log stops in phase 2 at step 10" in text
    assert f"case-fast evaluate '{run}' --data {store} --split test" in text
    assert f"case-fast train --config '{run}/config.json' --data {store} --out '{run}' --resume" in text
    assert "So far there are validation figures only" in text and "Best perplexity, validation" in text


def test_a_log_alone_is_reported_with_what_is_missing(run):
    for name in ("evaluation", "best", "checkpoints"):
        shutil.rmtree(run / name)
    for name in ("manifest.json", "config.json"):
        (run / name).unlink()
    log = run / "log.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= 4))
    found = read(write_report(run))
    assert "phase 1 at step 4" in found.text and "There is no validation yet" in found.text
    assert "There is no manifest.json" in found.text and "nothing to measure yet" in found.text
    assert f"--data STORE --out '{run}' --resume" in found.text
    charts = [attributes["aria-label"] for name, attributes in found.tags if name == "svg"]
    assert "Bag of words, L_BOW" in charts and "Perplexity" not in charts


def test_a_run_that_diverged_says_so_and_at_which_step(run):
    with open(run / "log.jsonl", "a") as stream:
        stream.write('{"event": "step", "phase": 2, "step": 19, "loss": "nan", "losses": {"kl": "inf"}}\n')
        stream.write('{"event": "failure", "phase": 2, "step": 20, "loss": "nan"}\n')
    text = read(write_report(run)).text
    assert "not finished" in text and "stopped at step 20: a loss or gradient was not finite" in text


def test_a_manifest_alone_is_reported_with_the_command_that_trains(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    text = read(write_report(tmp_path)).text
    assert "no log" in text and "case-fast train --data STORE" in text


@pytest.mark.parametrize("make", [False, True])
def test_where_no_run_is_no_report_is_written(tmp_path, make):
    folder = tmp_path / "x"
    if make:
        folder.mkdir()
        (folder / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="case-fast train"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_damaged_files_are_said_and_passed_over(run):
    log = run / "log.jsonl"
    lines = log.read_bytes().splitlines(True)
    damage = [b"{\n", b"\xff\xfe\n", b"[1]\n", b"null\n", b"\0\n", b"[" * 100_000 + b"\n", b'{"event": "st']
    log.write_bytes(b"".join([*lines[:3], *damage[:-1], *lines[3:], damage[-1]]))
    (run / "config.json").write_text("[1, 2]")
    (run / "evaluation" / "test" / "metrics.json").write_text("{")
    (run / "evaluation" / "valid").mkdir()
    text = read(write_report(run)).text
    assert "log.jsonl: 7 damaged lines left out, the first is line 4" in text
    assert "config.json holds no JSON object" in text
    assert "test/metrics.json: not the metrics" in text and "valid/metrics.json: not found" in text
    assert "Training loss, phase 2" in text


def test_numbers_of_any_kind_in_the_log_are_drawn_or_left_out(tmp_path):
    odd = ["nan", None, True, [], {}, 1e308, -1e308, 10**400, "x", float("nan"), -5, 0]
    records = [{"event": "step", "phase": 2, "step": s, "loss": v, "losses": {"kl": v}, "lr": v} for s, v in enumerate(odd)]
    records += [{"event": "step", "phase": p, "step": s, "loss": 1} for p, s in ((None, 1), ([], 2), (2, "3"), (2, 1e308))]
    records += [{"event": "validation", "phase": 2, "step": s, "ppl": v, "accuracy": v} for s, v in enumerate(odd)]
    records += [{}, {"event": []}, {"step": 1}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert "Validation" in read(write_report(tmp_path)).text


def test_texts_never_become_markup(run):
    manifest = {"command": HOSTILE, "device": HOSTILE, "seed": HOSTILE, "started": HOSTILE, "finished": [HOSTILE],
                "store": {"path": HOSTILE, "fingerprint": HOSTILE}, "versions": {HOSTILE: HOSTILE}, "resumed": [HOSTILE],
                "result": {"stopped": HOSTILE}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.json").write_text(json.dumps({"ablation": HOSTILE, HOSTILE: HOSTILE}))
    folder = run / "evaluation" / "test"
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["split"] = HOSTILE
    for metric in metrics["metrics"][2:]:
        metric |= {"name": HOSTILE, "signature": HOSTILE, "reason": HOSTILE, "better": HOSTILE}
    metrics["store"]["vocabulary"] = HOSTILE
    (folder / "metrics.json").write_text(json.dumps(metrics))
    prediction = {"id": HOSTILE, "context": [HOSTILE, 3, None], "by_speaker": HOSTILE, "emotion": HOSTILE, "predicted": HOSTILE,
                  "probability": HOSTILE, "reference": HOSTILE, "reply": HOSTILE}
    (folder / "predictions.jsonl").write_text("\n".join([json.dumps(prediction), "{}", '{"context": {"a": 1}}', "5"]))
    hostile = run.rename(run.with_name("<b onclick=x>&run"))
    found = read(write_report(hostile))
    assert found.text.count(HOSTILE) > 15 and "<b onclick=x>&run" in found.text
    assert not any(name == "img" and attributes.get("alt") != f"Confusion matrix of the emotions, {HOSTILE}"
                   for name, attributes in found.tags)


@pytest.mark.parametrize("change", [{"examples": "5"}, {"bundled": 1}, {"split": None}])
def test_metrics_of_wrong_types_are_damaged(run, change):
    (run / "log.jsonl").unlink()  # no charts: faster
    path = run / "evaluation" / "test" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "not the metrics of an evaluation" in read(write_report(run)).text


@pytest.mark.parametrize("value", ["1", 5.0, -1, None])
def test_a_strange_accuracy_is_reported_without_a_crash(run, value):
    (run / "log.jsonl").unlink()
    path = run / "evaluation" / "test" / "metrics.json"
    found = json.loads(path.read_text())
    next(metric for metric in found["metrics"] if metric["name"] == "acc_1")["value"] = value
    path.write_text(json.dumps(found))
    read(write_report(run))


def test_html_escapes_all_but_html():
    assert tag("p", "a<b", Html("<i>c</i>"), None, ["d&", tag("b", "e")], title='"', class_="x", id=None) == (
        '<p title="&quot;" class="x">a&lt;b<i>c</i>d&amp;<b>e</b></p>'
    )
    assert "<title>&lt;t&gt;</title>" in page("<t>", "body")


def test_running_mean_leaves_out_what_is_no_number():
    assert running_mean(np.array([1.0, np.nan, 3.0])).tolist() == [1, 2, 3]
    assert np.isnan(running_mean(np.array([np.nan, np.nan]))).all()
    long = np.ones(1000)
    assert running_mean(long) == pytest.approx(long)


def test_a_long_curve_is_thinned():
    x = np.arange(100_000)
    svg = curve_svg(Curve("<Loss>", x, np.sin(x / 1e4), smooth=True), "a")
    assert len(svg) < 60_000 and 'aria-label="&lt;Loss&gt;"' in svg and "currentColor" in svg
    assert not re.search(r"#0[1-5]0[1-5]0[1-5]", svg)
