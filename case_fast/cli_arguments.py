"""The arguments of each command of the command line."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from case_fast.errors import ConfigError


def prepare(parser: ArgumentParser) -> None:
    from case_fast.data.prepare import PrepareSettings

    parser.add_argument("--knowledge", type=str, required=True, help="source of inferences: atomic:PATH, comet:DIR or bundled")
    parser.add_class_arguments(PrepareSettings, skip={"knowledge"})


def import_release(parser: ArgumentParser) -> None:
    from case_fast.data.prepare import PrepareSettings

    parser.add_argument("source", type=str,
                        help="dataset_preproc.p, or the folder with it or with sys_dialog_texts.train.npy and so on")
    parser.add_argument("--check", type=bool, default=False, nargs="?", const=True,
                        help="read it, say what is there, write nothing")
    # not required of --check
    for name, what in (("out", "folder of the new store"), ("conceptnet", "ConceptNet assertions, or 'bundled'"),
                       ("lexicon", "NRC-VAD text file, or 'bundled'"),
                       ("knowledge", "atomic:PATH, comet:DIR or bundled, for texts without inferences in the file; else these "
                        "have none")):
        parser.add_argument(f"--{name}", type=str | None, default=None, help=what)
    parser.add_class_arguments(PrepareSettings, skip={"dialogues", "limit", "out", "conceptnet", "lexicon", "knowledge"})


def inspect(parser: ArgumentParser) -> None:
    parser.add_argument("store", type=str, help="folder that prepare made")
    parser.add_argument("--split", type=str, default="train", help="train, valid or test")
    parser.add_argument("--index", type=int, default=0, help="example, from 0")
    parser.add_argument("--json", type=bool, default=False, nargs="?", const=True, help="print JSON")


def pack(parser: ArgumentParser) -> None:
    parser.add_argument("store", type=str, help="folder that prepare made")
    parser.add_argument("out", type=str, help="file to write, such as ed.travel")


def unpack(parser: ArgumentParser) -> None:
    parser.add_argument("file", type=str, help="file that pack made")
    parser.add_argument("out", type=str, help="folder to make, such as ed.store")


def floors(parser: ArgumentParser) -> None:
    parser.add_argument("store", type=str, help="folder that prepare made")
    parser.add_argument("--split", type=str, default="test", help="train, valid or test")
    parser.add_argument("--json", type=str | None, default=None, help="file to write them to as well")


def table(parser: ArgumentParser) -> None:
    parser.add_argument("number", type=int, help="1: every model; 2: CASE and its ablations")
    parser.add_argument("--data", type=str, required=True, help="store that prepare made")
    parser.add_argument("--out", type=str, required=True, help="folder of the table; its runs are in OUT/runs")
    parser.add_argument("--seeds", type=int, default=1, help="so many seeds, from 0")
    parser.add_argument("--models", type=str, default="", help="of table 1 only these, parted by commas; CASE is always there")
    parser.add_argument("--recipe", type=str, default="", help="presets, parted by commas, a row for each that a model has "
                        "(released, frame); default: each model's first")
    parser.add_argument("--runs", type=str, default="", help="runs elsewhere, or folders of such, parted by commas: used where "
                        "their settings and store are those of a row")
    parser.add_argument("--max_steps", type=int | None, default=None, help="most steps of the last phase, the same for all")
    parser.add_argument("--cooldown", type=int, default=0, help="as of train, the same for all")
    parser.add_argument("--matmul_precision", type=str, default="highest", help="as of train, the same for all")
    parser.add_argument("--settings", type=str | None, default=None, help="YAML or JSON file of further settings, for all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dry_run", type=bool, default=False, nargs="?", const=True,
                        help="say what is finished and how long the rest takes, and do nothing")


def train(parser: ArgumentParser, kind: str = "case") -> None:
    from case_fast.models import MODELS, model_class
    from case_fast.training import config_class

    presets = model_class(kind).presets
    parser.add_argument("--config", action="config", help="YAML or JSON file of settings")
    parser.add_argument("--data", type=str, required=True, help="store that prepare made")
    parser.add_argument("--out", type=str, required=True, help="folder of the run")
    parser.add_argument("--kind", type=str, default=kind, help=argparse.SUPPRESS)  # as the config.json of a run has it
    parser.add_argument("--preset", type=str, default=next(iter(presets)), help=f"settings to start from: {', '.join(presets)}")
    parser.add_argument("--resume", type=bool | Literal["auto"], default=False, nargs="?", const=True,
                        help="go on with the run at --out; auto: if there is one, else begin it")
    parser.add_class_arguments(config_class(kind))
    (model,) = [action for action in parser._actions if action.option_strings == ["--model"]]
    model.metavar, model.help = "NAME", f"which model: {', '.join(MODELS)}; here follow the settings of {kind}"


def evaluate(parser: ArgumentParser) -> None:
    from case_fast.devices import DEVICES
    from case_fast.generation import GenerationConfig

    parser.add_argument("run", type=str, help="folder that train made")
    parser.add_argument("--data", type=str, required=True, help="store that prepare made")
    parser.add_argument("--split", type=str, default="test", help="train, valid or test")
    parser.add_argument("--limit", type=int | None, default=None, help="only the first so many examples")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", type=str, default="auto", help=DEVICES)
    parser.add_class_arguments(GenerationConfig)


def score(parser: ArgumentParser) -> None:
    from case_fast.evaluation.score_command import ScoreSettings

    parser.add_argument("predictions", type=str, nargs="+", metavar="PREDICTIONS",
                        help="files of replies, runs or their evaluations, as [NAME=]PATH[#FIELD]; the others are compared with "
                        "the first")
    parser.add_class_arguments(ScoreSettings)


def diagnose(parser: ArgumentParser) -> None:
    from case_fast.devices import DEVICES

    parser.add_argument("run", type=str, help="folder that train made")
    parser.add_argument("--data", type=str, required=True, help="store that prepare made")
    parser.add_argument("--split", type=str, default="valid", help="train, valid or test")
    parser.add_argument("--batches", type=int, default=16, help="of 16 dialogues, no two of one conversation")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, or the step of one of the run's checkpoints")
    parser.add_argument("--device", type=str, default="auto", help=DEVICES)
    parser.add_argument("--out", type=str | None, default=None, help="folder for JSON and picture; default RUN/diagnosis/SPLIT")
    parser.add_argument("--json", type=bool, default=False, nargs="?", const=True, help="print JSON in place of the table")


def debug(parser: ArgumentParser) -> None:
    from case_fast.devices import DEVICES

    parser.add_argument("dump", type=str, help="RUN/failure/step-STEP.json, which training wrote")
    parser.add_argument("--data", type=str | None, default=None, help="store of the run; default: where it was then")
    parser.add_argument("--device", type=str, default="auto", help=DEVICES)
    parser.add_argument("--forward", type=int, default=500, help="steps to train again at most, where the dump has no "
                        "weights and the checkpoint is of an earlier step")
    parser.add_argument("--json", action="store_true", help="print JSON")


def doctor(parser: ArgumentParser) -> None:
    parser.add_argument("paths", type=str, nargs="*", default=[], metavar="PATH", help="data sets, stores and runs, in any order")
    parser.add_argument("--for", type=Literal["prepare", "train", "evaluate", "chat"] | None, default=None, metavar="COMMAND",
                        help="look at what this needs: prepare, train, evaluate or chat; default: what the paths lead to")
    # these take no value: the word behind them is a path
    parser.add_argument("--json", action="store_true", help="print JSON, to paste into an issue")
    parser.add_argument("--full", action="store_true", help="with --json: leave home folder, user and host in it")


def chat(parser: ArgumentParser) -> None:
    from case_fast.devices import DEVICES
    from case_fast.generation import GenerationConfig

    parser.add_argument("run", type=str, help="folder that train made")
    parser.add_argument("--knowledge", type=str | None, default=None,
                        help="atomic:PATH, comet:DIR or bundled; default: what the store was prepared with")
    parser.add_argument("--device", type=str, default="auto", help=DEVICES)
    parser.add_argument("--why", type=bool, default=True, nargs="?", const=True, help="show emotion, inferences and concepts")
    parser.add_class_arguments(GenerationConfig)


def report(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="folder that train made")
    parser.add_argument("--out", type=str | None, default=None, help="file; default RUN/report.html")


def merge_cache(parser: ArgumentParser) -> None:
    parser.add_argument("into", type=str, help="SQLite cache that grows; made if missing")
    parser.add_argument("caches", type=str, nargs="+", help="caches to read")


def demo(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default="demo", help="folder for store, run and report")


def profile(parser: ArgumentParser) -> None:
    from case_fast.devices import DEVICES

    parser.add_argument("--store", type=str, required=True, help="store that prepare made")
    parser.add_argument("--run", type=str | None, default=None, help="run whose settings and weights to use; default: CASE's own")
    parser.add_argument("--steps", type=int, default=5, help="training steps to record of each phase")
    parser.add_argument("--out", type=str, default="profile",
                        help="folder for PHASE.png and PHASE.trace.json.gz, which ui.perfetto.dev opens")
    parser.add_argument("--device", type=str, default="auto", help=DEVICES)


def benchmarks() -> Any:
    """benchmarks/ of the checkout that this package lies in; it is not installed with the package."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "command.py").is_file():
        raise ConfigError("the benchmarks are not installed with the package: clone the repository of case_fast, run "
                          "pip install -e '.[bench]' in it, and case-fast bench measures there")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return import_module("benchmarks")


def bench(parser: ArgumentParser) -> None:
    families = ", ".join(benchmarks().families())
    parser.add_argument("family", type=str, nargs="?", default="", help=f"kernels to measure: {families}; or step, decode")
    parser.add_argument("--store", type=str | None, default=None, help="step, decode: store that prepare made")
    parser.add_argument("--run", type=str | None, default=None, help="decode: folder that train made")
    parser.add_argument("--show", type=str | None, default=None, nargs="?", const="",
                        help="measure nothing; print what was measured before, of this family, all, or gpu (benchmarks/gpu.sh)")
    parser.add_argument("--machine", type=str, default="", help="show only what was measured there, such as xeon")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--sizes", type=str, default="", help="cases, such as paper,1e4; a wrong one is told which there are")
    parser.add_argument("--quick", type=bool, default=False, nargs="?", const=True, help="whether all works, not how fast it is")
    parser.add_argument("--budget", type=float | None, default=None, help="seconds that all samples of a case and mode may take, "
                        "at least five of each peer, default 30; step: seconds of steps of each form and point, default 3")
    parser.add_argument("--out", type=str | None, default=None,
                        help="folder for JSON, Markdown table and picture; default bench, and none with --show")
