"""One process of two threads beside two processes of one, on the same batches: dialogues a second in each phase.

    python -m benchmarks.step.processes --store ed.store [--steps 40]

Each is the command as people run it, twice in turn; of the log counts the last record of a phase, over half of its steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = {"1 process, 2 threads": ([sys.executable], 2),
         "2 processes, 1 thread": ([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"], 1)}


def rates(store: str, launcher: list[str], threads: int, steps: int) -> dict[int, float]:
    """Dialogues a second in phases 1 and 2."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = {"data": store, "out": out, "device": "cpu", "phase1_steps": steps, "max_steps": steps,
                    "log_every": steps // 2, "validate_every": steps, "valid_limit": 32, "checkpoint_every": 10**6}
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        subprocess.run([*launcher, "-m", "case_fast", "train", *words], check=True, stdout=subprocess.DEVNULL,
                       env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        found = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        return {record["phase"]: record["examples_per_second"] for record in found if record["event"] == "step"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="folder that prepare made")
    parser.add_argument("--steps", type=int, default=40, help="of each phase; even")
    arguments = parser.parse_args()
    best: dict[str, dict[int, float]] = {}
    for _ in range(2):
        for name, (launcher, threads) in KINDS.items():
            for phase, rate in rates(arguments.store, launcher, threads, arguments.steps).items():
                best.setdefault(name, {})[phase] = max(rate, best.get(name, {}).get(phase, 0.0))
    for name, by_phase in best.items():
        print(f"{name}: " + ", ".join(f"phase {phase} {rate:.1f} dialogues/s" for phase, rate in by_phase.items()), flush=True)


if __name__ == "__main__":
    main()
