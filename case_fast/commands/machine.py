"""Commands about this machine: is all in order, where does the time go."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from case_fast.commands import Command, print_paths
from case_fast.errors import ConfigError
from case_fast.files import require_folder_place
from case_fast.terminal import Terminal, bar, print_json

# How torch's threads wait between loops. As they are they spin for milliseconds, which makes a step several times slower on a
# machine with other work. These sleep, but first spin for some ten microseconds, which is what most of a step's gaps last.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}


def _doctor_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("paths", type=str, nargs="*", default=[], metavar="PATH", help="data sets, stores and runs, in any order")
    parser.add_argument("--for", type=Literal["prepare", "train", "evaluate", "chat"] | None, default=None, metavar="COMMAND",
                        help="look at what this needs: prepare, train, evaluate or chat; default: what the paths lead to")
    # these take no value: the word behind them is a path
    parser.add_argument("--json", action="store_true", help="print JSON, to paste into an issue")
    parser.add_argument("--full", action="store_true", help="with --json: leave home folder, user and host in it")


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


def _profile_arguments(parser: ArgumentParser) -> None:
    from case_fast.devices import DEVICES

    parser.add_argument("--store", type=str, required=True, help="store that prepare made")
    parser.add_argument("--run", type=str | None, default=None, help="run whose settings and weights to use; default: CASE's own")
    parser.add_argument("--steps", type=int, default=5, help="training steps to record of each phase")
    parser.add_argument("--out", type=str, default="profile",
                        help="folder for PHASE.png and PHASE.trace.json.gz, which ui.perfetto.dev opens")
    parser.add_argument("--device", type=str, default="auto", help=DEVICES)


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
        print_paths([profiled.trace, bars], console)


def _bench_arguments(parser: ArgumentParser) -> None:
    families = ", ".join(_benchmarks().families())
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


def _bench(args: Namespace, console: Terminal) -> None:
    _benchmarks()
    from rich.markdown import Markdown

    from benchmarks.command import bench, show

    if args.out or args.show is None:
        require_folder_place(args.out or "bench")
    if args.show is not None:
        for text, paths in show(args.show or args.family, args.machine, Path(args.out) if args.out else None):
            console.print(Markdown(text)) if console.is_terminal else print(text)
            print_paths(paths, console)
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
    print_paths(paths, console)


def _in_words(line: dict[str, Any]) -> str:
    """A case and mode of a benchmark's summary."""
    costs = "".join(f"; {times:.2f} x {name}" for name, times in line["in_yardsticks"].items())
    return (f"{line['case']:<10} {line['mode']:<17} {line['ours_ms']:10.3f} ms, {line['ratio']:6.1f} x faster than "
            f"{line['best_peer']} ({line['best_peer_ms']:.3f} ms){costs}")


def _benchmarks() -> Any:
    """benchmarks/ of the checkout that this package lies in; it is not installed with the package."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks" / "command.py").is_file():
        raise ConfigError("the benchmarks are not installed with the package: clone the repository of case_fast, run "
                          "pip install -e '.[bench]' in it, and case-fast bench measures there")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return import_module("benchmarks")


COMMANDS = {
    "doctor": Command(
        "Is all in order here: software, machine, kernels, data, stores, runs; and can what comes next be done.",
        _doctor_arguments, _doctor),
    "profile": Command(
        "Where a training step's time goes: a trace for Perfetto, the ten largest parts beside their floor.",
        _profile_arguments, _profile),
    "bench": Command(
        "Kernels against their peers, in a checkout: time and memory, checked before timed.",
        _bench_arguments, _bench),
}
