"""Commands that let a run be used."""

from __future__ import annotations

import time
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.text import Text

from case_fast.commands import Command, fields, print_paths
from case_fast.commands.data import prepared
from case_fast.commands.runs import run_evaluation
from case_fast.errors import ConfigError
from case_fast.files import require_folder_place
from case_fast.terminal import Stages, Terminal

_REAL_DATA = """Next, on real data (EmpatheticDialogues, ATOMIC or COMET, ConceptNet, NRC-VAD, GloVe; see docs/data.md):

  case-fast prepare --dialogues empatheticdialogues --knowledge atomic:atomic2020 \\
      --conceptnet conceptnet-assertions-5.7.0.csv.gz --lexicon NRC-VAD-Lexicon.txt --embeddings glove.6B.300d.txt --out ed.store
  case-fast train --preset paper --data ed.store --out ed.run
  case-fast evaluate ed.run --data ed.store --split test
  case-fast chat ed.run
"""


def _chat_arguments(parser: ArgumentParser) -> None:
    from case_fast.devices import DEVICES
    from case_fast.generation import GenerationConfig

    parser.add_argument("run", type=str, help="folder that train made")
    parser.add_argument("--knowledge", type=str | None, default=None,
                        help="atomic:PATH, comet:DIR or bundled; default: what the store was prepared with")
    parser.add_argument("--device", type=str, default="auto", help=DEVICES)
    parser.add_argument("--why", type=bool, default=True, nargs="?", const=True, help="show emotion, inferences and concepts")
    parser.add_class_arguments(GenerationConfig)


def _chat(args: Namespace, console: Terminal) -> None:
    from case_fast.generation import GenerationConfig
    from case_fast.serving import load
    from case_fast.serving.chat import chat

    def line(prompt: str) -> str:
        if console.file.lost:  # whoever read the replies has gone away
            raise EOFError
        return input(prompt)

    responder = load(args.run, device=args.device, knowledge=args.knowledge)
    chat(responder, console, GenerationConfig(**fields(args, GenerationConfig)), show=args.why, read=line)


def _explain_arguments(parser: ArgumentParser) -> None:
    from case_fast.devices import DEVICES
    from case_fast.generation import GenerationConfig

    parser.add_argument("run", type=str, help="folder that train made")
    parser.add_argument("texts", type=str, nargs="*", default=[], metavar="TEXT",
                        help="the dialogue, a turn each: speaker, listener, speaker, ...")
    parser.add_argument("--edit", type=str, action="append", default=[], metavar="JSON",
                        help='what if, once or more: \'{"op": "remove", "what": "concept", "text": "sad"}\'; docs/explain.md')
    parser.add_argument("--reply", type=str | None, default=None, help="explain this reply in place of the model's own")
    parser.add_argument("--data", type=str | None, default=None, help="store that prepare made: explain examples of it")
    parser.add_argument("--split", type=str, default="test", help="with --data: train, valid or test")
    parser.add_argument("--index", type=str, default="", help="with --data: examples, from 0, parted by commas")
    parser.add_argument("--reference", type=bool, default=False, nargs="?", const=True,
                        help="with --data: explain the replies that people gave")
    parser.add_argument("--effects", type=str, default="inferences,reactions,concepts,context",
                        help="of what to score the reply once more without each, parted by commas")
    parser.add_argument("--attention", type=bool, default=False, nargs="?", const=True,
                        help="what each word of the reply reads of the decoder's sources")
    parser.add_argument("--json", type=str | None, default=None, help="file to write everything to")
    parser.add_argument("--html", type=str | None, default=None, help="page to write, with both graphs")
    parser.add_argument("--table", type=str | None, default=None,
                        help="with --data: folder for table 6 of these examples, as table6.md and table6.tex")
    parser.add_argument("--runs", type=str, default="", help="with --table: further runs beside this one, parted by commas")
    parser.add_argument("--knowledge", type=str | None, default=None, help="as of chat")
    parser.add_argument("--device", type=str, default="auto", help=DEVICES)
    parser.add_class_arguments(GenerationConfig)


def _explain(args: Namespace, console: Terminal) -> None:
    from case_fast.generation import GenerationConfig
    from case_fast.serving.command import explain

    print_paths(explain(args, GenerationConfig(**fields(args, GenerationConfig)), console), console)


def _demo_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default="demo", help="folder for store, run and report")


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
    prepared(store, console)
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


COMMANDS = {
    "chat": Command(
        "Talk to a trained run: raw text in; reply, emotion and the knowledge used out.",
        _chat_arguments, _chat),
    "explain": Command(
        "Why a run replies so, and what if: text, JSON, HTML, table 6.",
        _explain_arguments, _explain),
    "demo": Command(
        "The whole way on the bundled toy corpus: prepare, train, evaluate, reply, report.",
        _demo_arguments, _demo),
}
