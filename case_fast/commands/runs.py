"""Commands about runs: training, tables, evaluation, and what is wrong with one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from case_fast.commands import Command, fields, print_paths
from case_fast.errors import ConfigError
from case_fast.files import plain, require_folder_place
from case_fast.terminal import Terminal, bar, print_json
from case_fast.text_files import reading, require_file


def _train_arguments(parser: ArgumentParser, kind: str = "case") -> None:
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


def _train_left(parser: ArgumentParser, words: list[str]) -> list[str]:
    """Add the arguments of the model and preset that the words name; the words that are left to parse."""
    from case_fast.models import model_class
    from case_fast.training import TrainConfig, preset_values

    kind, preset, left = _chosen(words)
    values = preset_values(preset, kind)
    _train_arguments(parser, kind)
    config = TrainConfig.from_dict(values)
    phases = dict(zip(model_class(kind).phases, config.lengths(1), strict=True))
    which = "the last phase" if config.open_phase == [*phases][-1] else f"the phase {config.open_phase}"
    fewest = config.fewest(phases[config.open_phase])
    parser.description = f"{parser.description} With this preset {which} takes {fewest:,} steps at least (early stopping)."
    parser.set_defaults(values | {"preset": preset or parser.get_default("preset")})
    return left


def _train(args: Namespace, console: Terminal) -> None:
    from case_fast.data import open_store
    from case_fast.training import TrainConfig, train

    train(open_store(args.data), Path(args.out), TrainConfig(**fields(args, TrainConfig)), console=console, resume=args.resume)
    console.say(f"\nNext: case-fast evaluate {args.out} --data {args.data} --split test\n      case-fast chat {args.out}")


def _chosen(words: Sequence[str]) -> tuple[str, str, list[str]]:
    """The model and the preset that the words of `train` or its files of settings name, which decide what other settings there
    are and their defaults; and the other words, for the parser: a bare --model would be a file of settings to it."""
    from case_fast.models import model_class

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--model", "--kind")
    finder.add_argument("--preset")
    found, rest = finder.parse_known_args(words)
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", action="append", default=[])
    read = {path: values for path in files.parse_known_args(rest)[0].config if (values := _settings(path)) is not None}
    kind = found.model or next((values["kind"] for values in read.values() if "kind" in values), "case")
    preset = found.preset or next((values["preset"] for values in read.values() if "preset" in values), "")
    retired = model_class(kind).Config.retired
    for path, values in read.items():
        model = values.get("model")
        if isinstance(model, dict):  # of a run of an earlier version
            values["model"] = {name: value for name, value in model.items() if name not in retired}
        kept = {name: value for name, value in values.items() if name not in ("kind", "preset")}
        if kept != _settings(path):  # the parser takes the text of a file as well as its path
            rest = [word.replace(path, json.dumps(kept)) if word in (path, f"--config={path}") else word for word in rest]
    return kind, str(preset), ["--kind", kind, *rest]


def _settings(path: str | Path) -> dict[str, Any] | None:
    """The settings in a file, the model's name as "kind"; None where there are none: the parser says what is wrong with it."""
    if not os.path.isfile(path):
        return None
    with reading(path, "file of settings"):
        content = Path(path).read_bytes()
    try:
        values = yaml.safe_load(content.decode())
    except (ValueError, yaml.YAMLError):
        return None
    if not isinstance(values, dict):
        return None
    if isinstance(values.get("model"), str):
        values["kind"] = values.pop("model")
    return values


def _table_arguments(parser: ArgumentParser) -> None:
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


def _table(args: Namespace, console: Terminal) -> None:
    from case_fast import tables
    from case_fast.data import open_store
    from case_fast.devices import resolve_device
    from case_fast.tables.plan import carry_out

    if args.seeds < 1 or args.jobs < 1:
        raise ConfigError(f"seeds and jobs must be at least 1, not {args.seeds} and {args.jobs}")
    resolve_device(args.device)
    store, out = open_store(args.data), Path(args.out)
    changes = _settings(require_file(args.settings, "file of settings")) if args.settings else {}
    if changes is None:
        raise ConfigError(f"{args.settings} is no YAML or JSON file of settings")
    given = {"max_steps": args.max_steps, "cooldown": args.cooldown or None}
    changes |= {name: value for name, value in given.items() if value is not None}
    changes["matmul_precision"] = args.matmul_precision
    rows = tables.rows_of(args.number, _listed(args.recipe), _listed(args.models))
    planned = tables.plan(rows, range(args.seeds), store, out, changes, [Path(run) for run in _listed(args.runs)])
    for item in planned:
        left = f", about {item.seconds / 60:.0f} min of training left" if item.seconds else ""
        console.say(f"{item.row.name} ({item.row.recipe}), seed {item.seed}: {item.about or 'new'}{left}")
    unknown, hours = sum(item.seconds is None for item in planned), sum(item.seconds or 0 for item in planned) / 3600
    more = f", and {unknown} runs whose speed is not known" if unknown else ""
    console.say(f"{sum(item.state == 'finished' for item in planned)} of {len(planned)} runs finished; training takes about "
                f"{hours:.1f} h more with one job{more}")
    if args.dry_run:
        return
    require_folder_place(out)

    def told(item: Any, what: str) -> None:
        console.say(f"{time.strftime('%H:%M')} {item.folder.name}: {what}")

    carry_out(planned, store, args.device, args.jobs, told)
    found = tables.table_of(args.number, planned, tables.floors_of(store, out))
    paths = tables.write_table(found, out)
    console.say(paths[0].read_text(encoding="utf-8"))
    print_paths(paths, console)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _evaluate_arguments(parser: ArgumentParser) -> None:
    from case_fast.devices import DEVICES
    from case_fast.generation import GenerationConfig

    parser.add_argument("run", type=str, help="folder that train made")
    parser.add_argument("--data", type=str, required=True, help="store that prepare made")
    parser.add_argument("--split", type=str, default="test", help="train, valid or test")
    parser.add_argument("--limit", type=int | None, default=None, help="only the first so many examples")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", type=str, default="auto", help=DEVICES)
    parser.add_argument("--out", type=str | None, default=None, help="folder; default RUN/evaluation/SPLIT")
    parser.add_class_arguments(GenerationConfig)


def _evaluate(args: Namespace, console: Terminal) -> None:
    from case_fast.generation import GenerationConfig

    run_evaluation(args.run, args.data, args.split, args.limit, args.batch_size, args.device,
                   GenerationConfig(**fields(args, GenerationConfig)), console, args.out)


def run_evaluation(run: str, data: str, split: str, limit: int | None, batch_size: int, device: str, generation: Any,
                   console: Console, out: str | None = None) -> Any:
    """Measure a run on a split and write ``out``; None: RUN/evaluation/SPLIT, or SPLIT-STRATEGY where it is not greedy."""
    from case_fast.data import open_store
    from case_fast.evaluation import evaluate
    from case_fast.generation import generate_all
    from case_fast.runs import Run, load_model

    store = open_store(data)
    model, chosen = load_model(run, device)
    with bar(console) as progress:
        task = progress.add_task(f"Evaluating {split}", total=None)

        def told(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        def replies(indices: Sequence[int]) -> list[Any]:
            total = len(indices)  # the references are the first half of the work, the replies the second
            halfway = lambda done, _: told(total + done, 2 * total)  # noqa: E731
            return generate_all(model, store, split, indices, generation, batch_size, chosen, halfway)

        place = out or Run(run).evaluation(split, generation.strategy)
        return evaluate(model, store, split, place, replies, limit=limit, batch_size=batch_size,
                        device=chosen, console=console, progress=told, settings=dataclasses.asdict(generation))


def _score_arguments(parser: ArgumentParser) -> None:
    from case_fast.evaluation.score_command import ScoreSettings

    parser.add_argument("predictions", type=str, nargs="+", metavar="PREDICTIONS",
                        help="files of replies, runs or their evaluations, as [NAME=]PATH[#FIELD]; the others are compared with "
                        "the first")
    parser.add_class_arguments(ScoreSettings)


def _score(args: Namespace, console: Terminal) -> None:
    from case_fast.evaluation.score_command import ScoreSettings, score_command

    print_paths(score_command(args.predictions, ScoreSettings(**fields(args, ScoreSettings)), console), console)


def _diagnose_arguments(parser: ArgumentParser) -> None:
    from case_fast.devices import DEVICES

    parser.add_argument("run", type=str, help="folder that train made")
    parser.add_argument("--data", type=str, required=True, help="store that prepare made")
    parser.add_argument("--split", type=str, default="valid", help="train, valid or test")
    parser.add_argument("--batches", type=int, default=16, help="of 16 dialogues, no two of one conversation")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, or the step of one of the run's checkpoints")
    parser.add_argument("--device", type=str, default="auto", help=DEVICES)
    parser.add_argument("--out", type=str | None, default=None, help="folder for JSON and picture; default RUN/diagnosis/SPLIT")
    parser.add_argument("--json", type=bool, default=False, nargs="?", const=True, help="print JSON in place of the table")


def _diagnose(args: Namespace, console: Terminal) -> None:
    from case_fast.evaluation.diagnose import answers, diagnose_run, table

    with bar(console) as progress:
        task = progress.add_task("opening", total=None)
        found, paths = diagnose_run(args.run, args.data, args.split, args.out, args.batches, args.device, args.checkpoint,
                                    lambda what: progress.update(task, description=what))
    if args.json:
        print_json(plain(found))
    else:
        console.print(table(found), *answers(found), *paths, sep="\n", soft_wrap=True)


def _debug_arguments(parser: ArgumentParser) -> None:
    from case_fast.devices import DEVICES

    parser.add_argument("dump", type=str, help="RUN/failure/step-STEP.json, which training wrote")
    parser.add_argument("--data", type=str | None, default=None, help="store of the run; default: where it was then")
    parser.add_argument("--device", type=str, default="auto", help=DEVICES)
    parser.add_argument("--forward", type=int, default=500, help="steps to train again at most, where the dump has no "
                        "weights and the checkpoint is of an earlier step")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _debug(args: Namespace, console: Terminal) -> None:
    from case_fast.training.debug import debug
    from case_fast.training.debugged import lines

    found = debug(args.dump, args.data, args.device, args.forward)
    if args.json:
        print_json(plain(found.as_dict()))
        return
    for what, said in lines(found):
        console.say(f"{what:<18} {said}")


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="folder that train made")
    parser.add_argument("--out", type=str | None, default=None, help="file; default RUN/report.html")


def _report(args: Namespace, console: Terminal) -> None:
    from case_fast.evaluation import write_report

    console.say(f"report: {write_report(Path(args.run), Path(args.out) if args.out else None)}")


def _publish_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="folder that train made")
    parser.add_argument("--out", type=str, required=True, help="folder to make, such as case-ed")


def _publish(args: Namespace, console: Terminal) -> None:
    from case_fast.publishing import publish

    console.say("\n".join(publish(args.run, args.out).lines()))


COMMANDS = {
    "train": Command(
        "Train CASE or a baseline (--model NAME): a run folder with log, checkpoints and the best weights.",
        _train_arguments, _train, _train_left),
    "table": Command(
        "Table 1 or 2 of the paper: train what is missing, evaluate it, and compare over seeds.",
        _table_arguments, _table),
    "evaluate": Command(
        "Perplexities, Dist-1/2, emotion accuracy and replies of a trained run.",
        _evaluate_arguments, _evaluate),
    "score": Command(
        "BLEU, ROUGE, diversity, repetition, empathy proxies of replies in files, of any system, with intervals.",
        _score_arguments, _score),
    "diagnose": Command(
        "Does a run read its knowledge, do its alignments align: figures with what is healthy, JSON, picture.",
        _diagnose_arguments, _diagnose),
    "debug": Command(
        "Replay a step whose loss or gradients were not finite: from which op on, by which dialogue, what to do.",
        _debug_arguments, _debug),
    "report": Command(
        "One self-contained HTML page of a run: curves, metrics, replies.",
        _report_arguments, _report),
    "publish": Command(
        "A run as a folder for others: weights, words, metrics, model card; without what may not be passed on.",
        _publish_arguments, _publish),
}
