"""`case-fast bench --show`: what is stored is JSON alone, and everything it says comes out as tables and pictures."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from benchmarks import command, families, report
from case_fast import cli

STORED = sorted(command.RESULTS.glob("*/*.json"))
KERNELS = [path for path in STORED if path.stem in families()]


def shown(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["bench", *words]) == 0
    return capsys.readouterr().out


def named(path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_only_json_is_stored():
    assert {path.suffix for path in command.RESULTS.rglob("*") if path.is_file()} <= {".json"} and len(KERNELS) >= 6
    assert {path.stem for path in STORED} <= {*families(), *command.TELLS}
    assert all(json.loads(path.read_text())["benchmark"] == path.stem for path in KERNELS)


@pytest.mark.parametrize("path", KERNELS, ids=named)
def test_the_tables_hold_every_row_of_the_json(path, capsys):
    results = json.loads(path.read_text())
    text = shown(path.stem, "--show", "--machine", path.parent.name, capsys=capsys)
    parts = text.split("\n## ")
    assert len(parts) == 1 + len(results["cases"])
    for line in results["summary"]:
        assert f"| {line['case']} | {line['mode']} | {report._number(line['ours_ms'])} |" in parts[0]
        assert f"| **{line['ratio']:.1f}** | {line['best_peer']} |" in parts[0]
    for case, part in zip(results["cases"], parts[1:], strict=True):
        assert part.startswith(f"{case['name']}: {case['what']}\n")
        rows = [line for line in part.splitlines() if line.startswith("|") and "median, ms" not in line and "---" not in line]
        assert len(rows) == len(case["rows"])
        for row, line in zip(sorted(case["rows"], key=lambda row: case["modes"].index(row["mode"])), rows, strict=True):
            assert row["peer"] in line
            assert row.get("left_out", "") in line
            if "median_ms" in row:
                assert f" {row['threads']} | {report._number(row['median_ms'])}" in line


def test_golden_row_of_a_stored_table(capsys):
    text = shown("--show", "linear_cross_entropy", "--machine", "xeon", capsys=capsys)
    assert text.startswith("# linear_cross_entropy: case_fast and its peers\n")
    assert ("| 480x24000 | forward | 30.3 | 31.2 | **1.0** | one nll for both losses, torch.compile | 1.25 | 1.26 |"
            in text.splitlines())
    assert "| case_fast | 2 | 819 | 813 .. 829 |  | 8 |" in text.splitlines()
    assert "| topk of scores and logsumexp, eager |  | decodes |  |  |  |" in text.splitlines()


def test_without_a_name_every_stored_result_is_shown_in_short(capsys):
    text = shown("--show", capsys=capsys)
    assert text.count(": case_fast and its peers\n") == len(KERNELS) and "# Large in-batch negatives" in text
    assert "\n## " not in text
    assert shown("--show", "--machine", "epyc", capsys=capsys) in text


def test_what_large_batches_showed_is_said(capsys):
    text = shown("--show", "large_batches", capsys=capsys)
    results = json.loads((command.RESULTS / "epyc" / "large_batches.json").read_text())
    for run in results["runs"]:
        assert f"| {run['score']} | {run['batch']} | {run['steps']} |" in text
    assert "Eq. 9-12" in text and all(remark in text for remark in results["remarks"])


def test_tables_and_pictures_are_written_when_asked(tmp_path, capsys):
    text = shown("--show", "cross_attention", "--machine", "xeon", "--out", str(tmp_path), capsys=capsys)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == {
        "xeon/cross_attention.md", "xeon/cross_attention.png"}
    assert text.startswith((tmp_path / "xeon" / "cross_attention.md").read_text())
    with Image.open(tmp_path / "xeon" / "cross_attention.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").resize((60, 30)).tobytes())) > 5
    shown("--show", "--machine", "epyc", "--out", str(tmp_path / "all"), capsys=capsys)
    assert (tmp_path / "all" / "epyc" / "large_batches.png").is_file()
    assert "\n## " in (tmp_path / "all" / "epyc" / "bilinear_mim.md").read_text()  # whole, though shown in short


@pytest.mark.parametrize("words, said", [
    (["--show", "sorting"], "there are no results of 'sorting'; there are those of bilinear_mim, cross_attention, "),
    (["--show", "cross_attention", "--machine", "epyc"], "of cross_attention from the machine 'epyc'; there are those from xeon"),
    (["--show", "--machine", "abacus"], "there are no results from the machine 'abacus'; there are those from epyc, xeon"),
    (["--quick"], "bench needs a family of kernels to measure, or --show"),
])
def test_what_is_not_there_is_told_from_what_is(words, said, capsys):
    assert cli.main(["bench", *words]) == 1
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("damage", [
    lambda results: "{" + json.dumps(results),
    lambda results: "",
    lambda results: "[]",
    lambda results: json.dumps(results | {"cases": results["cases"][0]}),
    lambda results: json.dumps({name: value for name, value in results.items() if name != "environment"}),
    lambda results: json.dumps(results | {"cases": [results["cases"][0] | {"rows": [{"peer": "x", "mode": "forward"}]}]}),
], ids=["text", "empty", "list", "no list", "no environment", "no times"])
def test_damaged_results_are_refused_by_name(monkeypatch, tmp_path, capsys, damage):
    folder = tmp_path / "results" / "xeon"
    folder.mkdir(parents=True)
    shutil.copy(command.RESULTS / "xeon" / "graph_attention.json", folder)
    path = folder / "graph_attention.json"
    path.write_text(damage(json.loads(path.read_text())))
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    assert cli.main(["bench", "--show", "graph_attention", "--out", str(tmp_path / "out")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "graph_attention.json" in said.replace(" ", "") and "damaged" in said
    assert not (tmp_path / "out").exists()
