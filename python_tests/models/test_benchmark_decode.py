"""`case-fast bench decode`: the decoder as it is usually written says what ours says, and what does not is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers import random_examples, tiny_config, tiny_model

from benchmarks import command
from benchmarks.decode import plain, run
from benchmarks.decode import report as tables
from benchmarks.measure import OURS, WrongResult
from case_fast import cli
from case_fast.data.pack import make_batch
from case_fast.data.vocabulary import EOS
from case_fast.generation import GenerationConfig, generate
from case_fast.models import CASE
from case_fast.models.base import evaluating


def lively(model: CASE) -> CASE:
    with torch.no_grad():
        model.output.weight *= 4
        model.output.bias[EOS] = 1.5
    return model.eval()


@pytest.mark.parametrize("form", [plain.Cached, plain.Uncached])
@pytest.mark.parametrize("config", [GenerationConfig(max_words=12), GenerationConfig("beam", beams=4, max_words=10)],
                         ids=lambda config: config.strategy)
def test_the_plain_forms_say_what_ours_says(form, config):
    examples, texts = random_examples(40, seed=5)
    assert any(len(example.knowledge) == 0 for example in examples)
    model, batch = lively(tiny_model(layers=2)), make_batch(examples, texts)
    with evaluating(model):
        reading = model.read(batch)
    ours, theirs = generate(model, batch, config, reading=reading), plain.generate(model, reading, config, form)
    assert [(r.words, r.ended_by) for r in theirs] == [(r.words, r.ended_by) for r in ours]
    assert [r.score for r in theirs] == pytest.approx([r.score for r in ours], abs=1e-4)
    assert len({r.words for r in ours}) > 10 and {r.ended_by for r in ours} == {"eos", "length"}


def test_a_quick_run_is_told_in_full_and_a_wrong_form_is_refused(sample_store, tmp_path, monkeypatch):
    model = lively(CASE(tiny_config(vocab_size=len(sample_store.featurizer.vocabulary))))
    greedy = plain.greedy

    def wrong(decoder, *more):
        return [replace(reply, score=reply.score - isinstance(decoder, plain.Uncached)) for reply in greedy(decoder, *more)]

    monkeypatch.setattr(plain, "greedy", wrong)
    monkeypatch.setattr(run, "STRATEGIES", {name: replace(config, max_words=8) for name, config in run.STRATEGIES.items()})
    case = run.measure(model, sample_store, 3, True, 0.1, lambda *_: None)
    refused = [(row["strategy"], row["form"]) for row in case["rows"] if "refused" in row]
    assert refused == [("greedy", "padded, no cache, eager")] and len(case["rows"]) == 6
    assert all(row["replies_a_second"] > 0 and row["different"] == 0 for row in case["rows"] if "refused" not in row)
    results = json.loads((command.RESULTS / "epyc" / "decode.json").read_text()) | {"cases": [case], "quick": True}
    paths = tables.write(results, tmp_path)
    assert [path.name for path in paths] == ["decode.json", "decode.md", "decode.png"] and all(p.stat().st_size for p in paths)
    text = paths[1].read_text()
    assert text.startswith(tables.overview(results)) and "A quick run" in text
    assert all(f"| {row['strategy']} | {row['form']} | " in text for row in case["rows"])
    assert "a reply of rank " in text and len(tables.lines(results)) == 2


def test_replies_that_differ_are_counted_where_they_are_near_ties():
    examples, texts = random_examples(2, seed=5)
    config = GenerationConfig(max_words=5)
    ours = generate(lively(tiny_model()), make_batch(examples, texts), config)
    other = [replace(reply, words=(9,) * len(reply.words)) for reply in ours]
    assert run.compare(ours, ours, config) == 0 and run.compare(other, ours, config) == 2
    with pytest.raises(WrongResult, match="a reply of rank"):
        run.compare([replace(reply, score=reply.score - 0.01) for reply in ours], ours, config)


@pytest.mark.parametrize("words, said", [
    ([], "give --store STORE and --run RUN"),
    (["--store", "x", "--run", "y", "--sizes", "16,all"], "'all' is none"),
])
def test_what_bench_decode_needs_is_said(words, said, capsys):
    assert cli.main(["bench", "decode", *words]) == 1
    assert said in " ".join(capsys.readouterr().err.split())


def test_stored_results_are_shown(capsys):
    assert cli.main(["bench", "--show", "decode"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# decode: replies to real dialogues") and f"| greedy | {OURS} | " in text
