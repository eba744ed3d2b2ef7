"""The command line as its user meets it: every command on a small run, and what is said when something is wrong."""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
import sys

import pytest

from case_fast import __version__, cli
from case_fast.data import open_store
from case_fast.errors import Interrupted
from case_fast.models import CASE, MODELS, model_class, title_of

SMALL = ["--model.d_model", "16", "--model.ffn", "16", "--phase1-steps", "2", "--max-steps", "4", "--validate-every", "2",
         "--valid-limit", "8", "--min-steps", "0", "--log-every", "1"]


@pytest.fixture(scope="module")
def run(sample_store, tmp_path_factory):
    """A run of four steps, made through the command line."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", "--data", str(sample_store.path), "--out", str(out), *SMALL]) == 0
    return out


def said(capsys) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_without_a_command_the_overview_is_shown(capsys):
    assert cli.main([]) == 2
    shown = said(capsys)
    assert all(name in shown for name in cli._COMMANDS) and __version__ in shown
    assert cli.main(["--version"]) == 0 and said(capsys) == __version__


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    assert cli.main(["evalute"]) == 2
    assert "no command evalute. Did you mean evaluate?" in said(capsys)


@pytest.mark.parametrize("name", list(cli._COMMANDS))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"case-fast {name}" in said(capsys)


def test_train_says_how_long_it_takes_at_least(capsys):
    for words, fewest in ((), "18,000"), (("--preset", "demo"), "300"):
        with pytest.raises(SystemExit):
            cli.main(["train", *words, "--help"])
        assert f"the last phase takes {fewest} steps at least" in said(capsys)


def test_prepare_takes_dashes_and_reports_the_store(tmp_path, capsys):
    out = tmp_path / "store"
    words = ["prepare", "--dialogues", "bundled", "--knowledge", "bundled", "--conceptnet", "bundled", "--lexicon", "bundled",
             "--limit", "8", "--min-count", "2", f"--features.max-context={12}", "--out", str(out)]
    assert cli.main(words) == 0
    store = open_store(out)
    assert store.manifest["settings"]["min_count"] == 2 and store.manifest["settings"]["limit"] == 8
    assert store.featurizer.settings.max_context == 12
    shown = said(capsys)
    assert "contexts cut to their latest 12 words" in shown and f"{store.size('train')} examples" not in shown
    assert f"train {store.size('train')}" in shown


def test_missing_arguments_are_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["prepare", "--dialogues", "x"])
    assert stopped.value.code == 2 and "knowledge, conceptnet, lexicon, out" in said(capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["inspect", "nowhere"], "nowhere: store not found"),
        (["train", "--data", "nowhere", "--out", "x"], "nowhere: store not found"),
        (["evaluate", "nowhere", "--data", "nowhere"], "nowhere"),
        (["chat", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["merge-cache", "new.sqlite", "nowhere.sqlite"], "nowhere.sqlite: cache of inferences not found"),
        (["train", "--preset", "papr", "--data", "x", "--out", "y"], "case has no preset 'papr'; it has paper, printed, demo"),
        (["prepare", "--dialogues", "nowhere", "--knowledge", "bundled", "--conceptnet", "bundled", "--lexicon", "bundled",
          "--out", "s"], "nowhere"),
        (["prepare", "--dialogues", "bundled", "--knowledge", "commet:x", "--conceptnet", "bundled", "--lexicon", "bundled",
          "--out", "s"], "commet:x"),
    ],
)
def test_what_is_missing_is_named_in_one_line(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 1
    shown = said(capsys)
    assert "error:" in shown and expected in shown and "Traceback" not in shown


def test_inspect_shows_an_example_and_gives_json(sample_store, capsys):
    assert cli.main(["inspect", str(sample_store.path), "--split", "test", "--index", "3"]) == 0
    assert "G_CS" in said(capsys)
    assert cli.main(["inspect", str(sample_store.path), "--split", "test", "--index", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["context"] == sample_store.example("test", 3).source["context"]
    assert cli.main(["inspect", str(sample_store.path), "--index", "-1"]) == 1
    assert "--index -1 is outside" in said(capsys)
    assert cli.main(["inspect", str(sample_store.path), "--split", "dev"]) == 1
    assert "--split 'dev'" in said(capsys)


def test_key_value_overrides_config_overrides_preset(sample_store, tmp_path, monkeypatch):
    monkeypatch.setitem(CASE.presets, "demo", {"patience": 7, "batch_size": 5, "seed": 3})
    settings = tmp_path / "mine.yaml"
    settings.write_text("batch_size: 6\nseed: 4\nmodel:\n  d_model: 16\n")
    out = tmp_path / "run"
    words = ["train", "--data", str(sample_store.path), "--out", str(out), "--preset", "demo", "--config", str(settings),
             "--seed", "9", "--model.ffn", "8", "--phase1_steps", "1", "--max_steps", "1", "--validate_every", "1",
             "--valid_limit", "2", "--min_steps", "0"]
    assert cli.main(words) == 0
    chosen = json.loads((out / "config.json").read_text())
    assert (chosen["patience"], chosen["batch_size"], chosen["seed"]) == (7, 6, 9)
    assert (chosen["model"]["d_model"], chosen["model"]["ffn"]) == (16, 8)


def test_an_ablation_is_a_setting_and_an_unknown_one_is_named(sample_store, tmp_path, capsys):
    words = ["train", "--data", str(sample_store.path), "--out", str(tmp_path / "run"), *SMALL, "--ablation", "w/o CSGraph"]
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["cognition_graph"] is False
    assert cli.main([*words[:4], str(tmp_path / "other"), "--ablation", "w/o Nothing"]) != 0
    assert "w/o Nothing" in said(capsys)


def test_a_run_is_not_trained_over_but_resumed(run, sample_store, capsys):
    words = ["train", "--data", str(sample_store.path), "--out", str(run), *SMALL]
    assert cli.main(words) == 1
    assert "--resume" in said(capsys)
    assert cli.main([*words, "--resume"]) == 0


def test_a_run_is_evaluated_reported_and_talked_to(run, sample_store, capsys, monkeypatch):
    for strategy, limit, name in ("greedy", 4, "test"), ("beam", 6, "test-beam"):  # neither takes the other's place
        words = ["evaluate", str(run), "--data", str(sample_store.path), "--limit", str(limit), "--strategy", strategy]
        assert cli.main(words) == 0 and "Perplexity" in said(capsys)
        metrics = (run / "evaluation" / name / "metrics.json").read_text()
        assert f"decoding={strategy}" in metrics
        assert sum(1 for _ in open(run / "evaluation" / name / "predictions.jsonl")) == limit
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.startswith("<!") and page.index("decoding=greedy") < page.index("decoding=beam")
    monkeypatch.setattr(sys, "stdin", io.StringIO("I failed my exam.\n"))
    assert cli.main(["chat", str(run), "--max_words", "5"]) == 0
    assert "emotion" in said(capsys)


@pytest.mark.parametrize("name", [name for name in MODELS if len(model_class(name).phases) == 1])
def test_a_baseline_goes_the_same_way_by_the_same_commands(name, sample_store, tmp_path, capsys, monkeypatch):
    run, store = tmp_path / "run", str(sample_store.path)
    words = ["train", "--model", name, "--data", store, "--out", str(run), "--preset", "frame", *SMALL]
    assert cli.main(words) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["kind"] == name and (config["model"]["layers"], config["model"]["d_model"]) == (1, 16)
    again = ["train", "--config", str(run / "config.json"), "--data", store, "--out", str(run), "--resume", "--max-steps", "6"]
    assert cli.main(again) == 0 and "after 6 steps" in said(capsys)
    assert cli.main(["evaluate", str(run), "--data", store, "--limit", "6"]) == 0
    written = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    metrics = {metric["name"]: metric for metric in written["metrics"]}
    predicts = model_class(name).published[""].get("acc_1") is not None
    assert (metrics["acc_1"]["value"] is not None) == predicts and metrics["ppl"]["value"] > 1
    shown = said(capsys)
    assert predicts or "n/a: the model predicts no emotion" in shown
    assert cli.main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert f"{title_of(name)} run" in text and "Training loss" in text and "phase 1" not in text
    assert ("Emotion accuracy" in text) and ("no value: the model predicts no emotion" in text) != predicts
    monkeypatch.setattr(sys, "stdin", io.StringIO("I failed my exam.\n/why\n"))
    assert cli.main(["chat", str(run), "--max_words", "5"]) == 0
    shown = said(capsys)
    reads = "relations" in model_class(name).needs
    assert ("No commonsense inferences." in shown) != reads and ("No predicted emotion." in shown) != predicts


def test_a_run_is_explained_as_text_json_html_and_table(run, sample_store, tmp_path, capsys):
    page, values, store = tmp_path / "why.html", tmp_path / "why.json", ["--data", str(sample_store.path)]
    edits = ["--edit", '{"op": "remove", "what": "source", "source": "reactions"}',
             "--edit", '[{"op": "set", "what": "gate", "value": 0.5}]']
    words = ["explain", str(run), "My dog died.", "Oh no.", "I failed my exam.", "--max_words", "5", "--min_words", "1"]
    assert cli.main([*words, *edits, "--attention", "--html", str(page), "--json", str(values)]) == 0
    shown = said(capsys)
    assert "Commonsense inferences" in shown and "without the edits" in shown and "Attention to context" in shown
    found = json.loads(values.read_text())
    assert found["format"] == "case_fast explanation 1" and found["gate"] == 0.5 and len(found["edits"]) == 2
    assert page.read_text().count("<svg") == 2 and "<script" not in page.read_text()
    assert cli.main(["explain", str(run), *store, "--index", "1,2", "--max_words", "5", "--reference", "--json", str(values),
                     "--effects", "concepts"]) == 0
    one, other = json.loads(values.read_text())
    assert one["given"] and one["text"] == sample_store.example("test", 1).source["response"]
    assert other["context"][1]["effect"] is None
    table = ["explain", str(run), *store, "--index", "0,5", "--table", str(tmp_path / "six"), "--runs", str(run)]
    assert cli.main([*table, "--max_words", "5"]) == 0
    markdown, latex = ((tmp_path / "six" / f"table6.{kind}").read_text() for kind in ("md", "tex"))
    for text in (markdown, latex):
        assert text.count("Emotion") == text.count("Ground-Truth") == 2 and text.count("Cognition") == text.count("Concept") == 4
    assert f"CASE ({run.name})" in markdown and r"\toprule" in latex and "nats" in latex
    capsys.readouterr()
    for wrong, told in (
        ([], "give either the texts of a dialogue or --data STORE"), (["a", *store], "give either the texts"),
        (store, "--data and --index belong together"), ([*store, "--index", "x"], "index must be whole numbers"),
        ([*store, "--index", "0", "--reference", "--reply", "b"], "--reference explains the replies"),
        (["a", "--table", str(tmp_path)], "--table is of what runs"), (["a", "--runs", str(run)], "--runs are the other"),
        (["a", "--edit", "{"], "is no JSON"), (["a", "--edit", "{}"], "edit 1 (None None): there is no such edit"),
        (["a", "--html", str(tmp_path)], "folder"),
    ):
        assert cli.main(["explain", str(run), *wrong]) == 1 and told in said(capsys)


def test_a_model_of_three_phases_goes_the_same_way_by_the_same_commands(sample_store, tmp_path, capsys, monkeypatch):
    run, store = tmp_path / "run", str(sample_store.path)
    lengths = ["--model.discriminator_steps", "3", "--model.rounds", "2", "--model.validate_rounds", "1",
               "--model.generator_steps", "2"]
    words = ["train", "--model", "empdg-d", "--data", store, "--out", str(run), "--preset", "frame", *SMALL, *lengths]
    assert cli.main(words) == 0
    shown = said(capsys)
    assert "phase 1 (generator) is over (max_steps); what follows begins with its best weights" in shown
    assert "4 steps at least" in shown and "then 3 steps of phase 2, then 6 steps at least" in shown
    assert "done after 13 steps (max_steps); best after step 1" in shown
    assert cli.main([*words, "--resume"]) == 0 and "resumed after step 13" in said(capsys)
    assert cli.main(["evaluate", str(run), "--data", store, "--limit", "6"]) == 0
    assert cli.main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "EmpDG + discriminators run" in text and "phase 3: both in turns" in text and "Judgement, of L_G" in text
    monkeypatch.setattr(sys, "stdin", io.StringIO("I failed my exam.\n/why\n"))
    assert cli.main(["chat", str(run), "--max_words", "5"]) == 0 and "emotion" in said(capsys)
    with pytest.raises(SystemExit):
        cli.main(["train", "--model", "empdg-d", "--help"])
    assert "the phase generator takes 18,000 steps at least" in said(capsys)


def test_the_settings_of_a_run_of_an_earlier_version_are_taken(run, sample_store, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    del config["kind"]
    config["model"]["seed"] = 0  # of drawn negatives, before seeds came with the batch
    (copy / "config.json").write_text(json.dumps(config))
    words = ["train", "--config", str(copy / "config.json"), "--data", str(sample_store.path), "--out", str(copy), "--resume"]
    assert cli.main([*words, "--max-steps", "6"]) == 0 and "done after 8 steps" in said(capsys)


def test_a_file_of_settings_may_name_model_and_preset(sample_store, tmp_path, capsys):
    settings, out = tmp_path / "mine.yaml", tmp_path / "run"
    settings.write_text("model: multi-trs\npreset: frame\nmax_steps: 2\n")
    words = ["train", "--data", str(sample_store.path), "--config", str(settings), *SMALL[:4], "--validate-every", "1"]
    assert cli.main([*words, "--out", str(out), "--valid-limit", "4", "--min-steps", "0"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["kind"], config["model"]["layers"], config["model"]["label_smoothing"]) == ("multi-trs", 1, 0.0)
    settings.write_text("kind: [1]\n")
    assert cli.main([*words, "--out", str(tmp_path / "other")]) == 1 and "there is no model [1]; one of case" in said(capsys)
    settings.write_text("colour: 1\n")
    with pytest.raises(SystemExit):
        cli.main([*words, "--out", str(tmp_path / "other")])
    assert "colour" in said(capsys)


def test_an_unknown_model_is_named_with_those_that_there_are(capsys):
    for words in (["--model", "gpt"], ["--model=gpt"], ["--kind", "gpt"]):
        assert cli.main(["train", *words, "--data", "x", "--out", "y"]) == 1
        assert "there is no model 'gpt'; one of case, transformer, multi-trs" in said(capsys)


def test_merge_cache_adds_what_is_new(sample_store, tmp_path, capsys):
    into = tmp_path / "all.sqlite"
    assert cli.main(["merge-cache", str(into), sample_store.knowledge["cache"]]) == 0
    held = sqlite3.connect(into).execute("select count(*) from readable").fetchone()[0]
    assert f"{held:,} new inferences" in said(capsys)
    assert cli.main(["merge-cache", str(into), sample_store.knowledge["cache"]]) == 0
    assert "0 new inferences" in said(capsys)


def test_an_interruption_is_no_error(monkeypatch, capsys):
    def stop(args, console):
        raise Interrupted("stopped; the same command goes on")

    monkeypatch.setitem(cli._COMMANDS, "report", cli._COMMANDS["report"]._replace(run=stop))
    assert cli.main(["report", "x"]) == 130
    assert "interrupted: stopped; the same command goes on" in said(capsys)


def test_demo_goes_the_whole_way(tmp_path, capsys, monkeypatch):
    tiny = {"model": {"d_model": 16, "ffn": 16}, "phase1_steps": 1, "max_steps": 2, "validate_every": 1, "min_steps": 0,
            "valid_limit": 4}
    monkeypatch.setitem(CASE.presets, "demo", tiny)
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 0
    shown = said(capsys)
    assert shown.count("speaker ") == 5 and "case-fast prepare --dialogues" in shown
    report = (tmp_path / "demo" / "run" / "report.html").read_text()
    assert "<svg" in report
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert "is there already" in said(capsys)
