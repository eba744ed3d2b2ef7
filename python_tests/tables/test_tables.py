"""Tables: which runs they ask for, which they use, what they say, and the four files."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from case_fast import cli
from case_fast.data.store import Store
from case_fast.errors import CheckpointError, ConfigError, Interrupted
from case_fast.models import MODELS
from case_fast.runs import Run
from case_fast.tables import plan, rows_of, table_of, write_table
from case_fast.tables.numbers import METRICS, floors_of
from case_fast.tables.plan import Planned, Row, carry_out, digest
from case_fast.tables.write import latex, markdown
from case_fast.training import preset, train

SMALL = {"model": {"d_model": 16, "ffn": 16}, "max_steps": 2, "validate_every": 2, "valid_limit": 8, "min_steps": 0,
         "log_every": 1, "device": "cpu"}


def test_table_1_has_every_model_and_table_2_every_ablation():
    assert [row.kind for row in rows_of(1)] == [kind for kind in MODELS if kind != "case"] + ["case"]
    assert [(row.kind, row.recipe) for row in rows_of(1, ["released", "frame"], ["cem"])] == [
        ("cem", "released"), ("cem", "frame"), ("case", "paper"),
    ]
    assert [row.name for row in rows_of(1) if row.kind in ("empdg", "empdg-d")] == ["EmpDG", "EmpDG + discriminators"]
    names = [row.name for row in rows_of(2)]
    assert names[0] == "CASE" and "w/o Align" in names and len(names) == 7
    for given, words in ((3, "tables 1 and 2, not 3"),):
        with pytest.raises(ConfigError, match=words):
            rows_of(given)
    with pytest.raises(ConfigError, match="no model gpt"):
        rows_of(1, models=["gpt"])
    with pytest.raises(ConfigError, match="no model has the recipe huge"):
        rows_of(1, ["huge"])


def test_a_digest_changes_with_what_decides_the_numbers_alone():
    config = preset("", "cem").resolved(50).as_dict()
    own = digest(config, "a")
    assert len(own) == 10 and own != digest(config, "b")
    for name, value in (("seed", 1), ("max_steps", 5), ("matmul_precision", "medium"), ("warmup", 3)):
        assert digest(config | {name: value}, "a") != own, name
    for name, value in (("device", "cuda"), ("log_every", 7), ("checkpoint_every", 9), ("workers", 2)):
        assert digest(config | {name: value}, "a") == own, name


@pytest.fixture(scope="module")
def made(sample_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small table 1 of two seeds. All runs but the last are there, the first not evaluated; the command makes
    what is missing, in processes of its own, and the table."""
    folder, data = tmp_path_factory.mktemp("table"), str(sample_store.path)
    settings = folder / "settings.json"
    settings.write_text(json.dumps({key: value for key, value in SMALL.items() if key != "max_steps"} | {"phase1_steps": 1}))
    first, *others, _ = small_plan(sample_store, folder / "out")
    for item in (first, *others):
        train(sample_store, item.folder, item.config, Console(file=io.StringIO()))
    for item in others:
        assert cli.main(["evaluate", str(item.folder), "--data", data]) == 0
    words = ["table", "1", "--data", data, "--out", str(folder / "out"), "--models", "transformer,cem",
             "--seeds", "2", "--settings", str(settings), "--max_steps", "2", "--device", "cpu", "--jobs", "2"]
    assert cli.main(words) == 0
    return folder / "out"


def small_plan(store: Store, out: Path, seeds: int = 2, runs: tuple[Path, ...] = ()) -> list[Planned]:
    changes = SMALL | {"phase1_steps": 1, "matmul_precision": "highest"}
    return plan(rows_of(1, models=["transformer", "cem"]), range(seeds), store, out, changes, runs)


@pytest.mark.slow
def test_the_command_trains_what_is_missing_and_writes_the_table(made, sample_store, capsys):
    table = json.loads((made / "table1.json").read_text())
    assert [line["row"]["kind"] for line in table["lines"]] == ["transformer", "cem", "case"] and not table["left_out"]
    for line in table["lines"]:
        assert line["seeds"] == [0, 1] and len(line["steps"]) == 2
        assert line["cells"].keys() == METRICS.keys() - ({"acc_1"} if line["row"]["kind"] == "transformer" else set())
        for cell in line["cells"].values():
            assert cell["over"]["low"] <= cell["over"]["mean"] <= cell["over"]["high"] and len(cell["values"]) == 2
            assert (cell["difference"] is None) == (line["row"]["kind"] == "case")
    assert table["floors"].keys() == {"bigram model", "TF-IDF, logistic regression"} and table["methods"]["several"] == "Holm"
    text = (made / "table1.md").read_text()
    assert "| CASE | 2 | 3 |" in text and "*bigram model*" in text and "ublished" not in text  # toy dialogues
    assert (made / "table1.png").read_bytes()[:4] == b"\x89PNG"

    files = {path: path.stat().st_mtime_ns for path in (made / "runs").rglob("*") if path.is_file()}
    planned = small_plan(sample_store, made)
    assert [item.state for item in planned] == ["finished"] * 6 and all(item.seconds == 0 for item in planned)
    again = table_of(1, planned, floors_of(sample_store, made))
    write_table(again, made / "again")
    assert (made / "again" / "table1.json").read_text() == (made / "table1.json").read_text()
    assert files == {path: path.stat().st_mtime_ns for path in (made / "runs").rglob("*") if path.is_file()}
    assert len(small_plan(sample_store, made, seeds=3)) == 9 and small_plan(sample_store, made, seeds=3)[2].state == "new"
    assert small_plan(sample_store, made, seeds=3)[2].seconds is not None  # by the speed of the other seeds


@pytest.mark.slow
def test_runs_elsewhere_are_used_and_what_is_begun_is_said(made, sample_store, tmp_path):
    own = small_plan(sample_store, made)[0].folder
    shutil.copytree(own, tmp_path / "mine")
    found = small_plan(sample_store, tmp_path / "other", runs=(tmp_path,))
    assert found[0].folder == tmp_path / "mine" and found[0].state == "finished" and found[1].state == "new"
    run = Run(tmp_path / "mine")
    (run.evaluation("test") / "metrics.json").unlink()
    assert small_plan(sample_store, tmp_path / "other", runs=(tmp_path / "mine",))[0].state == "evaluate"
    manifest = json.loads(run.manifest.read_text())
    run.manifest.write_text(json.dumps({name: value for name, value in manifest.items() if name != "result"}))
    item = small_plan(sample_store, tmp_path / "other", runs=(tmp_path / "mine",))[0]
    assert (item.state, item.about) == ("begun", "begun, 2 steps done")


@pytest.mark.slow
def test_runs_that_were_not_measured_alike_are_refused(made, sample_store, tmp_path):
    planned = small_plan(sample_store, made)
    shutil.copytree(planned[2].folder, tmp_path / "copy")
    planned[2].folder = tmp_path / "copy"
    path = Run(tmp_path / "copy").evaluation("test") / "metrics.json"
    whole = path.read_text()
    path.write_text(whole.replace("vocabulary=1397", "vocabulary=1398"))
    with pytest.raises(ConfigError, match="were not measured alike: .*vocabulary=1397.* and .*vocabulary=1398"):
        table_of(1, planned)
    found = json.loads(whole)
    path.write_text(json.dumps(found | {"store": found["store"] | {"fingerprint": "other"}}))
    with pytest.raises(ConfigError, match="were evaluated on different stores"):
        table_of(1, planned)
    path.write_text(whole)
    predictions = path.with_name("predictions.jsonl")
    predictions.write_text(predictions.read_text()[:500])
    with pytest.raises(CheckpointError, match="examples can be read"):
        table_of(1, planned)
    with pytest.raises(ConfigError, match="no run of this table is finished"):
        table_of(1, small_plan(sample_store, tmp_path / "empty"))


@pytest.mark.slow
def test_a_system_does_not_differ_from_itself_and_a_planted_gain_is_marked(made, sample_store, tmp_path):
    (case,) = [item for item in small_plan(sample_store, made, seeds=1) if item.row.kind == "case"]
    shutil.copytree(case.folder, tmp_path / "twin")
    twin = Planned(Row("case", "paper", "w/o Align"), 0, case.config, tmp_path / "twin", "finished")
    table = table_of(2, [case, twin], draws=400)
    table.lines[0].published = {"ppl_geometric": 35.37, "dist_1": 0.74}
    assert "35.37, 0.740, -, - |" in markdown(table) and "other vocabulary" not in markdown(table).split("\n\n")[1]
    assert r"{\scriptsize(35.37)}" in latex(table) and "another vocabulary" in markdown(table)
    for cell in table.lines[1].cells.values():
        assert cell.difference.value == 0 and cell.difference.p == 1 and cell.adjusted == 1 and cell.welch is None
    assert "One seed: no interval." in markdown(table) and "†" not in markdown(table).split("\n\n")[1]

    evaluation = Run(twin.folder).evaluation("test")
    lines = [json.loads(line) for line in (evaluation / "predictions.jsonl").read_text().splitlines()]
    for place, line in enumerate(lines):
        line["nll"] -= 0.5 * line["tokens"]
        line["words"] = [*line["words"], f"word{place}"]
    (evaluation / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = table_of(2, [case, twin], draws=400)
    cells = table.lines[1].cells
    assert cells["ppl_geometric"].difference.value == pytest.approx(-0.5) and cells["ppl_geometric"].adjusted < 0.01
    assert cells["dist_1"].difference.value > 0 and cells["dist_1"].adjusted < 0.01 and cells["acc_1"].adjusted == 1
    assert "‡" in markdown(table).split("\n\n")[1] and r"$^{\ddagger}$" in latex(table)


@pytest.mark.slow
def test_latex_is_balanced(made, sample_store):
    text = latex(table_of(1, small_plan(sample_store, made), floors_of(sample_store, made), draws=100))
    assert text.count("{") == text.count("}") and text.count(r"\begin") == text.count(r"\end") == 2
    rows = text.split(r"\midrule")[1].strip().splitlines()
    assert len(rows) == 3 and all(row.endswith(r"\\") and row.count(" & ") == 4 for row in rows)
    assert np.count_nonzero([r"\textbf" in row for row in rows]) >= 1


def test_a_dry_run_says_what_there_is_and_does_nothing(sample_store, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["table", "2", "--data", str(sample_store.path), "--out", str(out), "--dry_run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "w/o Align (paper), seed 0: new" in shown and "0 of 7 runs finished" in shown
    assert "7 runs whose speed is not known" in shown
    assert not out.exists()
    for words, said in ((["--seeds", "0"], "at least 1"),
                        (["--settings", str(tmp_path / "no.yaml")], "no.yaml: file of settings not found"),
                        (["--runs", f"{tmp_path},{tmp_path / 'no'}"], f"there is no folder {tmp_path / 'no'}. Name runs")):
        assert cli.main(["table", "2", "--data", str(sample_store.path), "--out", str(out), *words]) == 1
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_the_runs_too(sample_store, tmp_path, monkeypatch, name):
    begun = []

    def begin(*_: object) -> subprocess.Popen[bytes]:
        begun.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True))
        return begun[-1]

    monkeypatch.setitem(carry_out.__globals__, "_begin", begin)
    planned = plan(rows_of(2), [0], sample_store, tmp_path)
    with pytest.raises(Interrupted, match=f"stopped by {name}; each run has its checkpoint"):
        carry_out(planned, sample_store, "cpu", 1, lambda *_: signal.raise_signal(signal.Signals[name]))
    assert len(begun) == 1 and begun[0].returncode == -signal.SIGTERM


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_go_on(made, sample_store, tmp_path, capsys):
    shutil.copytree(made, tmp_path / "out")
    (folder,) = (tmp_path / "out" / "runs").glob("cem-*-s0-*[!.jsonlog]")
    shutil.rmtree(folder)
    folder.write_text("in the way")
    settings = made.parent / "settings.json"
    words = ["table", "1", "--data", str(sample_store.path), "--out", str(tmp_path / "out"), "--models", "cem", "--settings",
             str(settings), "--max_steps", "2", "--device", "cpu"]
    assert cli.main(words) == 0
    table = json.loads((tmp_path / "out" / "table1.json").read_text())
    assert [line["row"]["kind"] for line in table["lines"]] == ["case"] and len(table["left_out"]) == 1
    assert "CEM (released), seed 0: " in table["left_out"][0]
