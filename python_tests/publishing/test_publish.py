"""`case-fast publish`: what it writes of a run, its model card, and what another machine without network does with the folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from case_fast import cli
from case_fast.commands.runs import run_evaluation
from case_fast.data.prepare import PrepareSettings, bundled, prepare
from case_fast.errors import ConfigError
from case_fast.generation import GenerationConfig
from case_fast.models import CASE
from case_fast.publishing import publish
from case_fast.runs import Run, load_model
from case_fast.serving import load
from case_fast.training import preset, train

ROOT = Path(__file__).resolve().parents[2]
FILES = {"README.md", "checksums.json", "config.json", "features.json", "metrics.json", "model.safetensors", "vocabulary.json"}
SAID = "I failed my exam. I studied so hard."


class Made:
    """A run on files that lie somewhere, as real data do, evaluated; and what was published of it. Read only."""

    def __init__(self, folder: Path):
        self.data, self.run, self.out = folder / "data", folder / "run", folder / "case-toy"
        sample = bundled("lexicon").parents[1]
        shutil.copytree(sample, self.data)
        (self.data / "emolex.txt").write_text("sad\tanger\t0\n")
        self.store = prepare(PrepareSettings(
            str(self.data / "dialogues"), f"atomic:{self.data / 'atomic'}", str(self.data / "conceptnet" / "assertions.csv"),
            str(self.data / "lexicon" / "lexicon.txt"), str(folder / "toy.store"), limit=12))
        train(self.store, self.run, preset("demo", model={"d_model": 16, "ffn": 16}, phase1_steps=1, max_steps=1, min_steps=0,
                                           validate_every=1, valid_limit=2, device="cpu"))
        run_evaluation(str(self.run), str(self.store.path), "test", 4, 4, "cpu", GenerationConfig(max_words=4), console())
        self.published = publish(self.run, self.out)

    @property
    def card(self) -> str:
        return (self.out / "README.md").read_text()


def console():
    from case_fast.terminal import Terminal

    return Terminal(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("publish"))


def test_the_folder_holds_the_best_weights_and_their_metrics(made):
    assert {path.name for path in made.out.iterdir()} == FILES
    assert (made.out / "model.safetensors").read_bytes() == (made.run / "best" / "model.safetensors").read_bytes()
    assert (made.out / "config.json").read_bytes() == (made.run / "best" / "config.json").read_bytes()
    ours = json.loads((made.out / "metrics.json").read_text())["test"]
    theirs = json.loads((made.run / "evaluation" / "test" / "metrics.json").read_text())
    assert theirs["store"].pop("path") and ours == theirs
    listed = json.loads((made.out / "checksums.json").read_text())["files"]
    assert set(listed) == FILES - {"README.md", "checksums.json"}


def test_nothing_in_it_names_a_place_of_this_machine(made):
    said = "".join(path.read_text() for path in made.out.iterdir() if path.suffix != ".safetensors")
    assert str(made.data.parent) not in said and str(Path.home()) not in said and os.uname().nodename not in said


def test_the_card_says_what_the_run_and_its_store_say(made):
    card = made.card
    assert "license: cc-by-nc-4.0" in card.partition("\n---\n")[0]
    for name, licence in (("EmpatheticDialogues", "CC BY-NC 4.0"), ("ATOMIC", "CC BY 4.0"), ("ConceptNet", "CC BY-SA 4.0"),
                          ("NRC-VAD", "research use, not to be passed on")):
        assert re.search(rf"^\| {name} \|.*\| {re.escape(licence)} \|", card, re.MULTILINE), name
    assert "GloVe" not in card and "EmoLex" not in card, "they were not used"
    manifest = json.loads((made.run / "manifest.json").read_text())
    assert f"{manifest['parameters']:,} parameters" in card and f"{made.store.size('train'):,} training examples" in card
    assert "2 steps of 16 dialogues, ended by max_steps; the weights are those of step 2" in card and "seed 0" in card
    metrics = json.loads((made.out / "metrics.json").read_text())["test"]["metrics"]
    assert metrics and not [metric for metric in metrics if metric["signature"].replace("|", "\\|") not in card]
    assert "Not for care" in card and "### Evaluation on test, 4 of " in card and "did not note" not in card
    assert json.loads(re.search(r"```json\n(.*?)```", card, re.DOTALL)[1]) == json.loads((made.run / "config.json").read_text())
    assert "{{" not in card and "{%" not in card and "None" not in card


def test_the_settings_of_the_card_train_again(made, tmp_path):
    (tmp_path / "recipe.json").write_text(re.search(r"```json\n(.*?)```", made.card, re.DOTALL)[1])
    words = ["train", "--config", str(tmp_path / "recipe.json"), "--data", str(made.store.path), "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0
    again, first = load_model(tmp_path / "run", "cpu")[0], load_model(made.out, "cpu")[0]
    assert all(map(torch.equal, again.state_dict().values(), first.state_dict().values()))


# Another machine: this folder, files of its own, no network, nothing of the run.
ELSEWHERE = """
import sys

def refuse(event, _):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise OSError("there is no network")

sys.addaudithook(refuse)
import case_fast
from case_fast.models import load
assert load("case-toy").config.d_model == 16 and case_fast.CASE.from_pretrained("case-toy")
try:
    case_fast.load("case-toy")
except case_fast.CaseFastError as error:
    print(type(error).__name__, error)
"""


def test_another_machine_without_network_runs_the_snippet_of_the_card(made, tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", made.card, re.DOTALL)
    assert 'case_fast.load("case-toy", lexicon="NRC-VAD-Lexicon.txt", knowledge="atomic:atomic2020")' in snippet
    assert "`case-toy`, `NRC-VAD-Lexicon.txt` and `atomic2020` (ATOMIC) in the folder" in made.card
    shutil.copytree(made.out, tmp_path / "case-toy")
    shutil.copy(made.data / "lexicon" / "lexicon.txt", tmp_path / "NRC-VAD-Lexicon.txt")
    shutil.copytree(made.data / "atomic", tmp_path / "atomic2020")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE + snippet], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    refused, said = done.stdout.splitlines()
    assert refused.startswith("ConfigError case-toy: published without the emotion intensities of 912 words")
    expected = load(made.run, "cpu").respond([SAID])
    assert said == f"{expected.text} {expected.emotion}"


def test_replies_and_reasons_are_those_of_the_run(made):
    ours = load(made.out, "cpu", f"atomic:{made.data / 'atomic'}", lexicon=made.data / "lexicon" / "lexicon.txt")
    theirs = load(made.run, "cpu")
    for history in ([SAID], ["My dog died.", "Oh no!", "I am so sad and alone."], ["zyzzy"]):
        assert ours.respond(history) == theirs.respond(history)
    assert not list(made.out.rglob("*.sqlite"))


def test_the_sample_s_own_lexicon_is_left_out_alike_and_put_back_by_its_name(sample_run, tmp_path, monkeypatch):
    publish(sample_run, tmp_path / "toy")
    card = (tmp_path / "toy" / "README.md").read_text()
    assert "license: mit" in card and "| the sample that comes with case_fast |" in card and "CC BY" not in card
    assert "These weights have not been evaluated." in card and json.loads((tmp_path / "toy" / "metrics.json").read_text()) == {}
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, object] = {}
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["reply"].words and 'case_fast.load("toy", lexicon="bundled")' in snippet


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made.run, tmp_path / "run")


def test_an_evaluation_of_other_weights_is_left_out_which_is_said(made, copy, tmp_path):
    model, _ = load_model(copy, "cpu")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    Run(copy).save_best(model)
    (copy / "evaluation" / "valid").mkdir()
    (copy / "evaluation" / "valid" / "metrics.json").write_text("{")
    found = publish(copy, tmp_path / "out")
    assert "the evaluation test, which is of other weights of this run: evaluate it again" in found.left_out
    assert [line for line in found.left_out if "valid/metrics.json: not the metrics of an evaluation" in line]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {}


def test_of_an_evaluation_of_an_earlier_version_it_is_said_what_it_did_not_note(copy, tmp_path):
    path = copy / "evaluation" / "test" / "metrics.json"
    metrics = json.loads(path.read_text())
    assert len(metrics["model"].pop("weights")) == 64
    path.write_text(json.dumps(metrics))
    publish(copy, tmp_path / "out")
    assert "did not note by a hash which weights of the run it was of" in (tmp_path / "out" / "README.md").read_text()


def test_a_store_that_is_gone_leaves_questions_in_the_card(made, copy, tmp_path):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["store"]["path"] = str(tmp_path / "gone")
    del manifest["result"], manifest["finished"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    publish(copy, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| GloVe | first word vectors, if any: the run's store is gone" in card and "license: cc-by-nc-4.0" in card
    assert "training had not ended" in card


def test_only_a_published_model_is_replaced(made, tmp_path, capsys):
    out = tmp_path / "out"
    publish(made.run, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    publish(made.run, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "mine.txt").touch()
    with pytest.raises(ConfigError, match="but mine.txt in it is no part of a published model"):
        publish(made.run, out)
    for other in (made.run, made.data, made.store.path):
        with pytest.raises(ConfigError, match="is there and is no published model"):
            publish(made.run, other)


def test_the_command_says_what_is_left_out_and_how_to_upload(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["publish", str(made.run), "--out", "my models/case toy"]) == 0
    said = capsys.readouterr().out
    assert "left out: the emotion intensities of 912 words" in said and "no upload" not in said
    assert said.rstrip().endswith("hf upload YOUR_NAME/'case toy' 'my models/case toy' .")
    assert CASE.from_pretrained(tmp_path / "my models" / "case toy").config.d_model == 16
