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
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

OURS = {
    "case_fast": ("native", 0),
    "case_fast, plan graphs": ("native", 1),
    "case_fast, plan rows": ("native", 2),
    "case_fast, Triton": ("triton", 0),
}
PEERS = ("gather/scatter, relation tables, eager", "gather/scatter, relation tables, torch.compile",
         "dense products, edge bias, torch.compile", "FlexAttention, torch.compile")  # fmt: skip
SIZES = ("paper", "1e5")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS = ("forward", "backward", "forward+backward")
REPLAYS, ROUNDS = 20, 25


def device() -> str:
    """The GPU's name. Exits with a sentence where there is none, or the native module cannot use it."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.sh needs an NVIDIA GPU: torch sees none"
                 + (" (this torch is built without CUDA)" if torch.version.cuda is None else ""))  # fmt: skip
    return torch.cuda.get_device_name()


@contextmanager
def backend(name: str, plan: int) -> Iterator[None]:
    """Which of our kernels run."""
    import case_fast.ops  # noqa: F401

    module = sys.modules["case_fast.ops.graph_attention"]
    before = os.environ.get("CASE_FAST_BACKEND"), module.PLAN_AUTO
    os.environ["CASE_FAST_BACKEND"], module.PLAN_AUTO = name, plan
    try:
        yield
    finally:
        os.environ.pop("CASE_FAST_BACKEND")
        if before[0] is not None:
            os.environ["CASE_FAST_BACKEND"] = before[0]
        module.PLAN_AUTO = before[1]


def small() -> None:
    """A few hundred edges through every kernel: both plans, graphs that fit and do not, long rows and columns, each dtype."""
    from benchmarks.graphs import make_case, random_graphs
    from case_fast import ops
    from case_fast.ops.device_flag import raise_pending

    device()
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 20, 70, 150, 3), (2, 30, 90, 7, None), (1, 700, 1400, 150, 40), (1, 40, 1300, 6, 2))
    for count, vertices, edges, dimension, relations in shapes:
        graphs = random_graphs(count, vertices, edges, generator)
        if vertices == 40:
            graphs.indptr[1:] = torch.linspace(900, edges, vertices).int()  # one long row, and
            graphs.indices[200:800] = 3  # one long column
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            case = make_case("small", "", graphs, relations, dimension=dimension, device="cuda", dtype=dtype)
            for name, plan in (("native", 1), ("native", 2), ("triton", 0)):
                if name == "triton" and dtype not in DTYPES.values():
                    continue  # each takes seconds to compile
                with backend(name, plan):
                    leaves = [x.detach().requires_grad_() for x in case.inputs]
                    out = ops.graph_attention(*leaves[:3], case.graphs.indptr, case.graphs.indices, case.relation, *leaves[3:],
                                              dropout_p=0.1, seed=5)  # fmt: skip
                    torch.autograd.grad(out, leaves, case.grad_out)
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
    graph, how, calls = torch.cuda.CUDAGraph(), "CUDA graph", REPLAYS
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
        for _ in range(ROUNDS):
            run()
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / calls * 1e3)
    low, _, high = statistics.quantiles(samples, n=4)
    return {"us": round(statistics.median(samples), 2), "quartiles_us": [round(low, 2), round(high, 2)], "how": how}


def peer_times(work: Any) -> dict[str, Any]:
    """A Work's steps; each fails alone."""

    def forward() -> Callable[[], Any]:
        return lambda: work.run("forward")

    def backward() -> Callable[[], Any]:
        out = work.function(*work.leaves)
        return lambda: torch.autograd.grad(out, work.leaves, work.grad_out, retain_graph=True)

    def both() -> Callable[[], Any]:
        return lambda: work.run("forward+backward")

    found: dict[str, Any] = {}
    for step, prepare in zip(STEPS, (forward, backward, both), strict=True):
        try:
            found[step] = timed(prepare)
        except Exception as error:  # a peer's compiler may fail in any way; the others are still measured
            torch.cuda.synchronize()
            found[step] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    results = work.run("forward+backward")
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
    """Ours first, then peers while there is time; the file is written after each."""
    from benchmarks.graph_attention import truth
    from benchmarks.graph_attention_peers import PEERS as KNOWN
    from benchmarks.graph_attention_peers import ours
    from benchmarks.graphs import case_of
    from benchmarks.measure import Unfit, WrongResult

    started = time.monotonic()
    found: dict[str, Any] = {"device": device(), "copy_tb_s": copy_rate(), "cases": []}
    cases = [(size, dtype, case_of(size, device="cuda", dtype=DTYPES[dtype])) for dtype in DTYPES for size in SIZES]
    truths: dict[int, Any] = {}
    for peers in (OURS, PEERS):
        for number, (size, dtype, case) in enumerate(cases):
            if peers is OURS:
                truths[number] = truth(case)
                found["cases"].append({"size": size, "what": case.what, "dtype": dtype, "vertices": case.vertices,
                                       "edges": case.edges, "peers": {}})  # fmt: skip
            table = found["cases"][number]["peers"]
            for name in peers:
                if time.monotonic() - started > budget:
                    table[name] = {"left_out": f"the {budget:.0f} seconds were over"}
                    continue
                kernel = OURS.get(name)
                try:
                    with backend(*kernel) if kernel else backend("reference", 0):
                        work = (ours if kernel else KNOWN[name])(case)
                        error = work.check("forward+backward", truths[number])
                        table[name] = {"error_over_limit": round(error, 3), **peer_times(work)}
                except (Unfit, WrongResult) as reason:
                    table[name] = {"left_out": str(reason)}
                except Exception as reason:  # as above
                    torch.cuda.synchronize()
                    table[name] = {"failed": f"{type(reason).__name__}: {str(reason)[:200]}"}
                torch._dynamo.reset()
                out.write_text(json.dumps(found, indent=1))
                print(f"{size:>6} {dtype:>9} {name:<48}", *(_short(table[name], step) for step in STEPS), flush=True)


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
