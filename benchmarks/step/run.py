"""`case-fast bench step`: whole training steps on real dialogues, this package beside the plain form of the same model."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import report as families_report
from benchmarks.clock import CpuClock
from benchmarks.step import report
from benchmarks.step.batches import CONTEXTS, Choice
from benchmarks.step.worker import COMPILED, OURS, PLAIN
from case_fast.commands.machine import WAITING
from case_fast.data import open_store
from case_fast.errors import CaseFastError, ConfigError
from case_fast.files import write_text
from case_fast.text_files import read_json

NAME = "step"
PHASES = {"bow": "phase 1", "all": "phase 2"}
WORDS = 8531  # of a vocabulary without the rarest words: that of the published measurement
USUAL = Choice(size=16, count=6, words=WORDS)
TOLERANCE = 1e-3  # of a loss, and of a gradient's norm and products, by their size; float32 sums in another order
PATIENCE = 600  # seconds after which a process is given up
ROOM = 0.7  # of the memory that is free, what the plain form may be expected to take


_MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Point:
    """One thing to measure: which part of the benchmark it belongs to, by what it differs, and in which forms."""

    part: str
    value: str
    choice: Choice
    phase: str = "all"
    forms: tuple[str, ...] = (OURS, PLAIN)

    @property
    def name(self) -> str:
        return f"{self.part} {self.value}"


def points() -> dict[str, list[Point]]:
    """What `--sizes` can name, in order."""
    return {
        "step": [Point("step", PHASES[phase], USUAL, phase, (OURS, PLAIN, COMPILED)) for phase in PHASES],
        "parts": [Point("parts", PHASES[phase], USUAL, phase, (OURS,)) for phase in PHASES],
        "batch": [Point("batch", str(size), Choice(size, max(2, min(6, 128 // size)), WORDS)) for size in (1, 4, 16, 64, 256)],
        "context": [Point("context", context, Choice(16, 3, WORDS, context=context)) for context in CONTEXTS],
        "inferences": [Point("inferences", str(most), Choice(16, 6, WORDS, inferences=most)) for most in (1, 2, 5)],
        "vocabulary": [Point("vocabulary", str(words), Choice(16, 6, words)) for words in (WORDS, 24_000, 50_000)],
    }


def bench(store: str | None, sizes: Sequence[str], quick: bool, out: Path, tell: Callable[[str, int, int], None], budget: float,
          device: str = "cpu") -> tuple[list[dict[str, Any]], list[Path]]:
    """Measure the parts that ``sizes`` names, or all, into OUT/step.json, .md and .png, written after each point.

    What the file holds of this commit, store, machine and budget stays: a run that was stopped goes on where it was, and several
    runs can share the parts; only what ``sizes`` names is measured again.

    Args:
        quick: two dialogues a batch, on one thread, without compiling: whether all works, not how fast it is.
        budget: seconds of steps of each form and point, besides start, check and compilation.

    Raises:
        ConfigError: no store given, an unknown part, a budget of nothing, another device than the CPU. DataError: the store is
            damaged. CaseFastError: losses or gradients of the forms differ; nothing of that point is written.
    """
    if not store:
        raise ConfigError("bench step measures real dialogues: give a store that prepare made with --store")
    if device != "cpu":
        raise ConfigError("bench step measures on the CPU; benchmarks/gpu.sh measures training steps on a GPU")
    if not budget > 0:
        raise ConfigError(f"budget must be above 0 seconds, not {budget}")
    known = points()
    if unknown := [size for size in sizes if size not in known]:
        raise ConfigError(f"bench step has no part {', '.join(unknown)}; it has {', '.join(known)}")
    opened = open_store(store)
    found = families_report.environment("packed_attention") | {"quick": quick, "budget": budget, "store": opened.fingerprint}
    if quick:
        known = {part: [replace(point, choice=replace(point.choice, size=2, count=2)) for point in those]
                 for part, those in known.items()}
    chosen = [point for size in sizes or known for point in known[size]]
    cases = {name: case for name, case in _before(out / f"{NAME}.json", found).items() if case["part"] not in sizes}
    paths: list[Path] = []
    for place, point in enumerate(chosen):
        tell(point.name, place, len(chosen))
        if point.name not in cases:
            case = _same(point, cases.values()) or _measured(point, store, quick, budget)
            cases[point.name] = case | {"part": point.part, "value": point.value}
        paths = write(found, [cases[p.name] for those in known.values() for p in those if p.name in cases], out)
    return [line for point in chosen for line in report.summary(cases[point.name])], paths


def _before(path: Path, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The points that a run of the same kind left in its file."""
    if not path.is_file():
        return {}
    results = read_json(path, "results of a run before", "Remove the file")
    alike = ("commit", "machine", "versions", "quick", "budget", "store")
    if any(results["environment"].get(name) != found[name] for name in alike) or "uncommitted" in found["commit"]:
        return {}
    return {f"{case['part']} {case['value']}": case for case in results["cases"]}


def _same(point: Point, cases: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """A point that was measured already: the usual one is a member of each growth."""
    for case in cases:
        if "parts" not in (point.part, case["part"]) and (case["choice"], case["phase"]) == (asdict(point.choice), point.phase):
            return case | {"rows": [row for row in case["rows"] if row["form"] in point.forms]}
    return None


def write(found: dict[str, Any], cases: list[dict[str, Any]], out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{NAME}.{ending}" for ending in ("json", "md", "png")]
    results = {"benchmark": NAME, "environment": found, "cases": cases,
               "summary": [line for case in cases for line in report.summary(case)]}
    write_text(paths[0], json.dumps(results, indent=1) + "\n")
    write_text(paths[1], report.markdown(results))
    report.plot(results, paths[2])
    return paths


# ------------------------------------------------------------------------------------------------------------ one point


def _measured(point: Point, store: str, quick: bool, budget: float) -> dict[str, Any]:
    case = {"phase": point.phase, "choice": asdict(point.choice)}
    request = case | {"store": store, "seconds": 0.1 if quick else budget, "assembly": point.part == "step",
                      "threads": [1] if quick else CpuClock().thread_counts()}
    if point.part == "parts":
        return case | {"rows": [], **_ask(OURS, request | {"parts": True})}
    rows: list[dict[str, Any]] = []
    for form in point.forms:
        if form == COMPILED and quick:
            rows.append({"form": form, "left_out": "not compiled in a quick run"})
        elif form != OURS and (why := _too_large(point.choice)):
            rows.append({"form": form, "left_out": why})
        else:
            rows.append(_row(form, _ask(form, request | {"form": form}), rows))
    for row in rows:
        row.pop("gradients", None)
    return case | {"words": rows[0]["words"], "rows": rows}


def _too_large(choice: Choice) -> str:
    """Why the plain form would not fit: for each pair of vertices of G_CS it holds some twenty rows of d numbers at its peak."""
    vertices = 90 if choice.inferences is None else 8 + 12 * choice.inferences
    expected = choice.size * vertices**2 * 300 * 4 * 20
    found = re.search(r"MemAvailable:\s+(\d+) kB", _MEMORY.read_text()) if _MEMORY.is_file() else None
    return f"would take about {expected / 1e9:.0f} GB" if found and expected > ROOM * int(found[1]) * 1024 else ""


def _row(form: str, found: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a process answered, checked against ours."""
    if form != OURS and "failed" not in found:
        _check(form, found, rows[0])
    if "samples_ms" in found:
        samples = found.pop("samples_ms")
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        found |= {"median_ms": statistics.median(samples), "quartiles_ms": [low, high], "steps": len(samples)}
    return found


def _check(form: str, found: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises CaseFastError where losses or gradients are not ours."""
    for name, value in ours["losses"].items():
        if not abs(found["losses"][name] - value) <= TOLERANCE * max(1.0, abs(value)):
            raise CaseFastError(f"the loss {name!r} of {form!r} is {found['losses'][name]}, that of {OURS!r} {value}")
    if found["gradients"].keys() != ours["gradients"].keys():
        raise CaseFastError(f"{form!r} and {OURS!r} have gradients of other parameters")
    largest = max(norm for norm, _ in ours["gradients"].values())
    for name, (norm, product) in ours["gradients"].items():
        its_norm, its_product = found["gradients"][name]
        limit = TOLERANCE * (norm + 1e-3 * largest)
        if not (abs(its_norm - norm) <= limit and abs(its_product - product) <= 4 * limit):  # a product's deviation is the norm
            raise CaseFastError(f"the gradient of {name} of {form!r} has norm {its_norm}, that of {OURS!r} {norm}")


def _ask(form: str, request: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own answers; a peer that fails says why, ours raises."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", *WAITING)}
    environment |= dict(_environment(form))
    try:
        done = subprocess.run([sys.executable, "-m", "benchmarks.step.worker"], input=json.dumps(request), capture_output=True,
                              text=True, env=environment, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return {"form": form, "failed": f"was not ready after {PATIENCE} s"}
    answers = [line for line in done.stdout.splitlines() if line[:1] == "{"]
    if done.returncode == 0 and answers:
        return json.loads(answers[-1])
    why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
    if form == OURS:
        raise CaseFastError(f"{form} failed, the benchmark stops: {why}")
    return {"form": form, "failed": why}


def _environment(form: str) -> Iterator[tuple[str, str]]:
    """Ours as every `case-fast` command has it, whose threads sleep between loops; the plain form as torch has it."""
    yield "PYTHONPATH", os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    if form == OURS:
        yield from WAITING.items()
    if form == COMPILED:
        yield "TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1"  # else a second run would find the first one's work, and say no time
