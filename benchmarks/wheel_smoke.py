"""Whether an installed case_fast works: its module, a call of each family of ops, and the way from the bundled sample to a
published model that answers. It takes some seconds, in a folder of its own, and asks no network.

    python benchmarks/wheel_smoke.py      # whatever case_fast this Python has, never that of the checkout
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path


def case_fast(*words: str, allowed: tuple[int, ...] = (0,)) -> str:
    """What a command prints; it must end with an ``allowed`` status."""
    from case_fast import cli

    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = cli.main(list(words))
    if status not in allowed:
        raise SystemExit(f"case-fast {' '.join(words)} ended with {status}: {out.getvalue()[-2000:]}")
    return out.getvalue()


def main() -> None:
    from case_fast import __file__, __version__, load
    from case_fast.ops import native_report

    if Path(__file__).resolve().is_relative_to(Path(sys.argv[0]).resolve().parents[1] / "case_fast"):
        raise SystemExit(f"{__file__} is the checkout's: run this with a Python that case_fast is installed in")
    report = native_report()
    if not report["available"]:
        raise SystemExit(f"the native module is not there: {report['reason']}")
    cuda = f"CUDA {report['cuda_runtime']} for {report['cuda_architectures']}" if report["cuda"] else "no CUDA"
    print(f"case_fast {__version__} of {Path(__file__).parent}: {report['simd']}, {cuda}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = json.loads(case_fast("doctor", "--json", allowed=(0, 1)))["checks"]  # 1: a check of this machine failed
        checks = [check for check in found if check["group"] == "native"]
        if not checks or any(check["state"] == "fail" for check in checks):
            raise SystemExit(f"doctor: {json.dumps(checks, indent=1)}")
        print(*(f"{check['name']}: {check['reason']}" for check in checks), sep="\n")
        sources = [word for name in ("dialogues", "knowledge", "conceptnet", "lexicon") for word in (f"--{name}", "bundled")]
        case_fast("prepare", *sources, "--limit", "20", "--out", "s.store")
        case_fast("train", "--preset", "demo", "--data", "s.store", "--out", "s.run", "--device", "cpu", "--model.d_model", "16",
                  "--model.ffn", "16", "--phase1_steps", "2", "--max_steps", "2", "--min_steps", "0", "--validate_every", "2")
        case_fast("evaluate", "s.run", "--data", "s.store", "--limit", "4", "--device", "cpu")
        case_fast("publish", "s.run", "--out", "toy")
        print(f"a reply: {load('toy', 'cpu', lexicon='bundled').respond('My dog died last night.')}")
        os.chdir("/")


if __name__ == "__main__":
    main()
