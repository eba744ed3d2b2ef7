"""What the compiler gave each CUDA kernel of the built native module: registers, stack, local and shared memory. No GPU needed.

    python -m benchmarks.kernel_resources [--json] [MODULE.so]

Registers that did not fit are spilled to the stack, so a kernel without spills has STACK 0 and LOCAL 0. Exits with 1 where one of
the hot kernels (pairs of numbers or fours, `Held<T, 2, 3>` and `Held<T, 4, 1>`) has a stack.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HOT = ("2, 3>", "4, 1>")


def tool() -> str | None:
    """cuobjdump: of the CUDA toolkit, or of triton's package."""
    folders = [os.environ.get(name, "") + "/bin" for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda/bin"]
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))
    spec = importlib.util.find_spec("triton")
    if not found and spec and spec.submodule_search_locations:
        found = shutil.which("cuobjdump", path=str(Path(spec.submodule_search_locations[0], "backends/nvidia/bin")))
    return found


def resources(module: Path, cuobjdump: str) -> list[dict[str, Any]]:
    said = subprocess.run([cuobjdump, "--dump-resource-usage", str(module)], capture_output=True, text=True, check=True).stdout
    kernels, target = [], ""
    for line in said.splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            target = found[1]
        elif found := re.search(r"Function (\S+?):", line):
            kernels.append({"target": target, "kernel": found[1]})
        elif kernels and "REG:" in line:
            kernels[-1] |= {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    names = "\n".join(kernel["kernel"] for kernel in kernels)
    if shutil.which("c++filt"):
        names = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
    for kernel, name in zip(kernels, names.splitlines(), strict=True):
        kernel["kernel"] = _short(name)
    return sorted((k for k in kernels if "reg" in k), key=lambda k: (k["target"], k["kernel"]))


def _short(name: str) -> str:
    name = re.sub(r"^void |case_fast::", "", name)
    for long, short in (("__nv_bfloat16", "bf16"), ("__half", "f16"), ("(graph_attention::Pass)0", "forward"),
                        ("(graph_attention::Pass)1", "backward")):
        name = name.replace(long, short)
    depth = 0
    for place, letter in enumerate(name):  # up to the arguments
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:place]
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", nargs="?", type=Path, help="default: the installed case_fast._native")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.module is None:
        import case_fast._native as native

        given.module = Path(native.__file__)
    cuobjdump = tool()
    if not cuobjdump:
        sys.exit("cuobjdump was not found: it comes with the CUDA toolkit and with triton (pip install triton)")
    kernels = resources(given.module, cuobjdump)
    if not kernels:
        sys.exit(f"{given.module} holds no CUDA kernels: it was built without CUDA")
    if given.json:
        print(json.dumps(kernels, indent=1))
    else:
        print(f"{'target':<7} {'kernel':<50} {'registers':>9} {'stack':>5} {'local':>5} {'shared':>6}")
        for k in kernels:
            print(f"{k['target']:<7} {k['kernel']:<50} {k['reg']:>9} {k['stack']:>5} {k['local']:>5} {k['shared']:>6}")
    spilled = [k for k in kernels if any(hot in k["kernel"] for hot in HOT) and (k["stack"] or k["local"])]
    if spilled:
        sys.exit("hot kernels with a stack: " + ", ".join(f"{k['kernel']} ({k['target']})" for k in spilled))


if __name__ == "__main__":
    main()
