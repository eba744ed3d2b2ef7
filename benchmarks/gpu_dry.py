"""What stands in for programs of benchmarks/gpu.sh in a dry run: `python -m benchmarks.gpu_dry KIND [CHECK] --out FILE`.

    emulated CHECK             in place of compute-sanitizer
    sleep --seconds S          in place of all
    crash | hang | memory      a fault; something is written down first, as by a stage that has got somewhere
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import ROOT, SKIPPED
from case_fast.files import write_text


def emulated(check: str) -> dict[str, str]:
    """The CUDA kernels of cross_attention as C++ on the CPU: their barriers and accesses to shared memory are carried out, no
    sanitizer watches. There is nothing that stands for the other three checks."""
    compiler = os.environ.get("CXX", "g++")
    if check != "memcheck":
        print(f"a dry run has nothing in place of {check}")
        sys.exit(SKIPPED)
    with tempfile.TemporaryDirectory() as folder:
        program, source = f"{folder}/emulated", ROOT / "csrc" / "tests" / "test_cross_attention_cuda.cpp"
        options = ["-std=c++17", "-O1", "-pthread", "-I", str(ROOT / "csrc")]
        subprocess.run([compiler, *options, "-o", program, str(source)], check=True)
        said = subprocess.run([program], capture_output=True, text=True, check=True).stdout.strip()
    return {"summary": f"no sanitizer, but {source.name} emulated on the CPU: {said.splitlines()[-1]}"}


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    """Not to be had out of it by asking."""
    for asked in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked, signal.SIG_IGN)
    time.sleep(3600)


def memory() -> None:
    """All of what it may take."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))
    held = []
    while True:
        held.append(bytearray(1 << 24))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("emulated", "sleep", "crash", "hang", "memory"))
    parser.add_argument("check", nargs="?", default="")
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.kind == "emulated":
        write_text(given.out, json.dumps(emulated(given.check)))
        return
    write_text(given.out, json.dumps({"rehearsed": [given.kind]}))
    if given.kind == "sleep":
        sys.stdin.readline()  # the turn of a stage that measures
        time.sleep(given.seconds)
        write_text(given.out, json.dumps({"rehearsed": ["sleep", "slept"]}))
    else:
        {"crash": crash, "hang": hang, "memory": memory}[given.kind]()


if __name__ == "__main__":
    main()
