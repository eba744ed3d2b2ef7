"""The command line: a function that carries out each command, listed in `_COMMANDS`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.text import Text

from case_fast import __version__
from case_fast import cli_arguments as arguments
from case_fast.errors import CaseFastError, ConfigError, Interrupted, sentence_of
from case_fast.files import plain, require_file_place, require_folder_place, write_json
from case_fast.memory import keep_freed_memory
from case_fast.terminal import Notes, Stages, Terminal, bar, lasting_streams, one_line, print_json
from case_fast.text_files import reading, require_file

_REAL_DATA = """Next, on real data (EmpatheticDialogues, ATOMIC or COMET, ConceptNet, NRC-VAD, GloVe; see docs/data.md):

  case-fast prepare --dialogues empatheticdialogues --knowledge atomic:atomic2020 \\
      --conceptnet conceptnet-assertions-5.7.0.csv.gz --lexicon NRC-VAD-Lexicon.txt --embeddings glove.6B.300d.txt --out ed.store
  case-fast train --preset paper --data ed.store --out ed.run
  case-fast evaluate ed.run --data ed.store --split test
  case-fast chat ed.run
"""


def _fields(args: Namespace, kind: type) -> dict[str, Any]:
    """The arguments that are settings of a dataclass."""
    return {item.name: args[item.name] for item in dataclasses.fields(kind)}


def _prepare(args: Namespace, console: Terminal) -> None:
    from case_fast.data.prepare import PrepareSettings, infer_knowledge, prepare
    from case_fast.training.processes import together

    settings = PrepareSettings(**_fields(args, PrepareSettings))
    with together(settings.device) as processes:
        if processes.first:
            _prepared(prepare(settings, Stages(console), infer=processes.infer), console)
        else:
            infer_knowledge(settings, infer=processes.infer)


def _import(args: Namespace, console: Terminal) -> None:
    from case_fast.data.prepare import PrepareSettings
    from case_fast.importing import check, import_release, show

    if args.check:
        show(check(args.source, args.features.inferences_per_relation, Stages(console)), console)
        return
    if missing := [f"--{name}" for name in ("out", "conceptnet", "lexicon") if args[name] is None]:
        raise ConfigError(f"a store needs {', '.join(missing)} too; with --check the file is only read and nothing is written")
    given = {item.name: args[item.name] for item in dataclasses.fields(PrepareSettings) if item.name in args}
    _prepared(import_release(PrepareSettings(dialogues=args.source, **given), Stages(console)), console)


def _prepared(store: Any, console: Terminal) -> None:
    counts = store.manifest["counts"]
    examples = ", ".join(f"{split} {count:,}" for split, count in counts["examples"].items())
    console.say(f"{store.path}: {examples} examples; {counts['vocabulary']:,} words, {counts['distinct_texts']:,} knowledge "
                f"texts; {store.manifest['seconds']} s")


def _inspect(args: Namespace, console: Terminal) -> None:
    from case_fast.data import open_store
    from case_fast.data.inspect import describe, show

    store = open_store(args.store)
    if args.split not in store.splits:
        raise ConfigError(f"--split {args.split!r} is not in this store; it has {', '.join(store.splits)}")
    if not 0 <= args.index < store.size(args.split):
        raise ConfigError(f"--index {args.index} is outside 0 .. {store.size(args.split) - 1} of the split {args.split!r}")
    if args.json:
        print_json(describe(store, args.split, args.index))
    else:
        show(store, args.split, args.index, console)


def _pack(args: Namespace, console: Terminal) -> None:
    from case_fast.data.travel import pack_store

    console.say(f"{args.out}: {pack_store(args.store, args.out) / 2**20:.1f} MiB")


def _unpack(args: Namespace, console: Terminal) -> None:
    from case_fast.data.travel import unpack_store

    store = unpack_store(args.file, args.out)
    examples = ", ".join(f"{split} {store.size(split):,}" for split in store.splits)
    console.say(f"{store.path}: {examples} examples")


def _floors(args: Namespace, console: Terminal) -> None:
    from case_fast.data import open_store
    from case_fast.evaluation.floors import floors, table

    store, path = open_store(args.store), require_file_place(args.json) if args.json else None
    found = floors(store, args.split)
    console.print(table(found))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found.as_dict())
        _print_paths([args.json], console)


def _train(args: Namespace, console: Terminal) -> None:
    from case_fast.data import open_store
    from case_fast.training import TrainConfig, train

    train(open_store(args.data), Path(args.out), TrainConfig(**_fields(args, TrainConfig)), console=console, resume=args.resume)
    console.say(f"\nNext: case-fast evaluate {args.out} --data {args.data} --split test\n      case-fast chat {args.out}")


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
    _print_paths(paths, console)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _evaluate(args: Namespace, console: Terminal) -> None:
    from case_fast.generation import GenerationConfig

    run_evaluation(args.run, args.data, args.split, args.limit, args.batch_size, args.device,
                   GenerationConfig(**_fields(args, GenerationConfig)), console)


def run_evaluation(run: str, data: str, split: str, limit: int | None, batch_size: int, device: str, generation: Any,
                   console: Console) -> Any:
    """Measure a run on a split and write RUN/evaluation/SPLIT, or SPLIT-STRATEGY where it does not reply greedily."""
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

        out = Run(run).evaluation(split, generation.strategy)
        return evaluate(model, store, split, out, replies, limit=limit, batch_size=batch_size,
                        device=chosen, console=console, progress=told, settings=dataclasses.asdict(generation))


def _score(args: Namespace, console: Terminal) -> None:
    from case_fast.evaluation.score_command import ScoreSettings, score_command

    _print_paths(score_command(args.predictions, ScoreSettings(**_fields(args, ScoreSettings)), console), console)


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


def _debug(args: Namespace, console: Terminal) -> None:
    from case_fast.training.debug import debug
    from case_fast.training.debugged import lines

    found = debug(args.dump, args.data, args.device, args.forward)
    if args.json:
        print_json(plain(found.as_dict()))
        return
    for what, said in lines(found):
        console.say(f"{what:<18} {said}")


def _doctor(args: Namespace, console: Terminal) -> int:
    from case_fast.doctor import examine, report, status
    from case_fast.doctor.show import Display

    own = [name for name, value in WAITING.items() if os.environ.get(name) == value]
    checks, display = [], None if args.json else Display(console)
    for check in examine(args.paths, args["for"], args.full, own):
        checks.append(check)
        if display:
            display.show(check)
    if display:
        display.end(checks)
    else:
        print_json(report(checks, args["for"], args.full))
    return status(checks)


def _chat(args: Namespace, console: Terminal) -> None:
    from case_fast.generation import GenerationConfig
    from case_fast.serving import load
    from case_fast.serving.chat import chat

    def line(prompt: str) -> str:
        if console.file.lost:  # whoever read the replies has gone away
            raise EOFError
        return input(prompt)

    responder = load(args.run, device=args.device, knowledge=args.knowledge)
    chat(responder, console, GenerationConfig(**_fields(args, GenerationConfig)), show=args.why, read=line)


def _report(args: Namespace, console: Terminal) -> None:
    from case_fast.evaluation import write_report

    console.say(f"report: {write_report(Path(args.run), Path(args.out) if args.out else None)}")


def _merge_cache(args: Namespace, console: Terminal) -> None:
    from case_fast.knowledge import InferenceCache

    for path in args.caches:
        require_file(path, "cache of inferences")
    require_file_place(args.into)
    with InferenceCache(args.into) as cache:
        for path in args.caches:
            console.say(f"{path}: {cache.merge(path):,} new inferences")
        console.say(f"{args.into}: {len(cache):,} inferences")


def _demo(args: Namespace, console: Terminal) -> None:
    from case_fast.data.prepare import PrepareSettings, prepare
    from case_fast.evaluation import write_report
    from case_fast.generation import GenerationConfig
    from case_fast.serving import load
    from case_fast.training import preset, train

    started = time.monotonic()
    out = Path(args.out)
    require_folder_place(out)
    store_path, run = out / "sample.store", out / "run"
    if run.exists():
        raise ConfigError(f"{run} is there already; remove the folder or give another with --out")
    console.rule("1  prepare: the bundled toy corpus (every line written by this project)")
    store = prepare(PrepareSettings("bundled", "bundled", "bundled", "bundled", str(store_path)), Stages(console))
    _prepared(store, console)
    console.rule("2  train: phase 1 on L_BOW, phase 2 on the whole objective")
    train(store, run, preset("demo"), console=console)
    console.rule("3  evaluate on the toy test split")
    run_evaluation(str(run), str(store_path), "test", None, 32, "auto", GenerationConfig(), console)
    console.rule("4  five replies, beam search")
    responder = load(run)
    for said in ("I failed my exam. I studied so hard.", "My dog died last night.", "I got a new job today!",
                 "I heard a strange noise and I was home alone.", "My best friend threw a surprise party for me."):
        reply = responder.respond(said, GenerationConfig(strategy="beam"))
        console.say(Text.assemble(("speaker  ", "cyan"), said))
        console.say(Text.assemble(("reply    ", "green"), f"{reply.text} ", (f"({reply.emotion})", "dim")))
    console.rule("5  report")
    console.say(f"{write_report(run)}\n")
    console.say(f"Done in {time.monotonic() - started:.0f} s. A toy model on a toy corpus: it shows that everything works, "
                f"not how well CASE answers.\nTalk to it: case-fast chat {run}\n")
    console.say(_REAL_DATA)


def _profile(args: Namespace, console: Terminal) -> None:
    from rich.markdown import Markdown

    from case_fast.data import open_store
    from case_fast.training.profile import markdown, picture, profile_training

    rates, phases = profile_training(open_store(args.store), args.out, args.steps, args.run, args.device)
    for profiled in phases:
        text = markdown(profiled, rates)
        console.print(Markdown(text)) if console.is_terminal else print(text)
        bars = profiled.trace.with_name(f"{profiled.phase}.png")
        picture(profiled, rates, bars)
        _print_paths([profiled.trace, bars], console)


def _bench(args: Namespace, console: Terminal) -> None:
    arguments.benchmarks()
    from rich.markdown import Markdown

    from benchmarks.command import bench, show

    if args.out or args.show is None:
        require_folder_place(args.out or "bench")
    if args.show is not None:
        for text, paths in show(args.show or args.family, args.machine, Path(args.out) if args.out else None):
            console.print(Markdown(text)) if console.is_terminal else print(text)
            _print_paths(paths, console)
        return
    if not args.family:
        raise ConfigError("bench needs a family of kernels to measure, or --show; case-fast bench --help names them")
    sizes = [size.strip() for size in args.sizes.split(",") if size.strip()]
    with bar(console) as progress:
        task = progress.add_task("", total=None)

        def told(what: str, done: int, total: int) -> None:
            if what != progress.tasks[0].description and not console.is_terminal:
                console.say(f"{what} ...")
            progress.update(task, description=what, completed=done, total=total)

        budget = (3.0 if args.family == "step" else 30.0) if args.budget is None else args.budget
        how = (sizes, args.quick, Path(args.out or "bench"), told, budget, args.device)
        if args.family == "decode":
            lines, paths = import_module("benchmarks.decode.run").bench(args.store, args.run, *how)
        else:
            step = args.family == "step"
            found, paths = import_module("benchmarks.step.run").bench(args.store, *how) if step else bench(args.family, *how)
            lines = [_in_words(line) for line in found]
    for line in lines:
        console.say(f"  {line}")
    _print_paths(paths, console)


def _in_words(line: dict[str, Any]) -> str:
    """A case and mode of a benchmark's summary."""
    costs = "".join(f"; {times:.2f} x {name}" for name, times in line["in_yardsticks"].items())
    return (f"{line['case']:<10} {line['mode']:<17} {line['ours_ms']:10.3f} ms, {line['ratio']:6.1f} x faster than "
            f"{line['best_peer']} ({line['best_peer_ms']:.3f} ms){costs}")


def _print_paths(paths: Sequence[str | Path], console: Terminal) -> None:
    for path in paths:
        console.say(f"{path}")


# name -> what it does, its arguments, what carries it out and may give an exit status; a command imports only what it needs
_COMMANDS: dict[str, tuple[str, Callable[[ArgumentParser], None], Callable[[Namespace, Terminal], int | None]]] = {
    "prepare": ("Official files to a store: dialogues, inferences, concepts, both graphs, packed.",
                arguments.prepare, _prepare),
    "import": ("What was released with CASE, CEM and their sisters to a store, read without running it; --check looks at it.",
               arguments.import_release, _import),
    "inspect": ("Show one example: dialogue, sub-utterances, inferences, concepts, both graphs.",
                arguments.inspect, _inspect),
    "pack": ("A store as one small file, for a machine without network.", arguments.pack, _pack),
    "unpack": ("The store in such a file, byte for byte as it was.", arguments.unpack, _unpack),
    "floors": ("What a bigram model and a linear classifier reach on a split: what every model has to beat.",
               arguments.floors, _floors),
    "train": ("Train CASE or a baseline (--model NAME): a run folder with log, checkpoints and the best weights.",
              arguments.train, _train),
    "table": ("Table 1 or 2 of the paper: train what is missing, evaluate it, and compare over seeds.", arguments.table, _table),
    "evaluate": ("Perplexities, Dist-1/2, emotion accuracy and replies of a trained run.", arguments.evaluate, _evaluate),
    "score": ("BLEU, ROUGE, diversity, repetition, empathy proxies of replies in files, of any system, with intervals.",
              arguments.score, _score),
    "doctor": ("Is all in order here: software, machine, kernels, data, stores, runs; and can what comes next be done.",
               arguments.doctor, _doctor),
    "diagnose": ("Does a run read its knowledge, do its alignments align: figures with what is healthy, JSON, picture.",
                 arguments.diagnose, _diagnose),
    "debug": ("Replay a step whose loss or gradients were not finite: from which op on, by which dialogue, what to do.",
              arguments.debug, _debug),
    "chat": ("Talk to a trained run: raw text in; reply, emotion and the knowledge used out.", arguments.chat, _chat),
    "report": ("One self-contained HTML page of a run: curves, metrics, replies.", arguments.report, _report),
    "merge-cache": ("Add the inferences of other caches to one.", arguments.merge_cache, _merge_cache),
    "demo": ("The whole way on the bundled toy corpus: prepare, train, evaluate, reply, report.", arguments.demo, _demo),
    "profile": ("Where a training step's time goes: a trace for Perfetto, the ten largest parts beside their floor.",
                arguments.profile, _profile),
    "bench": ("Kernels against their peers, in a checkout: time and memory, checked before timed.", arguments.bench, _bench),
}


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


def _overview() -> str:
    rows = "\n".join(f"  {name:<12} {what}" for name, (what, *_) in _COMMANDS.items())
    return f"""case-fast {__version__}: CASE aligns cognition and affection to answer with empathy.

usage: case-fast COMMAND [arguments]          case-fast COMMAND --help

{rows}
"""


# How torch's threads wait between loops. As they are they spin for milliseconds, which makes a step several times slower on a
# machine with other work. These sleep, but first spin for some ten microseconds, which is what most of a step's gaps last.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 a known error, said in one line, or failed check, 2 usage, 130 interrupted."""
    words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    # Read when torch loads. Not to be chosen for `bench`, whose peers are measured as people run them.
    if words[:1] != ["bench"] and "OMP_WAIT_POLICY" not in os.environ:
        for variable, value in WAITING.items():
            os.environ.setdefault(variable, value)
    keep_freed_memory()
    with lasting_streams() as output:
        status = _carry_out(words)
    return status or int(output.failed)


def _carry_out(words: list[str]) -> int:
    """Run a command. Every error that is none of the program's own faults is said here, in one line."""
    alone = int(os.environ.get("WORLD_SIZE") or 1) == 1 or os.environ.get("RANK", "0") == "0"  # or the first of several
    console, errors = Terminal(quiet=not alone), Terminal(stderr=True)

    def end(status: int, what: str, style: str, said: str = "") -> int:
        errors.say(Text.assemble((what, style), *[f": {one_line(said)}"] * bool(said)))
        return status

    if not words or words[0] in ("--help", "-h", "--version"):
        print(__version__ if words[:1] == ["--version"] else _overview())
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name not in _COMMANDS:
        close = difflib.get_close_matches(name, _COMMANDS, 1)
        hint = f"Did you mean {close[0]}?" if close else f"Commands: {', '.join(_COMMANDS)}."
        return end(2, "error", "red", f"there is no command {name}. {hint}")
    logging.basicConfig(level=logging.WARNING, handlers=[Notes(errors)])
    logging.getLogger("case_fast").setLevel(logging.INFO if alone else logging.WARNING)
    try:
        _require_a_folder_to_run_in()
        run, args = _parsed(name, rest)
        return run(args, console) or 0
    except Interrupted as stopped:
        return 130 if stopped.said else end(130, "interrupted", "yellow", str(stopped))
    except KeyboardInterrupt:
        return end(130, "interrupted", "yellow")
    except CaseFastError as error:
        return 1 if error.said else end(1, "error", "red", str(error))
    except OSError as error:
        return end(1, "error", "red", sentence_of(error))
    except MemoryError as error:
        return end(1, "error", "red", f"there is not enough memory ({error})" if str(error) else "there is not enough memory")


def _require_a_folder_to_run_in() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError("the folder that this command runs in is not there any more; change into another one") from error


def _parsed(name: str, words: list[str]) -> tuple[Callable[[Namespace, Terminal], int | None], Namespace]:
    """What carries a command out, and its arguments."""
    description, add_arguments, run = _COMMANDS[name]
    parser = ArgumentParser(prog=f"case-fast {name}", description=description)
    if name == "train":
        from case_fast.models import model_class
        from case_fast.training import TrainConfig, preset_values

        kind, preset, words = _chosen(words)
        values = preset_values(preset, kind)
        arguments.train(parser, kind)
        config = TrainConfig.from_dict(values)
        phases = dict(zip(model_class(kind).phases, config.lengths(1), strict=True))
        which = "the last phase" if config.open_phase == [*phases][-1] else f"the phase {config.open_phase}"
        fewest = config.fewest(phases[config.open_phase])
        parser.description += f" With this preset {which} takes {fewest:,} steps at least (early stopping)."
        parser.set_defaults(values | {"preset": preset or parser.get_default("preset")})
    else:
        add_arguments(parser)
    return run, parser.instantiate(parser.parse_args(words))


def _underscored(word: str) -> str:
    """--min-count is as good as --min_count."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


if __name__ == "__main__":
    sys.exit(main())
