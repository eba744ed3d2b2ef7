"""The stages of benchmarks/gpu.sh: each in processes of its own with a time limit, its record written the moment it ends.

    python -m benchmarks.gpu            the stages of `stages`, nine minutes at most
    python -m benchmarks.gpu recipe     the build and the whole recipe of training

This process imports no torch and touches no GPU: whatever a stage does to its own process, the others run, and the record of
what has ended is whole on the disk. A stage may use the time that earlier ones left over; it never takes that of later ones.
At its end the processes of a stage get SIGINT, then SIGTERM, then SIGKILL, and what they had written down by then is kept.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import families
from case_fast.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DRY = os.environ.get("DRY", "") not in ("", "0")
# Of a dry run: above 0, every process sleeps, limits are so many times theirs; and the share of its limit that it sleeps.
SCALE = float(os.environ.get("GPU_SCALE", 0)) if DRY else 0.0
SLEEP = float(os.environ.get("GPU_SLEEP", 0.8))
SKIPPED = 77  # the exit status of a process that has nothing to do here; its last line says why
GOOD = ("ok", "skipped")
LIBRARIES = "at::native|at6native|cub::|cutlass|cublas|gemm|nvjet|splitK"  # in the names of kernels that torch launches


# ---------------------------------------------------------------------------------------------------------------- the stages


def of_file(path: Path, log: str) -> Any:
    """What a process has written down so far; None where that is nothing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def of_sanitizer(path: Path, log: str) -> Any:
    """What compute-sanitizer printed: its summary, findings in all, of which kernels; and the families that had run."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)
    counts = [int(number) for number in re.findall(r"(\d+) (?:error|hazard)", summary[-1])] if summary else []
    kernels = Counter(re.findall(r"^=========     at (?:void )?([\w:]+)", log, re.MULTILINE))
    found = of_file(path, log) or {}
    if not summary and not found:
        return None
    return found | {"summary": summary[-1] if summary else found.get("summary"), "errors": counts[0] if counts else None,
                    "kernels": dict(kernels)}


@dataclass(frozen=True)
class Stage:
    name: str
    limit: float  # seconds
    jobs: dict[str, list[str]]  # of each part its command, which is given --out FILE besides
    in_turn: bool = False  # one at a time, since they measure: all start at once, and wait on stdin for their seconds
    beside: bool = False  # runs with the stage before it, in the same time
    needs: dict[str, object] = field(default_factory=dict)  # what it cannot do without, and whether it is there
    read: Callable[[Path, str], Any] = of_file  # of a part's file and log its result


def python(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def travel_store() -> str:
    """STORE, or what `case-fast pack` has left in the checkout; "" where there is none."""
    return os.environ.get("STORE") or next((str(path) for path in sorted(ROOT.glob("*.travel"))), "")


A_STORE = "a packed store: STORE=, or a *.travel in the checkout"
CHECKS = ("memcheck", "racecheck", "initcheck", "synccheck")


def sanitizers(tool: str) -> dict[str, list[str]]:
    """Kernels of libraries are left out, so that none of ours is; not with initcheck, which has to see what they wrote."""
    if DRY:
        return {check: python("benchmarks.gpu_dry", "emulated", check) for check in CHECKS}
    small = python("benchmarks.gpu_steps", "smoke", "all")
    told = subprocess.run([tool, "--help"], capture_output=True, text=True).stdout if tool else ""
    without = ["--kernel-name-exclude", f"regex={LIBRARIES}"] if "--kernel-name-exclude" in told else []
    return {check: [tool, "--tool", check, *([] if check == "initcheck" else without), "--error-exitcode", "9", *small]
            for check in CHECKS}


def stages(chosen: Sequence[str]) -> list[Stage]:
    folders = f"{os.environ['PATH']}:{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
    tool, store = shutil.which("compute-sanitizer", path=folders) or "", travel_store()
    few = ("--preset", "demo", "--steps", "2") if DRY else ()
    training = python("benchmarks.gpu_training", "steps", "--store", store, *few)

    def each(*words: str) -> dict[str, list[str]]:
        return {family: python(*words, family) for family in chosen}

    def bench(which: str, limit: float) -> Stage:
        jobs = {family: python("benchmarks.gpu_steps", which, family) for family in chosen}
        return Stage(which, limit, jobs, in_turn=True)

    return [
        Stage("device", 24, {"": python("benchmarks.gpu_steps", "device")}),
        Stage("build", 30, {"": python("benchmarks.gpu_steps", "build")}),
        Stage("smoke", 30, each("benchmarks.gpu_steps", "smoke")),
        Stage("training", 48, {"": training}, needs={A_STORE: store}),
        Stage("tests", 132, each("benchmarks.gpu_tests")),
        Stage("sanitizers", 132, sanitizers(tool), beside=True, read=of_sanitizer,
              needs={"compute-sanitizer": tool or DRY}),
        bench("ours", 120),
        bench("peers", 120),
        bench("variants", 30),
    ]


def recipe(out: Path) -> list[Stage]:
    store = travel_store()
    train = python("benchmarks.gpu_training", "recipe", "--store", store, "--out", str(out), "--minutes", "8.3")
    return [Stage("build", 40, {"": python("benchmarks.gpu_steps", "build")}),
            Stage("recipe", 530, {"": train}, needs={A_STORE: store},
                  read=lambda _, log: of_file(out / "recipe.json", log))]


# --------------------------------------------------------------------------------------------------------------- the processes


def _child() -> None:
    """Ends with the process that started it; and where memory runs out, the kernel takes it before that one."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


class Job:
    """A process, in a group of its own, and its record."""

    def __init__(self, stage: Stage, part: str, folder: Path, deadline: float, threads: int):
        name = f"{stage.name}-{part}".strip("-")
        self.stage, self.deadline, self.started = stage, deadline, time.monotonic()
        self.file, self.log = folder / f"{name}.json", folder / f"{name}.log"
        self.record: dict[str, Any] = {"name": part, "state": "running", "why": "", "seconds": 0.0, "limit": 0.0, "result": None,
                                       "log": []}
        command = _rehearsed(stage, part) if DRY else stage.jobs[part]
        if "--out" not in command:
            command = [*command, "--out", str(self.file)]
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if stage.name == "sanitizers":
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor an allocation, whose ends are seen
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT,
                                            stdin=subprocess.PIPE if stage.in_turn else subprocess.DEVNULL,
                                            start_new_session=True, preexec_fn=_child)
        self._steps = [(1.0, signal.SIGINT), (0.5, signal.SIGTERM), (0.0, signal.SIGKILL)]
        self.stopped = False

    def turn(self, deadline: float) -> None:
        """Of a stage whose parts measure in turn: this one may begin, and has until then."""
        self.started, self.deadline = time.monotonic(), deadline
        with suppress(OSError):
            self.process.stdin.write(f"{deadline - self.started - self.grace:.1f}\n".encode())
            self.process.stdin.close()

    @property
    def grace(self) -> float:
        """Seconds from SIGINT to SIGKILL."""
        return min(5.0, (self.deadline - self.started) / 8)

    def ended(self) -> bool:
        """Looks after the process: signals where its time is over, the record where it has ended."""
        now = time.monotonic()
        while self._steps and now >= self.deadline - self._steps[0][0] * self.grace and self.process.poll() is None:
            self.signal(self._steps.pop(0)[1])
            self.stopped = True
        if self.process.poll() is None and now < self.deadline + 1:  # later it waits on a driver, and no signal reaches it
            return False
        self.look()
        self.signal(signal.SIGKILL)  # what it left behind in its group
        self.record["state"], self.record["why"] = self._state(self.process.returncode)
        return True

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def look(self) -> None:
        """What is known of it now."""
        log = self.log.read_text(encoding="utf-8", errors="replace")
        self.record |= {"seconds": round(time.monotonic() - self.started, 1), "limit": round(self.deadline - self.started, 1),
                        "log": [line[:300] for line in log.splitlines()[-15:]]}
        try:
            self.record["result"] = self.stage.read(self.file, log)
        except Exception as error:  # what it wrote was not what it should have been; the others' is
            self.record["log"].append(f"its result cannot be read: {error!r}")

    def _state(self, status: int | None) -> tuple[str, str]:
        last = next((line for line in reversed(self.record["log"]) if line.strip()), "")
        if self.stopped or status is None:
            return "timeout", f"stopped after {self.record['seconds']} s" + (", in vain" if status is None else "")
        number = -status if status < 0 else status - 128  # of a signal, by itself or as a shell says it
        if number in set(signal.Signals):
            name = signal.Signals(number).name
            return "crashed", name + (": out of memory, perhaps" if name == "SIGKILL" else "")
        return {0: ("ok", ""), SKIPPED: ("skipped", last)}.get(status, ("failed", last or f"exit status {status}"))


def _rehearsed(stage: Stage, part: str) -> list[str]:
    """The command in a dry run: GPU_FAULT=stage:kind,... puts faults in place of the stages' first parts; or sleep for all."""
    faults = dict(fault.split(":") for fault in os.environ.get("GPU_FAULT", "").split(",") if fault)
    if stage.name in faults and part == next(iter(stage.jobs)):
        return python("benchmarks.gpu_dry", faults[stage.name])
    if SCALE:
        turns = len(stage.jobs) if stage.in_turn else 1
        return python("benchmarks.gpu_dry", "sleep", "--seconds", str(SLEEP * SCALE * stage.limit / turns))
    return stage.jobs[part]


# ------------------------------------------------------------------------------------------------------------------- the record


class Run:
    """All stages one after the other, and the record of them on the disk."""

    def __init__(self, listed: list[Stage], gpu: str, folder: Path, paths: list[Path]):
        self.folder, self.paths, self.stages = folder, paths, listed
        self.begun, self.jobs = time.monotonic(), {stage.name: [] for stage in listed}
        self.record: dict[str, Any] = {
            "gpu": gpu, "dry": DRY, "begun": datetime.now(UTC).isoformat(timespec="seconds"), "finished": False, "seconds": 0.0,
            "stages": [{"name": stage.name, "state": "waiting", "seconds": 0.0, "limit": stage.limit, "parts": []}
                       for stage in listed],
        }

    def write(self) -> None:
        self.record["seconds"] = round(time.monotonic() - self.begun, 1)
        for path in self.paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(self.record, indent=1) + "\n")
            except OSError as error:  # the other path may be well
                print(f"benchmarks/gpu.sh: {path}: {error}", file=sys.stderr)

    def run(self) -> bool:
        """Whether nothing failed."""
        self.write()
        deadline, ahead = self.begun, list(self.stages)
        try:
            while ahead:
                together = [ahead.pop(0)]
                while ahead and ahead[0].beside:
                    together.append(ahead.pop(0))
                deadline += together[0].limit * (SCALE or 1)
                self._together(together, deadline)
            self.record["finished"] = True
        finally:  # whatever ends it, a signal too
            for job in (job for jobs in self.jobs.values() for job in jobs if job.record["state"] == "running"):
                job.signal(signal.SIGKILL)
                job.look()
                job.record |= {"state": "stopped", "why": "the whole run was stopped"}
            self._sum_up()
            self.write()
        return all(stage["state"] in GOOD for stage in self.record["stages"])

    def _together(self, together: list[Stage], deadline: float) -> None:
        waiting: list[Job] = []
        runs: list[Job] = []
        count = sum(len(stage.jobs) for stage in together if not stage.in_turn) or 1
        for stage in together:
            entry = next(entry for entry in self.record["stages"] if entry["name"] == stage.name)
            missing = [what for what, there in stage.needs.items() if not there]
            if missing:
                entry |= {"state": "skipped", "why": f"needs {missing[0]}"}
                continue
            for part in stage.jobs:
                try:
                    job = Job(stage, part, self.folder, deadline, max(1, (os.cpu_count() or 1) // count))
                except OSError as error:  # it did not even start
                    entry |= {"state": "failed", "why": str(error)}
                    continue
                self.jobs[stage.name].append(job)
                entry["parts"].append(job.record)
                (waiting if stage.in_turn else runs).append(job)
        told: set[str] = set()
        written = time.monotonic()
        while waiting or runs:
            if waiting and not runs:
                job = waiting.pop(0)
                now = time.monotonic()
                job.turn(now + (deadline - now) / (len(waiting) + 1))
                runs.append(job)
            runs = [job for job in runs if not job.ended()]
            self._sum_up()
            if self._tell(together, told) or time.monotonic() - written > 5 * (SCALE or 1):
                for job in runs:
                    job.look()  # a run that is killed from outside keeps this
                self.write()
                written = time.monotonic()
            time.sleep(0.02)
        self._tell(together, told)
        self.write()

    def _sum_up(self) -> None:
        for entry in self.record["stages"]:
            states = [part["state"] for part in entry["parts"]] + ["failed"] * ("why" in entry)
            if entry["parts"]:
                worst = ("stopped", "running", "crashed", "timeout", "failed", "ok", "skipped")
                jobs = self.jobs[entry["name"]]
                entry["state"] = next(state for state in worst if state in states)
                last = max(job.started + job.record["seconds"] for job in jobs)
                entry["seconds"] = round(last - min(job.started for job in jobs), 1)

    def _tell(self, together: list[Stage], told: set[str]) -> bool:
        """A line for each stage that has ended and was not told; whether there was one."""
        ended = [entry for entry in self.record["stages"] if entry["name"] in {stage.name for stage in together} - told
                 and entry["state"] not in ("waiting", "running")]
        for entry in ended:
            told.add(entry["name"])
            why = entry.get("why", "")
            print(f"{time.monotonic() - self.begun:6.1f} s  {entry['name']}: {entry['state']}{why and f': {why}'}")
            for part in entry["parts"]:
                if part["why"]:
                    print(f"          {part['name'] or entry['name']}: {part['state']}: {part['why']}")
                if part["state"] not in GOOD:
                    print(*(f"            | {line}" for line in part["log"][-4:]), sep="\n")
        return bool(ended)


# ------------------------------------------------------------------------------------------------------------------------ main


def gpu_name() -> str:
    """"" where there is none. Of nvidia-smi, or where that is missing, of torch."""
    torch = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"]
    for command in (["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], torch):
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode == 0 and done.stdout.strip():
                return done.stdout.splitlines()[0].strip()
    return ""


def _stop(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough
    sys.exit(128 + number)


def main() -> None:
    words = sys.argv[1:]
    if words not in ([], ["recipe"]):
        sys.exit(f"benchmarks/gpu.sh: {' '.join(words)!r} is not understood; nothing, or recipe")
    out = Path(os.environ["OUT"]).absolute() if os.environ.get("OUT") else None
    chosen = [name for name in re.split(r"[,\s]+", os.environ.get("FAMILIES", "")) if name] or families()
    if unknown := set(chosen) - set(families()):
        sys.exit(f"benchmarks/gpu.sh: FAMILIES names {', '.join(sorted(unknown))}; there are {', '.join(families())}")
    if DRY and out is None:
        sys.exit("benchmarks/gpu.sh: DRY=1 needs OUT=folder; what it writes is no result")
    signal.signal(signal.SIGTERM, _stop)
    gpu = "none: a dry run" if DRY else gpu_name()
    if not gpu:
        sys.exit("benchmarks/gpu.sh: neither nvidia-smi nor torch sees a GPU; DRY=1 OUT=folder goes through all without one")
    folder = out / "parts" if DRY else ROOT / "build" / "gpu"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if words:
        run = Run(recipe(out or ROOT / "runs" / "recipe"), gpu, folder, [folder / "record.json"])
    else:
        stored = [RESULTS / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") / "gpu.json"] if not DRY else []
        run = Run(stages(chosen), gpu, folder, [*stored, *([out / "gpu.json"] if out else [])])
    try:
        good = run.run()
    finally:
        from benchmarks.gpu_results import overview

        print("", overview(run.record), sep="\n")
        print("\n".join(f"written: {path}" for path in run.paths))
    sys.exit(not good)


if __name__ == "__main__":
    main()
