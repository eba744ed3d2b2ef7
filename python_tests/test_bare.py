"""A machine with torch, numpy, safetensors and huggingface_hub alone: what trains, and what says which package it lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from case_fast.data.travel import pack_store

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("rich", "nltk", "jsonargparse", "scipy", "sklearn", "matplotlib")  # not yaml: huggingface_hub brings it
WITHOUT = f"""
import sys

class Finder:
    def __init__(self, other):
        self.other = other

    def __getattr__(self, name):
        return getattr(self.other, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else self.other.find_spec(name, path, target)

sys.meta_path[:] = map(Finder, sys.meta_path)
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT + code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_packed_store_is_unpacked_trains_and_is_evaluated(sample_store, tmp_path):
    pack_store(sample_store, tmp_path / "sample.travel")
    done = run("""
from pathlib import Path
import case_fast, case_fast.evaluation, case_fast.ops, case_fast.serving
from case_fast.data.travel import unpack_store
from case_fast.generation import GenerationConfig, generate_all
from case_fast.runs import load_model
from case_fast.training import preset, train

folder = Path(sys.argv[1])
store, run = unpack_store(folder / "sample.travel", folder / "sample.store"), folder / "run"
train(store, run, preset("demo", phase1_steps=1, max_steps=2, validate_every=2, valid_limit=4, log_every=1, device="cpu"))
model, device = load_model(run, "cpu")
replies = lambda indices: generate_all(model, store, "test", indices, GenerationConfig(max_words=4), 4, device)
case_fast.evaluation.evaluate(model, store, "test", run / "evaluation" / "test", replies, limit=4)
""", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "done after 3 steps (max_steps)" in done.stdout, "progress as plain lines"
    evaluation = tmp_path / "run" / "evaluation" / "test"
    assert json.loads((evaluation / "metrics.json").read_text())["examples"] == 4
    assert len((evaluation / "predictions.jsonl").read_text().splitlines()) == 4
    assert not (evaluation / "confusion.png").exists()
    assert "needs matplotlib, which is not installed: pip install matplotlib. confusion.png is left out" in done.stderr
    assert "needs nltk, which is not installed: pip install nltk. Replies are written word by word" in done.stderr


def test_what_needs_an_absent_package_names_it():
    done = run("""
from case_fast.data.text import detokenize, is_word, tokenize
from case_fast.errors import ConfigError
from case_fast.evaluation.figures import Curve, curve_svg
from case_fast.knowledge import open_source

for call in (lambda: tokenize("a"), lambda: detokenize(["a"]), lambda: is_word("a"),
             lambda: curve_svg(Curve("", [1], [1.0]), "a"), lambda: open_source("bundled")):
    try:
        call()
    except ConfigError as error:
        print(type(error).__name__, error, isinstance(error, ImportError))
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"MissingPackage {what} needs {package}, which is not installed: pip install {package} True"
        for what, package in (
            ("cutting a text into words", "nltk"), ("writing words as a text", "nltk"),
            ("the list of stop words", "scikit-learn"), ("a curve of the report", "matplotlib"),
            ("retrieval from ATOMIC", "nltk"),
        )
    ]


def test_the_command_line_says_in_one_sentence_what_it_lacks():
    done = run("from case_fast.__main__ import main; sys.exit(main())")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the command line needs jsonargparse, which is not installed: pip install jsonargparse\n"
