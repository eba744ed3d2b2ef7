"""Every code block of README.md and docs/ runs, in a folder where what it names is there: small, but of the same kind.

A line of the shell runs as it stands, but for options that make it short (`SHORT`). One that cannot run here stands in `NOT_RUN`
with the reason, and is read by the parser that would read it; a block that neither runs nor has a reason fails.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import releases
import reply_files
import torch
from pages import PAGES, ROOT, Block, blocks

import case_fast
from case_fast import cli, ops
from case_fast.data import Store
from case_fast.models import DialogueModel
from case_fast.publishing import publish
from case_fast.training import NotFinite, loop, preset, profile, train
from case_fast.training.floors import Rates

SAMPLE = Path(case_fast.__file__).parent / "sample"

# The beginning of a line (behind its variables) -> why it does not run here, and where it does.
NOT_RUN = {
    "make ": "installs, builds or tests everything: CI runs lint, test and cpp-test, test_cli.py the demo",
    "python setup.py build_ext": "compiles for minutes; every installation does, and make bare in place",
    "build/cpp/": "a program that make cpp-test builds",
    "benchmarks/gpu.sh": "minutes on a machine with a GPU; test_benchmark_gpu.py rehearses its stages",
    "python -m benchmarks.gpu_training": "minutes on a machine with a GPU; test_gpu_training.py runs it on the CPU",
    "python -m benchmarks.step.processes": "four trainings, timed",
    "case-fast bench --show gpu": "no record of a GPU is there yet; test_benchmark_gpu.py shows one of its own",
    "torchrun ": "several processes of seconds each; test_processes.py starts torchrun",
    "accelerate launch": "several processes of seconds each; test_processes.py starts them by torchrun",
    "srun ": "needs Slurm",
    "first=$(scontrol": "needs Slurm",
}
# The beginning of a line -> what makes it short.
SHORT = {
    "case-fast prepare": "--limit 6",
    "case-fast train": "--phase1_steps 1 --max_steps 2 --validate_every 1 --min_steps 0 --valid_limit 4 --device cpu "
                       "--model.d_model 16 --model.ffn 16",
    "case-fast evaluate": "--limit 4 --max_words 4",
    "case-fast chat": "--max_words 4",
    "case-fast diagnose": "--batches 1",
    "case-fast table": "--dry_run",
    "case-fast profile": "--steps 1 --run ed.run",
    "case-fast debug": "--device cpu",
}
SMALL = {"d_model": 16, "ffn": 16}
INSTEAD = {"--checkpoint 4000": "--checkpoint 1",  # a step that a short run has
           "--bertscore_layer 17": "--bertscore_layer 2"}  # a layer that a tiny model has


def lines(block: Block) -> list[str]:
    """The commands of a block, each in one line."""
    if block.language == "sh":
        text = block.text.replace("\\\n", " ")
        return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]


BLOCKS = [block for page in PAGES for block in blocks(page)]
LINES = {line for block in BLOCKS if block.language in ("sh", "console") for line in lines(block)}


def of(line: str, table: dict[str, str]) -> str | None:
    """What a table has for a line."""
    bare = re.sub(r"^(\w+=[\w./-]+ )+", "", line)
    return next((value for start, value in table.items() if bare.startswith(start)), None)


@pytest.fixture(scope="module")
def found(sample_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that the pages name: data sets under the names of the real ones, stores, runs, a cache."""
    place = tmp_path_factory.mktemp("docs")
    for folder in ("demo", "docs", "MoEL", "data"):
        (place / folder).mkdir()
    for name in ("demo/sample.store", "sample.store", "ed.store"):
        shutil.copytree(sample_store.path, place / name)
    train(sample_store, place / "ed.run", preset("demo", model=SMALL, phase1_steps=1, max_steps=1, validate_every=1, min_steps=0,
                                                 valid_limit=2, checkpoint_every=1, device="cpu"))
    publish(place / "ed.run", place / "case-ed")
    for name in ("demo/run", "trs.run"):
        shutil.copytree(place / "ed.run", place / name)
    for name, source in (("empatheticdialogues", "dialogues"), ("atomic2020", "atomic"),
                         ("conceptnet-assertions-5.7.0.csv.gz", "conceptnet/assertions.csv"),
                         ("NRC-VAD-Lexicon.txt", "lexicon/lexicon.txt")):
        (place / name).symlink_to(SAMPLE / source)
        (place / "data" / name).symlink_to(SAMPLE / source)
    (place / "glove.6B.300d.txt").write_text(f"the {' '.join(['0.1'] * 16)}\n")
    (place / "dataset_preproc.p").write_bytes(releases.case_pickle())
    releases.write_arrays(place / "MoEL" / "empathetic-dialogue")
    for part in ("part1.sqlite", "part2.sqlite"):
        shutil.copy(f"{sample_store.path}.knowledge.sqlite", place / part)
    return place


@pytest.fixture
def place(found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as a block finds it, for the block to change."""
    monkeypatch.setattr(profile, "measure_rates", lambda device: Rates(1e11, 1e10))  # takes seconds
    return shutil.copytree(found, tmp_path / "docs", symlinks=True)


def comet(place: Path) -> None:
    pytest.importorskip("transformers", reason="transformers (an extra) is not installed")
    from tiny_comet import make_comet

    make_comet(place / "comet-atomic_2020_BART")


def dump(place: Path) -> None:
    """A run in which a word's embedding became NaN before step 25, as the page says."""
    store = case_fast.open_store(place / "sample.store")
    real, word = loop.Trainer.train_step, store.featurizer.vocabulary.ids["dog"]

    def train_step(self: loop.Trainer) -> None:
        if self.step == 24:
            with torch.no_grad():
                self.model.embedding.weight[word, 7] = torch.nan
        real(self)

    with pytest.MonkeyPatch.context() as patch, chdir(place), pytest.raises(NotFinite):
        patch.setattr(loop.Trainer, "train_step", train_step)
        train(case_fast.open_store("sample.store"), Path("run"),
              preset("demo", model=SMALL, phase1_steps=30, max_steps=1, checkpoint_every=20, device="cpu"))


def damage(place: Path) -> None:
    """A byte turned in a store's file, and in the newest checkpoint of a run."""
    newest = max((place / "demo" / "run" / "checkpoints").glob("0*"))
    for path in (place / "demo" / "sample.store" / "train.safetensors", newest / "model.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def replies(place: Path) -> None:
    """Files of replies of every form, and what the classifiers and BERTScore learn from or are."""
    for package in ("transformers", "sacrebleu", "rouge_score"):
        pytest.importorskip(package, reason=f"{package} (of the extra metrics) is not installed")
    for seed, run in enumerate(("ed.run", "trs.run", "transformer.run")):
        (place / run).mkdir(exist_ok=True)
        reply_files.predictions(place / run, seed)
    reply_files.kemp(place / "KEMP.txt")
    reply_files.moel(place / "generation_result.txt")
    reply_files.json_lines(place / "mine.jsonl", [{"context": ["Hi"], "reply": "Hello!"}])
    reply_files.epitome_data(place / "dataset")
    reply_files.intent_data(place / "datasets")
    (place / "roberta-large").mkdir()
    reply_files.tiny_bert(place / "roberta-large")


# What a block needs beside the folder, by words in it.
NEEDS = {"case-fast score": replies, "comet:comet": comet, "case-fast debug": dump, "fail checksums": damage}


# ---- the shell


def run(line: str, said: str = "") -> tuple[int, str]:
    """Carry out a line in this process: its status, and what it prints. ``said``: what it is told."""
    words = shlex.split(f"{line} {of(line, SHORT) or ''}", comments=False)
    output, target = io.StringIO(), None
    if ">" in words:
        target = words.pop(words.index(">") + 1)
        words.remove(">")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        patch.setattr(sys, "stdin", io.StringIO(said))
        if words[0] == "case-fast":
            if words[1] == "train" and "--out" in words and "--resume" not in words:  # in place of another run, or store
                shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
            elif words[1] == "unpack":
                shutil.rmtree(words[3], ignore_errors=True)
            status = _status(lambda: cli.main(words[1:]))
        elif words[0] == "python":
            patch.setattr(sys, "argv", words[1:])
            script = str(ROOT / words[1])
            status = _status(lambda: runpy.run_path(script, run_name="__main__"))
        else:
            raise AssertionError(f"no way to run {line!r}: it needs a line in NOT_RUN, with the reason")
    if target:
        Path(target).write_text(output.getvalue(), encoding="utf-8")
    return status, output.getvalue()


def _status(call: Callable[[], Any]) -> int:
    try:
        found = call()
    except SystemExit as ended:
        found = ended.code
    return found if isinstance(found, int) else 0


def read(line: str) -> None:
    """Have a line that is not run read by what would read it."""
    if "$(" in line:  # bash itself has read it
        return
    words, variables = shlex.split(line, comments=True), []
    while re.match(r"\w+=", words[0]):
        variables.append(words.pop(0).partition("=")[0])
    if words[0] == "srun":
        words.pop(0)
    if words[0] == "case-fast":
        parsed(words[1:])
    elif words[0] == "torchrun":
        from torch.distributed.run import parse_args

        launched(parse_args(words[1:]))
    elif words[0] == "accelerate":
        launch = pytest.importorskip("accelerate.commands.launch", reason="accelerate (an extra) is not installed")
        launched(launch.launch_command_parser().parse_args(words[2:]))
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[:2] == ["python", "-m"]:
        explained = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(explained), pytest.raises(SystemExit):
            given = [word for word in words[3:] if not word.startswith("-")][:1]  # a subcommand, if there are such
            patch.setattr(sys, "argv", [words[2], *(given if given and words[3] == given[0] else []), "--help"])
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        assert [word for word in words if word.startswith("--") and word not in explained.getvalue()] == []
    elif words[0].startswith("build/cpp/"):
        assert (ROOT / "csrc" / "tests" / f"{Path(words[0]).name}.cpp").is_file()
    else:
        program = ROOT / words[words[0] == "python"]
        assert program.is_file(), line
        assert [name for name in variables if name not in program.read_text(encoding="utf-8")] == []


def launched(given: Any) -> None:
    """What a launcher starts is our command line, and that reads the rest."""
    assert given.module and given.training_script == "case_fast"
    parsed(given.training_script_args)


def parsed(words: list[str]) -> None:
    name, *rest = words
    cli._parsed(cli._COMMANDS[name], name, [cli._underscored(word) for word in rest])


def labels(text: str) -> list[str]:
    """What begins the lines of an output, before two blanks; of doctor's checks the names, and once more with a bad state."""
    checks = re.findall(r"^  (ok  |skip|warn|fail) (\S+(?: \S+)*?)(?=  |$)", text, re.MULTILINE)
    found = [name for _, name in checks] + [f"{state} {name}" for state, name in checks if state in ("warn", "fail")]
    return found + re.findall(r"^(\S+(?: \S+)*?) {2,}(?!›)", text, re.MULTILINE)  # behind › stands what people say


def of_each(*languages: str) -> pytest.MarkDecorator:
    found = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", found, ids=lambda block: block.name)


@of_each("sh", "console")
def test_the_commands_of_a_block_run(block, place):
    if block.language == "sh":
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    commands = lines(block)
    assert commands, "a block of console begins with its command, after a $"
    for words, make in NEEDS.items():
        if words in block.text and any(of(line, NOT_RUN) is None for line in commands):
            make(place)
    with chdir(place):
        for line in commands:
            if of(line, NOT_RUN) is not None:
                read(line)
                continue
            for words, instead in INSTEAD.items():
                line = line.replace(words, instead)
            told = "".join(f"{said}\n" for said in re.findall(r"^you  › (.*)$", block.text, re.MULTILINE))
            status, printed = run(re.sub(r"\s#\s.*", "", line), told)
            failed = "  fail " in block.text
            assert status == int(failed), f"{line}\n{printed}"
            if block.language == "console":
                assert not set(labels(block.text)) - set(labels(printed)), printed


def test_every_block_is_of_a_kind_that_is_checked():
    assert not [block.name for block in BLOCKS if block.language not in ("sh", "console", "python")]
    assert len(BLOCKS) > 20


def test_every_reason_and_every_shortening_is_of_a_line():
    for table in (NOT_RUN, SHORT):
        assert [start for start, value in table.items() if not any(of(line, {start: value}) for line in LINES)] == []
    assert not [words for words in (*INSTEAD, *NEEDS) if not any(words in block.text for block in BLOCKS)]


# ---- Python


def tensors() -> dict[str, dict[str, Any]]:
    """What the calls of docs/kernels.md are given: n rows of two heads; each sequence is one row, so that all sizes agree."""
    n, h, d = 6, 2, 8
    torch.manual_seed(0)
    cu, rows, heads, square = torch.arange(n + 1), torch.randn(n, d), torch.randn(n, h, d), torch.randn(d, d)
    parts = torch.randn(h, d, d)
    norm = {"norm_weight": torch.ones(d), "norm_bias": torch.zeros(d)}
    loss = {"hidden": rows, "weight": torch.randn(9, d), "bias": torch.zeros(9), "target": cu[:n], "words": cu[:n], "cu": cu}
    return {
        "graph_attention": {"query": heads, "key": heads, "value": heads, "indptr": cu, "indices": cu[:n],
                            "relation": torch.zeros(n, dtype=torch.int64), "relation_query": torch.randn(1, h, d),
                            "relation_key": torch.randn(1, h, d)},
        "packed_attention": {"query": heads, "key": heads, "value": heads, "cu": cu},
        "pooled_attention": {"query": heads, "rows": rows, "cu": cu, "scale": 0.5},
        "bilinear_mim": {"x": rows, "y": rows, "weight": square, "positive": cu[:n], "step": 3, "sizes": torch.tensor([n, n])},
        "linear_cross_entropy": loss,
        "top_words": loss,
        "linear": {"x": rows, "weight": torch.randn(3, d), "bias": torch.zeros(3), "query_weight": square, "key_weight": square,
                   "value_weight": square},
        "linear(x, weight.transpose(1, 2))": {"x": torch.randn(n, h, d), "weight": torch.randn(d, h, 3).transpose(0, 1)},
        "segment_sum": {"x": rows, "segment": cu[:n], "size": n},
        "take": {"segment": cu[:n]},
        "residual_norm": {"x": rows, "update": rows, "weight": norm["norm_weight"], "bias": norm["norm_bias"], "step": 3},
        "residual": {"x": rows, "update": rows, "step": 3},
        "Source": {"key": heads, "value": heads, "cu_keys": cu, "cu_hidden": cu, "hidden": rows, **norm,
                   "query_weight": torch.randn(h * d, d), "output_weight": torch.randn(d, h * d)},
        "RowSource": {"rows": rows, "key_weight": parts, "value_weight": parts},
    }


def run_ops(block: Block) -> None:
    """Statement by statement: names such as query stand for other shapes from op to op."""
    given, names = tensors(), {}
    for statement in ast.parse(block.text).body:
        source = ast.unparse(statement)
        called = [node.func.id for node in ast.walk(statement) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        for what in [*called, *(exact for exact in given if exact.endswith(f"= {source}") or source.endswith(exact))]:
            names |= {name: value for name, value in given.get(what, {}).items()}
        exec(compile(source, block.name, "exec"), names)
        assert isinstance(statement, ast.ImportFrom) or called and hasattr(ops, called[0])


def matches(block: Block) -> None:
    """The contract as it is written down is that of the class: each name is there, each method takes what is written."""
    (written,) = ast.parse(block.text).body
    real = {"DialogueModel": DialogueModel}[written.name]
    for node in written.body:
        if isinstance(node, ast.FunctionDef):
            assert [argument.arg for argument in node.args.args] == list(inspect.signature(getattr(real, node.name)).parameters)
        else:
            name = node.target.id if isinstance(node, ast.AnnAssign) else node.targets[0].id
            assert hasattr(real, name) or name in inspect.get_annotations(real), name


@of_each("python")
def test_the_python_of_a_block_runs(block, place, sample_store):
    if block.text.startswith("from case_fast.ops import"):
        return run_ops(block)
    if block.text.startswith("class "):
        return matches(block)
    torch.manual_seed(0)
    model = case_fast.CASE(case_fast.CASEConfig(vocab_size=len(sample_store.featurizer.vocabulary), **SMALL))
    names = {"store": sample_store, "model": model, "needs": model.needs, "indices": range(4), "device": "cpu",
             "optimizer": torch.optim.Adam(model.parameters())}
    with chdir(place):
        exec(compile(block.text, block.name, "exec"), names)
    if block.page.name == "README.md":
        assert names["reply"].text and torch.isfinite(names["output"].loss)
        assert (place / "weights" / "model.safetensors").is_file()
