"""The steps of benchmarks/gpu.sh: on a CUDA machine, what the kernels do there. `python -m benchmarks.gpu STEP`.

    device                 ends with a sentence where there is no GPU that torch and the native module can use
    small                  every kernel on small graphs: what compute-sanitizer watches
    bench --out FILE       times against peers, checked against float64 first
    join --parts D --out F what tests, sanitizers and benchmarks said, as one JSON file

A time is that of one replay of a CUDA graph, from events around many replays: no launch gaps, as in a captured training step.
What cannot be captured is timed as it is launched, and says so. Inputs stay where they are between replays: the paper's batch
lives in L2, as it does in a model.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.measure import OURS, Truth, Unfit, Work, WrongResult, Yardstick
from benchmarks.on_gpu import DTYPES, OnGpu, backend
from benchmarks.run import family_of

STEPS = ("forward", "backward", "forward+backward")
REPLAYS, ROUNDS = 20, 25


def device() -> str:
    """The GPU's name. Exits with a sentence where there is none, or the native module cannot use it."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.sh needs an NVIDIA GPU: torch sees none"
                 + (" (this torch is built without CUDA)" if torch.version.cuda is None else ""))
    return torch.cuda.get_device_name()


def on_gpu() -> dict[str, OnGpu]:
    """By family, in the order they are measured."""
    from benchmarks import bilinear_mim_gpu, cross_attention_gpu, graph_attention_gpu, vocabulary_loss_gpu

    return {
        "graph_attention": graph_attention_gpu.ON_GPU,
        "cross_attention": cross_attention_gpu.ON_GPU,
        "bilinear_mim": bilinear_mim_gpu.ON_GPU,
        "vocabulary_loss": vocabulary_loss_gpu.ON_GPU,
    }


def small() -> None:
    from case_fast.ops.device_flag import raise_pending

    device()
    for family in on_gpu().values():
        family.small()
    torch.cuda.synchronize()
    raise_pending()
    print("every kernel has run")


def timed(prepare: Callable[[], Callable[[], Any]]) -> dict[str, Any]:
    """Microseconds of what `prepare` returns, replayed from a CUDA graph where it can be captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call = prepare()
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph, how = torch.cuda.CUDAGraph(), "CUDA graph"
    try:
        with torch.cuda.graph(graph, stream=stream):
            call()
        run = graph.replay
    except RuntimeError as error:
        torch.cuda.synchronize()
        run, how = call, f"launched one by one, since it cannot be captured: {str(error).splitlines()[0][:120]}"
    samples = []
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        once = time.monotonic()
        run()
        torch.cuda.synchronize()
        once = time.monotonic() - once
        calls = max(1, min(REPLAYS, int(0.1 / once)))
        for _ in range(max(5, min(ROUNDS, int(1 / (once * calls))))):
            run()
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / calls * 1e3)
    low, _, high = statistics.quantiles(samples, n=4)
    return {"us": round(statistics.median(samples), 2), "quartiles_us": [round(low, 2), round(high, 2)], "how": how}


def peer_times(work: Work | Yardstick, mode: str) -> dict[str, Any]:
    """A Work's steps, up to the case's last mode; each fails alone."""

    def forward() -> Callable[[], Any]:
        return lambda: work.run("forward")

    def backward() -> Callable[[], Any]:
        out = work.function(*work.leaves)
        return lambda: torch.autograd.grad(out, work.leaves, work.grad_out, retain_graph=True)

    def both() -> Callable[[], Any]:
        return lambda: work.run("forward+backward")

    found: dict[str, Any] = {}
    steps = dict(zip(STEPS, (forward, backward, both), strict=True))
    if mode == STEPS[0]:
        steps = {mode: forward}
    elif isinstance(work, Yardstick):
        del steps["backward"]
    for step, prepare in steps.items():
        try:
            found[step] = timed(prepare)
        except Exception as error:  # a peer's compiler may fail in any way; the others are still measured
            torch.cuda.synchronize()
            found[step] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    results = work.run(mode)
    torch.cuda.synchronize()
    own = sum(x.numel() * x.element_size() for x in results)
    found["extra_mb"] = round((torch.cuda.max_memory_allocated() - held - own) / 1e6, 2)
    return found


def copy_rate() -> float:
    """TB/s of a large copy on the device, bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return round(2 * source.numel() / timed(lambda: lambda: target.copy_(source))["us"] / 1e6, 3)


def bench(out: Path, budget: float) -> None:
    """Ours first, of every family, then peers while there is time; the file is written after each."""
    started = time.monotonic()
    found: dict[str, Any] = {"device": device(), "copy_tb_s": copy_rate(), "cases": []}
    families = on_gpu()
    tables = {}
    for name, chosen in families.items():
        for dtype, size in product(DTYPES, chosen.sizes):
            tables[name, dtype, size] = {"family": name, "size": size, "dtype": dtype, "peers": {}}
    found["cases"] = [*tables.values()]
    for mine, ((name, dtype, size), row) in product((True, False), tables.items()):
        family, chosen = family_of(name), families[name]
        case = family.case_of(size, device="cuda", dtype=DTYPES[dtype])
        row |= {"what": case.what, **case.shape}
        truth = None
        for peer in chosen.ours if mine else chosen.peers:
            if time.monotonic() - started > budget:
                row["peers"][peer] = {"left_out": f"the {budget:.0f} seconds were over"}
            else:
                truth = truth or family.truth(case)
                switch = chosen.ours[peer]() if mine else backend("reference")
                row["peers"][peer] = _measured(family.peers[OURS if mine else peer], case, truth, switch)
                torch._dynamo.reset()
            out.write_text(json.dumps(found, indent=1))
            times = (_short(row["peers"][peer], step) for step in STEPS)
            print(f"{name:<16} {size:>8} {dtype:>9} {peer:<48}", *times, flush=True)
        del case, truth
        torch.cuda.empty_cache()


def _measured(prepare: Callable[[Any], Work | Yardstick], case: Any, truth: Truth, switch: AbstractContextManager) -> dict:
    try:
        with switch:
            work = prepare(case)
            error = max(work.check(mode, truth) for mode in case.modes)  # they may run other kernels
            return {"error_over_limit": round(error, 3), **peer_times(work, case.modes[-1])}
    except (Unfit, WrongResult) as reason:
        return {"left_out": str(reason)}
    except Exception as reason:  # as in peer_times
        torch.cuda.synchronize()
        return {"failed": f"{type(reason).__name__}: {str(reason)[:200]}"}


def _short(row: dict[str, Any], step: str) -> str:
    value = row.get(step, {}).get("us")
    return f"{value:>10.2f} us" if value is not None else f"{next(iter(row)) if step not in row else 'failed':>13}"


def join(parts: Path, out: Path | None) -> None:
    """One JSON file: by default benchmarks/results/<device>-<date>-<commit>.json."""
    from benchmarks.report import environment

    found: dict[str, Any] = {"environment": environment("graph_attention"), "gpu": device()}
    found["environment"]["versions"]["cuda"] = torch.version.cuda
    tests = parts / "tests.xml"
    if tests.exists():
        suite = ElementTree.parse(tests).getroot().find("testsuite")
        if suite is not None:
            found["tests"] = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    found["sanitizer"] = {}
    for log in sorted(parts.glob("sanitizer-*.txt")):
        said = log.read_text(errors="replace")
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", said)
        found["sanitizer"][log.stem.removeprefix("sanitizer-")] = summary[-1] if summary else f"no summary: {said[-200:]}"
    resources = parts / "resources.json"
    if resources.exists():
        found["kernel_resources"] = json.loads(resources.read_text())
    measured = parts / "bench.json"
    found["benchmarks"] = json.loads(measured.read_text()) if measured.exists() else None
    if out is None:
        moment, commit = found["environment"]["date"][:10], found["environment"]["commit"].split()[0]
        out = Path(__file__).parent / "results" / f"{re.sub(r'[^A-Za-z0-9]+', '-', found['gpu'])}-{moment}-{commit}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1))
    print(f"written: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("device", "small", "bench", "join"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", type=Path, default=Path("build/gpu"))
    parser.add_argument("--budget", type=float, default=240, help="seconds for all benchmarks")
    given = parser.parse_args()
    if given.step == "device":
        print(device())
    elif given.step == "small":
        small()
    elif given.step == "bench":
        bench(given.out or given.parts / "bench.json", given.budget)
    else:
        join(given.parts, given.out)


if __name__ == "__main__":
    main()
