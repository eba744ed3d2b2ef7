"""What stands in for a stage of benchmarks/gpu.sh in a dry run, a fault or sleep: `python -m benchmarks.gpu_dry KIND --out FILE`.

Each writes down something first, as a stage does that has got somewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

from case_fast.files import write_text


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    """Not to be had out of it by asking."""
    for asked in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked, signal.SIG_IGN)
    time.sleep(3600)


def memory() -> None:
    """All of the gigabyte that it may take."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    held = []
    while True:
        held.append(bytearray(1 << 26))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("crash", "hang", "memory", "sleep"))
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    write_text(given.out, json.dumps({"rehearsed": [given.kind]}))
    if given.kind == "sleep":
        sys.stdin.readline()  # the turn of a stage that measures
        time.sleep(given.seconds)
        write_text(given.out, json.dumps({"rehearsed": [given.kind, "slept"]}))
    else:
        {"crash": crash, "hang": hang, "memory": memory}[given.kind]()


if __name__ == "__main__":
    main()
