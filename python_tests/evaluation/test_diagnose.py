"""The diagnosis: each figure against its definition in numpy, what must hold of extremes, other dialogues' knowledge, errors."""

from __future__ import annotations

import io
import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CONTENT_WORDS,
    dialogue,
    handmade_examples,
    normal,
    random_batch,
    same,
    speakers_prompts,
    split_rows,
    tensors,
    tiny_config,
    tiny_featurizer,
    tiny_model,
)
from rich.console import Console
from training_helpers import MemoryStore, records

from case_fast import cli
from case_fast.data.featurizer import Example
from case_fast.data.pack import make_batch
from case_fast.diagnosis import (
    SWAPS,
    common_share,
    diagnose,
    effective_rank,
    figures,
    gradient_norms,
    held_out,
    in_short,
    look,
    perplexities,
    retrieval,
    swaps,
    with_concepts_of,
    with_inferences_of,
    with_reactions_of,
)
from case_fast.errors import ConfigError
from case_fast.evaluation import diagnose as shown
from case_fast.evaluation.figures import diagnosis_png
from case_fast.models import CASE, build
from case_fast.models.results import Alignment, Choice, Inside
from case_fast.references import read_references
from case_fast.training import preset, train

SMALL = ["--model.d_model", "16", "--model.ffn", "16", "--max-steps", "2", "--validate-every", "2", "--valid-limit", "8",
         "--min-steps", "0", "--log-every", "1"]


# ---- figures against their definitions


@pytest.mark.parametrize("shape", [(40, 6), (3, 6), (1, 4)])
def test_common_share_and_effective_rank_are_what_numpy_says(shape):
    rows = normal(*shape, seed=1) + 0.7
    x = rows.numpy()
    assert common_share(rows) == pytest.approx(np.linalg.norm(x.mean(0)) / np.linalg.norm(x, axis=1).mean(), rel=1e-12)
    share = np.linalg.svd(x, compute_uv=False)
    share /= share.sum()
    assert effective_rank(rows) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-5)


def test_one_vector_has_share_and_rank_one_and_an_orthonormal_basis_the_other_extreme():
    constant = normal(1, 50).expand(80, 50)
    assert common_share(constant) == pytest.approx(1, abs=1e-12) and effective_rank(constant) == pytest.approx(1, abs=1e-4)
    basis = torch.eye(9, dtype=torch.float64)
    assert common_share(basis) == pytest.approx(1 / 3) and effective_rank(basis) == pytest.approx(9)
    with_empty = torch.cat([constant, torch.zeros(20, 50, dtype=torch.float64)])  # dialogues without knowledge
    assert common_share(with_empty) == pytest.approx(1, abs=1e-12)
    nothing = torch.zeros(4, 5, dtype=torch.float64)
    assert math.isnan(common_share(nothing)) and math.isnan(effective_rank(nothing))
    assert math.isnan(effective_rank(nothing + math.inf))


def test_perplexity_is_exp_of_the_entropy_of_each_dialogue():
    dialogue = torch.tensor([0, 0, 0, 2, 2, 3])  # dialogue 1 has none
    probability = torch.tensor([0.5, 0.5, 0.0, 0.25, 0.75, 1.0], dtype=torch.float64)
    found, number = perplexities(probability, dialogue)
    same(found, [2, math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75)), 1])
    assert number.tolist() == [3, 2, 1]


def test_a_uniform_prior_has_ratio_one():
    dialogue = torch.arange(4).repeat_interleave(torch.tensor([3, 7, 1, 5]))
    uniform = 1 / dialogue.bincount()[dialogue].double()
    sharp = torch.zeros_like(uniform).index_fill(0, torch.tensor([0, 3, 10, 11]), 1.0)
    found = figures([Inside(choices={"inferences": Choice(prior=uniform, posterior=sharp, dialogue=dialogue)})])["choices"]
    assert found["inferences"] == pytest.approx({"dialogues": 4, "number": 4, "prior_perplexity": 4, "prior_ratio": 1,
                                                 "posterior_perplexity": 1, "posterior_ratio": 0.25})


def slow_retrieval(scores: list[list[float]], positive: list[int]) -> dict[str, tuple[list[float], list[float]]]:
    """By counting, a pair at a time."""
    found = {"affection": ([], []), "cognition": ([], [])}
    for p, c in enumerate(positive):
        sets = {"affection": [scores[p][q] for q in range(len(scores[p])) if q != c],
                "cognition": [scores[other][c] for other in range(len(scores)) if positive[other] != c]}
        for side, negatives in sets.items():
            best = max([scores[p][c], *negatives])
            firsts = [scores[p][c], *negatives].count(best)
            found[side][0].append(1 / firsts if scores[p][c] == best else 0)
            found[side][1].append(1 / (1 + len(negatives)))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_retrieval_counts_as_one_would_by_hand_ties_shared_out(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (17, 6), generator=generator).double()  # many equal ones
    positive = torch.randint(0, 6, (17,), generator=generator)
    expected = slow_retrieval(scores.tolist(), positive.tolist())
    for side, found in retrieval(Alignment(scores=scores, positive=positive)).items():
        for part, by_hand in zip(found, expected[side], strict=True):
            same(part, by_hand)


def test_a_perfect_alignment_is_always_right_and_a_blind_one_is_at_chance():
    positive = torch.arange(5).repeat_interleave(3)
    perfect = torch.nn.functional.one_hot(positive, 5).double()
    of = figures([Inside(alignments={"fine": Alignment(scores=perfect, positive=positive)})])["alignments"]["fine"]
    assert of["affection"]["top1"] == of["cognition"]["top1"] == 1 and of["pairs"] == 15
    assert of["affection"]["chance"] == pytest.approx(1 / 5) and of["cognition"]["chance"] == pytest.approx(1 / 13)
    alike = figures([Inside(alignments={"fine": Alignment(scores=perfect * 0, positive=positive)})])["alignments"]["fine"]
    assert alike["affection"]["over_chance"] == pytest.approx(1) and alike["cognition"]["over_chance"] == pytest.approx(1)
    blind = [Inside(alignments={"x": Alignment(scores=normal(16, 16, seed=s), positive=torch.arange(16))}) for s in range(300)]
    for side in ("affection", "cognition"):  # 4 800 pairs: a standard error of 0.0035
        assert figures(blind)["alignments"]["x"][side]["top1"] == pytest.approx(1 / 16, abs=0.0125)
    broken = retrieval(Alignment(scores=perfect * math.nan, positive=positive))
    assert all(first.isnan().all() for first, _ in broken.values())


def test_the_gate_s_spread_is_over_all_dialogues():
    gates = torch.linspace(0, 1, 101, dtype=torch.float64)
    found = figures([Inside(gate=gates[:40]), Inside(gate=gates[40:])])["gate"]
    assert found["mean"] == pytest.approx(0.5) and found["std"] == pytest.approx(float(np.std(gates.numpy())))
    assert found["quantiles"] == pytest.approx({"0.05": 0.05, "0.25": 0.25, "0.5": 0.5, "0.75": 0.75, "0.95": 0.95})


# ---- inside CASE


@pytest.mark.parametrize("score", ["bilinear_sigmoid", "standardized", "dot"])
@pytest.mark.parametrize("negatives", [None, 3])
def test_the_scores_of_all_pairs_are_those_of_the_loss(score, negatives, runs):
    batch = random_batch(7)
    model = tiny_model(mim_score=score, num_negatives=negatives).eval()
    whole = tiny_model(mim_score=score).eval()  # whose loss is over all pairs
    with torch.no_grad():
        for weight in (model.w_coarse, model.w_fine, whole.w_coarse, whole.w_fine):
            weight.copy_(normal(16, 16, seed=2, scale=0.1))
        out = whole(batch)
        found = model.inside(batch, model(batch)).alignments
    case = batch.case
    sides = {"coarse": (out.r_cog[case.known], out.r_emo[case.known], torch.arange(len(case.known))),
             "fine": (out.knowledge[case.paired], out.reaction[case.with_reaction], case.positive)}
    for name, (x, y, positive) in sides.items():
        x, y = x.double().numpy(), y.double().numpy()
        if score == "standardized":
            x, y = ((rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) for rows in (x, y))
            x = x / 16
        z = torch.from_numpy((x if score == "dot" else x @ normal(16, 16, seed=2, scale=0.1).numpy()) @ y.T)
        same(found[name].scores.double(), z, 1e-4)
        assert found[name].positive.equal(positive)
        f = z if score == "dot" else z.sigmoid()
        loss = 0.0
        for p, c in enumerate(positive.tolist()):
            others = [q for q in range(len(f)) if positive[q] != c]
            loss += float(f[p].logsumexp(0) + torch.cat([f[others, c], f[p, c, None]]).logsumexp(0) - 2 * f[p, c])
        assert out.losses[name].item() == pytest.approx(loss / len(f), rel=1e-4)


def test_equal_vectors_are_ties_of_the_op_and_so_at_chance(runs):
    batch, model = random_batch(8), tiny_model().eval()
    with torch.no_grad():
        out = model(batch)
        names = ("r_cog", "r_emo", "knowledge", "reaction")
        alike = replace(out, **{name: torch.ones_like(getattr(out, name)) for name in names})
        found = figures([model.inside(batch, alike)])
    assert all(of["common_share"] == pytest.approx(1) for name, of in found["vectors"].items() if name != "ec")
    for of in found["alignments"].values():
        assert of["affection"]["over_chance"] == pytest.approx(1) and of["cognition"]["over_chance"] == pytest.approx(1)


def test_looking_inside_changes_nothing():
    batch, model = random_batch(6), tiny_model(graph_dropout=0.3, encoder_dropout=0.2).train()
    counts, state = model.word_counts.clone(), torch.get_rng_state()
    first, again = figures(look(model, [batch])), figures(look(model, [batch]))
    assert first == again and set(in_short(first)) >= {"cs_common_share", "concepts_prior_ratio", "fine_over_chance"}
    assert model.training and model.word_counts.equal(counts) and torch.get_rng_state().equal(state)
    gradient_norms(model, [batch])
    assert model.training and model.word_counts.equal(counts) and torch.get_rng_state().equal(state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_alignments_that_are_switched_off_are_looked_at_all_the_same():
    batch = random_batch(6)
    with torch.no_grad():
        for changes in ({}, CASE.Config.ablations["w/o Align"]):
            model = tiny_model(**changes).eval()
            assert set(model.inside(batch, model(batch)).alignments) == {"coarse", "fine"}


def test_gradient_norms_are_those_of_backward():
    batches = [random_batch(5, seed) for seed in (1, 2)]
    model = tiny_model(alpha=0.3, gamma_emotion=2.0, gamma_diversity=0.5).eval()
    found = gradient_norms(model, batches)
    weights = {"loss": 1, "bow": 1, "kl": 1, "coarse": 1, "fine": 0.3, "emotion": 2, "generation": 1, "diversity": 0.5}
    assert set(found) == set(weights)
    for name, weight in weights.items():
        norms = []
        for batch in batches:
            model.zero_grad()
            out = model(batch)
            (weight * (out.loss if name == "loss" else out.losses[name])).backward()
            parts = [p.grad for n, p in model.named_parameters() if n.split(".")[0] in model.shared and p.grad is not None]
            norms.append(float(torch.cat([part.flatten() for part in parts]).double().norm()))
        assert found[name] == pytest.approx(sum(norms) / 2, rel=1e-4), name
    assert "coarse" not in gradient_norms(tiny_model(coarse_alignment=False), batches)
    assert gradient_norms(build("multi-trs", vocab_size=60, d_model=16, ffn=8, attention_width=8), batches) == {}


# ---- the knowledge of another dialogue


def cognition(batch) -> list[list[int]]:
    """The words of each vertex of G_CS."""
    texts = split_rows(batch.case.text, batch.case.cu_text)
    return [texts[text].tolist() for text in batch.case.cognition_text.tolist()]


def first_reaction(batch) -> list[int]:
    """The words that er_0 is made of."""
    return split_rows(batch.case.reaction, batch.case.cu_reaction)[batch.case.reaction_first].tolist()


@pytest.mark.parametrize("name", SWAPS)
def test_the_knowledge_of_an_equal_dialogue_is_its_own(name):
    examples, texts = handmade_examples()
    for example in examples:
        other = dict(tensors(make_batch([SWAPS[name][1](example, example)], texts)))
        assert all(tensor.equal(other[path]) for path, tensor in tensors(make_batch([example], texts)))


def test_every_dialogue_can_have_the_knowledge_of_every_other_and_keeps_the_rest():
    examples, texts = handmade_examples()
    model = tiny_model().eval()
    for example in examples:
        own = make_batch([example], texts)
        for other in examples:
            theirs = make_batch([other], texts)

            inferred = make_batch([with_inferences_of(example, other)], texts)
            subs, their_subs = len(example.sub_utterance), len(other.sub_utterance)
            assert cognition(inferred) == cognition(own)[:subs] + cognition(theirs)[their_subs:]
            assert inferred.case.reaction.equal(own.case.reaction)

            felt = make_batch([with_reactions_of(example, other)], texts)
            assert first_reaction(felt) == first_reaction(theirs) and cognition(felt) == cognition(own)

            concerned = make_batch([with_concepts_of(example, other)], texts)
            words = 1 + len(example.context)
            assert concerned.concept.word[:words].equal(own.concept.word[:words])
            assert concerned.concept.word[words:].equal(theirs.concept.word[1 + len(other.context):])
            assert concerned.concept.intensity[words:].equal(theirs.concept.intensity[1 + len(other.context):])
            assert concerned.concept.position.max() <= len(example.context)
            degree = concerned.concept.graph.indptr.diff()[words:]
            assert (degree >= 2).all() and (len(other.concept) == 0 or degree.min() >= 3)  # itself, [CLS], a word
            for batch in (inferred, felt, concerned):
                assert batch.context.equal(own.context) and batch.target.equal(own.target)
                assert model(batch).loss.isfinite()


def test_dialogues_that_are_all_alike_lose_nothing_by_a_swap():
    store = MemoryStore(valid=4)
    store._splits["valid"] = [store._splits["valid"][2]] * 4
    found = swaps(tiny_model().eval(), store, "valid", [[0, 1], [2, 3]])
    assert set(found) == {"own", "inferences", "concepts", "reactions", "everything"}
    for name, of in found.items():
        assert (of["ppl"], of["accuracy"]) == (found["own"]["ppl"], found["own"]["accuracy"])
        assert name == "own" or (of["rise"], of["rise_error"]) == (0, 0)


def test_the_rise_of_the_perplexity_and_its_error_are_those_of_the_replies():
    store, model, group = MemoryStore(valid=9), tiny_model().eval(), [3, 8, 1, 0, 5]
    found = swaps(model, store, "valid", [group])
    examples = [store.example("valid", index) for index in group]
    changed = [with_concepts_of(example, examples[(place + 1) % 5]) for place, example in enumerate(examples)]
    own, other = (read_references(model, [make_batch(e, store.texts)]) for e in (examples, changed))
    words = sum(len(row) for row in own.nll)
    rise = (sum(row.sum() for row in other.nll) - sum(row.sum() for row in own.nll)) / words
    assert found["own"]["ppl"] == pytest.approx(math.exp(own.mean_nll))
    assert found["concepts"]["ppl"] == pytest.approx(math.exp(other.mean_nll), rel=1e-9)
    assert found["concepts"]["rise"] == pytest.approx(100 * (found["concepts"]["ppl"] / found["own"]["ppl"] - 1))
    assert found["concepts"]["accuracy"] == other.accuracy
    rest = [after.sum() - before.sum() - rise * len(before) for before, after in zip(own.nll, other.nll, strict=True)]
    error = math.sqrt(5 / 4 * sum(value**2 for value in rest)) / words
    assert found["concepts"]["rise_error"] == pytest.approx(100 * math.exp(rise) * error) and error > 0
    assert found["everything"]["ppl"] != found["concepts"]["ppl"]


@pytest.mark.slow
def test_a_model_whose_replies_stand_in_its_inferences_is_seen_to_read_these_alone():
    """Every context is the same; what is to be said, one inference of each dialogue says."""
    rng, store = random.Random(0), MemoryStore()
    store.texts = tiny_featurizer().text_table()

    def told() -> Example:
        said, felt = rng.choices(CONTENT_WORDS, k=2)
        known = {text: {"xWant": [said], "xReact": [felt]} for text in speakers_prompts(["rain ."])}
        return dialogue(["rain ."], store.texts, known, f"{said} {said}", "sad")

    store._splits = {split: [told() for _ in range(size)] for split, size in (("train", 256), ("valid", 64))}
    model = tiny_model(ffn=16, mim_score="standardized", discernment_scale="sqrt_d").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(120):
        model(store.batch("train", rng.sample(range(256), 16), seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = swaps(model, store, "valid", held_out(store, "valid", 4))
    assert found["own"]["ppl"] < 2 and found["inferences"]["rise"] > 500
    assert found["inferences"]["rise"] > 2 * found["inferences"]["rise_error"]
    assert abs(found["concepts"]["rise"]) < 2 and abs(found["reactions"]["rise"]) < 2


@pytest.mark.slow
def test_the_demo_tells_its_knowledge_apart(sample_store, tmp_path):
    """As printed, its inferences are one vector by then (common share 0.99997) and all weigh alike (0.9991 of their number)."""
    config = preset("demo", max_steps=150, min_steps=0, validate_every=150, device="cpu")
    train(sample_store, tmp_path / "run", config, Console(file=io.StringIO()))
    (last,) = records(tmp_path / "run", "validation")
    found = last["diagnosis"]
    assert found["cs_common_share"] < 0.95 and found["inferences_prior_ratio"] < 0.97 and found["concepts_prior_ratio"] < 0.9
    assert found["coarse_over_chance"] >= 2


# ---- held-out batches


def test_held_out_batches_are_whole_fixed_and_of_different_conversations(sample_store):
    state = torch.get_rng_state()
    groups = held_out(sample_store, "train", 4)
    assert torch.get_rng_state().equal(state) and groups == held_out(sample_store, "train", 4)
    assert [len(group) for group in groups] == [16] * 4 and held_out(sample_store, "train", 2) == groups[:2]
    ids = [sample_store.example("train", index).source["id"].split("#")[0] for group in groups for index in group]
    assert len(set(ids)) == 64
    few = held_out(sample_store, "valid", 50)  # only whole ones, as many as there are
    assert few and all(len(group) == 16 for group in few)
    assert [len(group) for group in held_out(MemoryStore(valid=5), "valid", 8)] == [5]


# ---- the whole


@pytest.fixture(scope="module")
def found(sample_store) -> dict:
    torch.manual_seed(0)
    model = CASE(tiny_config(vocab_size=len(sample_store.featurizer.vocabulary))).eval()
    return diagnose(model, sample_store, batches=2, gradient_batches=1)


def test_the_whole_has_every_part_and_is_plain(found):
    assert set(found) == {"split", "batches", "dialogues", "vectors", "choices", "alignments", "gate", "gradients", "swaps",
                          "seconds"}
    assert set(found["vectors"]) == {"cs", "ec", "er", "r_cog", "r_emo"} and found["dialogues"] == 16 * found["batches"]
    assert json.loads(json.dumps(found)) == found


def test_what_is_not_healthy_is_marked_and_the_questions_are_answered(found):
    sick = json.loads(json.dumps(found))
    sick["vectors"]["cs"]["common_share"] = 0.999
    sick["choices"]["inferences"]["prior_ratio"] = 1.0
    sick["alignments"]["coarse"]["affection"]["over_chance"] = 1.1
    sick["alignments"]["fine"]["affection"]["over_chance"] = 5.0
    sick["gradients"] = {"loss": 10.0, "kl": 10.0, "generation": 0.01}
    sick["swaps"]["inferences"] |= {"rise": 1.0, "rise_error": 0.6}
    sick["swaps"]["concepts"] |= {"rise": 1.0, "rise_error": 0.4}
    wells = {row.name: row.well for part in shown.rows(sick) for row in part}
    assert [wells[name] for name in ("cs: common share", "inferences: prior", "coarse: affection", "gradient: generation",
                                     "another's inferences")] == [False] * 5
    assert wells["fine: affection"] and wells["gradient: kl"] and wells["another's concepts"] and wells["gate mu"] is None
    read, aligned = shown.answers(sick)
    assert "inferences no (+1.00 %), concepts yes (+1.00 %)" in read
    assert "coarse no (1.1 x chance), fine yes (5.0 x chance)" in aligned


def test_a_model_without_knowledge_has_nothing_to_diagnose(sample_store):
    model = build("multi-trs", vocab_size=len(sample_store.featurizer.vocabulary), d_model=16, ffn=8, attention_width=8).eval()
    with pytest.raises(ConfigError, match="model multi-trs reads no knowledge and has no alignment: nothing to diagnose. Models "
                                          "that do: case"):
        diagnose(model, sample_store, batches=1)


def test_what_has_no_value_is_shown_as_such(found, tmp_path):
    """Dialogues without any knowledge leave nothing to average."""
    store = MemoryStore(valid=40)
    alone = [example for example in store._splits["valid"] if not len(example.knowledge) and not len(example.reaction)]
    store._splits["valid"] = alone
    assert len(alone) > 3
    empty = diagnose(tiny_model().eval(), store, batches=1)
    assert math.isnan(empty["vectors"]["cs"]["common_share"]) and math.isnan(empty["choices"]["inferences"]["prior_ratio"])
    assert empty["alignments"]["fine"]["pairs"] == 0 and empty["swaps"]["inferences"]["rise"] == 0
    rows = {row.name: row for part in shown.rows(empty) for row in part}
    assert rows["cs: common share"].value == "nan" and rows["fine: affection"].well is False
    diagnosis_png(empty, {"alike": 1, "narrow": 1, "aligned": 1}, "nothing", tmp_path / "it.png")


def test_a_split_of_one_conversation_has_nothing_to_compare():
    with pytest.raises(ConfigError, match="the split 'valid' of memory.store has 1 conversation: there is nothing to compare"):
        diagnose(tiny_model().eval(), MemoryStore(valid=1))


@pytest.fixture(scope="module")
def run(sample_store, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("diagnose") / "run"
    assert cli.main(["train", "--data", str(sample_store.path), "--out", str(out), "--phase1-steps", "1", *SMALL]) == 0
    return out


def said(capsys) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_the_command_shows_a_table_and_writes_json_and_picture(run, sample_store, tmp_path, capsys):
    words = ["diagnose", str(run), "--data", str(sample_store.path), "--batches", "1"]
    assert cli.main(words) == 0
    shown_words = said(capsys)
    for name in ("cs: common share", "inferences: prior", "fine: cognition", "gradient: kl", "gate mu", "another's concepts",
                 "Is its knowledge read?", "Does the alignment align?"):
        assert name in shown_words
    folder = run / "diagnosis" / "valid"
    assert {file.name for file in folder.iterdir()} == {"diagnosis.json", "diagnosis.png"}
    assert (folder / "diagnosis.png").read_bytes()[:4] == b"\x89PNG"
    kept = json.loads((folder / "diagnosis.json").read_text())
    assert kept["split"] == "valid" and kept["store"]["fingerprint"] == sample_store.fingerprint

    assert cli.main([*words, "--split", "test", "--out", str(tmp_path / "here"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "here" / "diagnosis.json").read_text()) and printed["split"] == "test"


def test_without_matplotlib_the_picture_is_left_out_and_it_is_said(run, sample_store, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["diagnose", str(run), "--data", str(sample_store.path), "--batches", "1", "--out", str(tmp_path)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["diagnosis.json"]
    assert "needs matplotlib" in caplog.text


@pytest.mark.parametrize(("words", "expected"), [
    (["--split", "dev"], "split 'dev' is not in the store"),
    (["--batches", "0"], "batches must be at least 1, not 0"),
    (["--checkpoint", "77"], "checkpoint '77' is not in"),
])
def test_an_argument_that_cannot_work_is_named(run, sample_store, capsys, words, expected):
    assert cli.main(["diagnose", str(run), "--data", str(sample_store.path), *words]) == 1
    assert expected in said(capsys)


def test_a_run_that_is_not_there_or_has_nothing_to_diagnose_is_said(sample_store, tmp_path, capsys):
    assert cli.main(["diagnose", str(tmp_path / "none"), "--data", str(sample_store.path)]) == 1
    assert "run folder not found" in said(capsys)
    out = tmp_path / "run"
    words = ["train", "--model", "multi-trs", "--data", str(sample_store.path), "--out", str(out), *SMALL,
             "--model.attention-width", "8"]
    assert cli.main(words) == 0
    capsys.readouterr()
    assert cli.main(["diagnose", str(out), "--data", str(sample_store.path)]) == 1
    assert "model multi-trs reads no knowledge and has no alignment: nothing to diagnose" in said(capsys)
    assert not (out / "diagnosis").exists()
    validations = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if '"validation"' in line]
    assert validations and all(record["diagnosis"] == {} for record in validations)
