"""Scoring whole files: what must hold whatever the replies, the classifiers on planted data, and the command."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from matplotlib.image import imread
from reply_files import BLOCKS, epitome_data, intent_data, json_lines, kemp, many, tiny_bert

from case_fast import cli
from case_fast.errors import ConfigError, DataError
from case_fast.evaluation.measures import GROUPS
from case_fast.evaluation.metrics import INTENTS
from case_fast.evaluation.proxies import Classifier, Epitome, Intents
from case_fast.evaluation.replies import read_all
from case_fast.evaluation.score import score
from case_fast.evaluation.score_table import difference_of, markdown, signatures_of, value_of

DRAWS = 400


def rows(seed: int = 0, count: int = 80, common: float = 0.0):
    return many(np.random.default_rng(seed), count, common)


def scored(tmp_path, *systems, measurers=()):
    files = [json_lines(tmp_path / f"{chr(97 + place)}.jsonl", system) for place, system in enumerate(systems)]
    return score(read_all(list(map(str, files))), measurers, DRAWS)


def with_replies_of(own, other):
    """The contexts and references of one system with the replies of another."""
    return [row | {"reply": found["reply"]} for row, found in zip(own, other, strict=True)]


def test_shuffled_lines_change_nothing(tmp_path):
    a, b = rows(), with_replies_of(rows(), rows(1))
    plain = scored(tmp_path, a, b)
    generator = np.random.default_rng(9)
    shuffled = scored(tmp_path, *([system[place] for place in generator.permutation(len(system))] for system in (a, b)))
    assert shuffled.cells == plain.cells


def test_a_system_beside_itself_differs_by_nothing(tmp_path):
    found = scored(tmp_path, rows(), rows())
    for name, (_, cell) in found.cells.items():
        if cell.metric.value is not None:
            assert (cell.difference.value, cell.difference.p, cell.adjusted) == (0, 1, 1), name
            assert cell.difference.low == cell.difference.high == 0 and cell.pairs == 80


def test_swapped_systems_mirror_every_difference(tmp_path):
    a, b = rows(), with_replies_of(rows(), rows(1, common=0.3))
    there, back = scored(tmp_path, a, b), scored(tmp_path, b, a)
    differ = [name for name, (_, cell) in there.cells.items() if cell.difference]
    assert {"dist_1", "reply_words", "gzip_ratio", "common_replies"} <= set(differ)
    for name in differ:
        one, other = there.cells[name][1].difference, back.cells[name][1].difference
        assert one.value == pytest.approx(-other.value), name
        assert one.p == pytest.approx(other.p, abs=0.03), name
        assert (one.low, one.high) == (pytest.approx(-other.high), pytest.approx(-other.low)), name
    common = there.cells["common_replies"][1]
    assert common.difference.p < 0.05 and common.difference.low > 0 and common.adjusted == common.difference.p


def test_two_alike_systems_rarely_differ(tmp_path):
    """Eight metrics of eight pairs of systems that draw their replies alike: p < 0.05 for few."""
    names = ("dist_1", "dist_2", "distinct_replies", "reply_words", "gzip_ratio", "self_repetition", "repeated_1",
             "common_replies")
    found = []
    for seed in range(8):
        cells = scored(tmp_path, rows(2 * seed, 40), with_replies_of(rows(2 * seed, 40), rows(2 * seed + 1, 40))).cells
        found += [cells[name][1].difference.p < 0.05 for name in names]
    assert np.mean(found) < 0.12


def test_only_replies_to_the_same_contexts_are_compared(tmp_path):
    a, b = rows(), with_replies_of(rows(), rows(1))
    found = scored(tmp_path, a, b[:60], [row | {"context": ["never heard"]} for row in b[:5]])
    alone = scored(tmp_path, a[:60], b[:60])
    assert [system["matched"] for system in found.systems] == [None, 60, 0]
    for name in ("dist_2", "reply_words", "gzip_ratio"):
        assert found.cells[name][1].difference == alone.cells[name][1].difference
        assert found.cells[name][1].pairs == 60 and found.cells[name][2].difference is None
    assert found.cells["reply_words"][2].low is None  # one conversation tells nothing of its spread


def test_references_are_taken_from_the_other_files(tmp_path):
    pytest.importorskip("rouge_score")
    a = rows()
    bare = [{"context": row["context"], "reply": row["reply"]} for row in a]
    found = scored(tmp_path, a, bare).cells["rouge_1"]
    assert found[0].metric == found[1].metric and found[1].metric.count == 80


def test_values_measured_otherwise_are_not_compared(tmp_path):
    names = "ab"
    for name, words in zip(names, (10, 11), strict=True):
        folder = tmp_path / name
        folder.mkdir()
        json_lines(folder / "predictions.jsonl", [row | {"nll": 6.0, "tokens": 3} for row in rows()])
        known = {"split": "test", "examples": 80, "size": 80, "bundled": False, "metrics": [], "store": {"vocabulary": words}}
        (folder / "metrics.json").write_text(json.dumps(known))
    found = score(read_all([str(tmp_path / name) for name in names]), (), DRAWS)
    assert [cell.metric.value for cell in found.cells["ppl_geometric"]] == pytest.approx([np.exp(2)] * 2)
    assert found.cells["ppl_geometric"][1].difference is None and found.cells["dist_1"][1].difference is not None
    assert {"vocabulary=10", "vocabulary=11"} <= {part for of in signatures_of(found) for part in of.split("|")}


def test_hostile_replies_are_texts_like_others(tmp_path, capsys):
    replies = ["<script>alert(1)</script>", "\u202eright to left", "w" * 10_000, "=cmd() | [red]x[/red]", "\ud83d",
               "\U0001f600" * 50, "", " 's" * 300, "\\`|"]
    path = json_lines(tmp_path / "bad.jsonl", [
        {"context": [f"turn {place}"], "reply": reply, "reference": reply} for place, reply in enumerate(replies * 3)])
    path.write_bytes(path.read_bytes() + b'{"context": ["nul"], "reply": "\0"}\n\xff\n')
    assert cli.main(["score", f"[red]a|b={path}", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "[red]a|b" in said and "NUL byte" in said and "not UTF-8" in said
    assert "| [red]a\\|b |" in (tmp_path / "out" / "score.md").read_text()


def test_tables_are_in_order_and_escape_names(tmp_path):
    files = read_all([f"a|b={json_lines(tmp_path / 'a.jsonl', rows())}", f"<i>={json_lines(tmp_path / 'b.jsonl', rows())}"])
    found = score(files, (), DRAWS)
    groups = [*dict.fromkeys(found.groups[name] for name in found.cells)]
    assert groups == [group for group in GROUPS if group in groups]
    assert [*found.cells][:2] == ["dist_1", "dist_2"]
    text = markdown(found)
    assert "| a\\|b |" in text and "&lt;i>" in text and "<i>" not in text
    cell = found.cells["distinct_replies"][0]
    assert value_of(cell).startswith(f"{cell.metric.value} [") and "." not in value_of(cell)
    assert difference_of(cell) == "" and difference_of(found.cells["dist_1"][1]) == "0.000 [0.000, 0.000]"


# ---- classifiers


def test_epitome_learns_a_planted_level_and_tells_how_well(tmp_path):
    replies = [{"context": [f"c {place}"], "reply": reply} for place, reply in enumerate(
        ["I am so very sorry for you.", "What happened next?", "I'm so very sorry for you", "I understand it."] * 10)]
    found = scored(tmp_path, replies, measurers=[Epitome(epitome_data(tmp_path / "epitome"))]).cells
    (cell,) = found["epitome_er"]
    assert cell.metric.value == pytest.approx((2 + 0 + 2 + 1) / 4) and cell.low < cell.metric.value < cell.high
    assert "held_out=by_seeker(acc:1.000,macro_f1:1.000,majority:0.333,n:24)" in cell.metric.signature
    assert {"epitome_er", "epitome_ip", "epitome_ex"} <= set(found)


@pytest.mark.parametrize(("text", "said"), [
    ("sp_id,response_post,level\na,b,3\n", r":2: the level is '3', not 0, 1 or 2"),
    ("sp_id,level\na,0\n", "no table with sp_id, response_post and level"),
    ("sp_id,response_post,level\na,b,0\n", "1 pairs, too few to learn from"),
])
def test_a_wrong_table_of_epitome_is_named(text, said, tmp_path):
    folder = epitome_data(tmp_path / "epitome", 10)
    (folder / "interpretations-reddit.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        Epitome(folder)
    (folder / "interpretations-reddit.csv").unlink()
    with pytest.raises(DataError, match="interpretations-reddit.csv: table of EPITOME not found. Give the folder dataset"):
        Epitome(folder)


def test_intents_are_those_planted_and_agree_with_the_reference(tmp_path):
    replies = [{"context": [f"c {place}"], "reply": reply, "reference": "Good luck with that!"} for place, reply in enumerate(
        ["Good luck with it.", "What did you do?", "good luck with your test", "Good luck with them"] * 10)]
    intents = Intents(intent_data(tmp_path / "datasets"))
    found = scored(tmp_path, replies, measurers=[intents]).cells
    shares = {name: found[f"intent_{name}"][0].metric.value for name in INTENTS}
    assert (shares["wishing"], shares["questioning"]) == (75, 25) and sum(shares.values()) == pytest.approx(100)
    agreement = found["intent_agreement"][0].metric
    assert agreement.value == 75 and "test=acc:1.000" in agreement.signature and "by_hand=acc:1.000" in agreement.signature
    assert "n:2" in agreement.signature  # of two by hand; advising is none of the eight
    (tmp_path / "datasets" / "lexically_extended_intent_data" / "train" / "neutral.txt").unlink()
    with pytest.raises(DataError, match="no texts of the intent neutral. Give the folder datasets"):
        Intents(tmp_path / "datasets" / "lexically_extended_intent_data")


def test_texts_that_teach_nothing_are_refused():
    with pytest.raises(ConfigError, match="nothing can be learnt from 3 texts"):
        Classifier(["a", "b", "c"], [0, 1, 2])
    with pytest.raises(ConfigError, match="nothing can be learnt from 2 texts"):
        Classifier(["so sad", "so sad"], [1, 1])


# ---- BERTScore


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    pytest.importorskip("transformers")
    return tiny_bert(tmp_path_factory.mktemp("bert"))


PAIRS = [("I am so sorry to hear that.", "sorry"), ("great!", "i am so sorry to hear that . what happened ."), ("", "oh"),
         ("what happened", "Great! is his name"), ("oh no, what is his name? I am so sorry", "what happened?"),
         ("oh no", "oh no")]


@pytest.mark.parametrize("layer", [1, None])
def test_bertscore_is_that_of_each_pair_alone(bert, layer):
    from case_fast.evaluation.bertscore import BertScore

    measured = BertScore(bert, layer)
    found = measured.f1(PAIRS)
    assert found[2] == 0 and found[-1] == pytest.approx(1, abs=1e-6)
    assert found == pytest.approx([measured.f1([pair])[0] for pair in PAIRS], abs=1e-6)
    expected = []  # word by word
    for pair in PAIRS:
        one, other = (side[0][has[0]].tolist() for side, has in (measured._vectors([text]) for text in pair))
        best = [[max(np.dot(v, w) for w in b) for v in a] if a and b else [0] for a, b in ((one, other), (other, one))]
        p, r = map(np.mean, best)
        expected.append(2 * p * r / (p + r) if p + r else 0)
    assert found == pytest.approx(expected, abs=1e-5)


def test_bertscore_agrees_with_torchmetrics_pair_by_pair(bert):
    torchmetrics = pytest.importorskip("torchmetrics.functional.text.bert")
    from case_fast.evaluation.bertscore import BertScore

    pairs = [pair for pair in PAIRS if all(pair)]
    theirs = [float(torchmetrics.bert_score([reply], [reference], model_name_or_path=str(bert), num_layers=2, max_length=64,
                                            truncation=True)["f1"]) for reply, reference in pairs]
    assert BertScore(bert).f1(pairs) == pytest.approx(theirs, abs=1e-5)


def test_bertscore_says_by_what_and_is_rescaled(bert, tmp_path):
    from case_fast.evaluation.bertscore import BertScore

    plain, rescaled = BertScore(bert), BertScore(bert, baseline=bert / "baseline.tsv")
    assert rescaled.f1(PAIRS) == pytest.approx((plain.f1(PAIRS) - 0.5) / 0.5)
    replies = [{"context": [f"c {place}"], "reply": reply, "reference": reference}
               for place, (reply, reference) in enumerate(PAIRS)]
    (cell,) = scored(tmp_path, replies, measurers=[plain]).cells["bert_score"]
    assert cell.metric.value == pytest.approx(100 * plain.f1(PAIRS).mean(), abs=1e-3) and cell.metric.count == len(PAIRS)
    assert "|layer=2|idf=no|rescaled=no|transformers=" in cell.metric.signature
    assert "rescaled=no" not in rescaled.signature and "layer=2" in rescaled.signature
    with pytest.raises(ConfigError, match="must lie in 1 .. 2"):
        BertScore(bert, 3)
    with pytest.raises(DataError, match="no row of the layer 1 in a table LAYER,P,R,F"):
        BertScore(bert, 1, json_lines(tmp_path / "x.tsv", [1]))
    with pytest.raises(DataError, match="the model cannot be loaded"):
        BertScore(tmp_path)


# ---- the command


def test_the_command_shows_and_writes_everything(tmp_path, capsys):
    files = [f"KEMP={kemp(tmp_path / 'kemp.txt', BLOCKS * 2)}", str(json_lines(tmp_path / "mine.jsonl", [
        {"context": context, "reply": "oh !"} for context, *_ in BLOCKS] + [{"reply": "no context"}]))]
    out = tmp_path / "scored"
    assert cli.main(["score", *files, "--epitome", str(epitome_data(tmp_path / "epitome")), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for text in ("KEMP", "mine", "Dist-1", "Less KEMP, on replies to the same contexts", 'no "context" of turns; line 5',
                 "Intent of the reference, %: give the folder datasets of anuradha1992/EmpatheticIntents: --intents DIR",
                 "dist_1|scale=100", "score.png"):
        assert text in said, text
    written = json.loads((out / "score.json").read_text())
    assert [system["name"] for system in written["systems"]] == ["KEMP", "mine"] and written["systems"][1]["matched"] == 4
    cell = written["metrics"]["reply_words"]["systems"]["mine"]
    assert cell["metric"]["value"] == 2 and cell["difference"]["value"] == pytest.approx(-5.5) and cell["low"] is None
    assert written["metrics"]["epitome_er"]["systems"]["KEMP"]["metric"]["value"] is not None
    assert "## Diversity and repetition" in (out / "score.md").read_text()
    assert imread(io.BytesIO((out / "score.png").read_bytes())).ndim == 3


def test_the_command_without_the_extra_says_what_to_install(tmp_path, capsys, monkeypatch):
    for module in ("sacrebleu.metrics", "rouge_score.rouge_scorer", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["score", str(kemp(tmp_path / "kemp.txt")), "--bertscore", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for package in ("sacrebleu", "rouge-score", "transformers"):
        assert f"which is not installed: pip install {package}" in said
    assert cli.main(["score", str(tmp_path / "nothing.txt")]) == 1
    assert "nothing.txt: file of replies not found" in capsys.readouterr().err
