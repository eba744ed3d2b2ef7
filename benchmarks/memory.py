"""Peak memory of a peer beyond its inputs, output and gradients: on a CPU how far the resident set rises, in a process of its
own; on a GPU what torch's allocator says.

The resident set sees what any library allocates, not torch alone. glibc is told to give each block above 64 KiB back at once,
so that what one peer has freed does not hide what the next one takes. Linux only; finer than about 0.3 MB it cannot tell.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.family import family_of

HOW = {
    "cpu": "rise of the peak resident set (VmHWM, reset before the call) over a warmed-up process, less output and gradients",
    "cuda": "rise of the peak of torch's allocator over what was allocated before the call, less output and gradients",
}
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measurable() -> bool:
    return _STATUS.is_file() and os.access(_RESET, os.W_OK)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    assert found
    return int(found[1]) * 1024


def extra_bytes(call: Callable[[], tuple[Tensor, ...]]) -> int:
    """Bytes beyond inputs, output and gradients that ``call`` takes at its peak; it is called three times."""
    call()  # libraries, compilation, stacks of threads
    taken = []
    for _ in range(2):
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        _RESET.write_text("5")
        before = _resident("VmRSS")
        results = call()
        taken.append(_resident("VmHWM") - before - _kept(results))
        del results
    return max(0, *taken)


def extra_bytes_on_gpu(call: Callable[[], tuple[Tensor, ...]]) -> int:
    """As `extra_bytes`; called once, and warmed up before. Of torch's allocator, which every peer uses."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - _kept(results))


def _kept(results: tuple[Tensor, ...]) -> int:
    return sum(size for _, size in {(x.data_ptr(), x.nbytes) for x in results})


def measure(family: str, case: str, wanted: list[tuple[str, str, int]]) -> list[int | None]:
    """Extra bytes of each (peer, mode, threads) of a case, in a process of its own; None where it failed or is no such peer."""
    if not measurable() or not wanted:
        return [None] * len(wanted)
    request = json.dumps({"family": family, "case": case, "wanted": wanted})
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory"], input=request, capture_output=True, text=True,
                          env=environment)
    answers = {json.loads(line)["place"]: json.loads(line)["bytes"] for line in done.stdout.splitlines() if line[:1] == "{"}
    return [answers.get(place) for place in range(len(wanted))]


def main() -> None:
    request: dict[str, Any] = json.load(sys.stdin)
    family = family_of(request["family"])
    case = family.case_of(request["case"])
    for place, (peer, mode, threads) in enumerate(request["wanted"]):
        if peer not in family.peers:
            continue
        torch.set_num_threads(threads)
        work = family.peers[peer](case)
        print(json.dumps({"place": place, "bytes": extra_bytes(lambda work=work, mode=mode: work.run(mode))}), flush=True)
        del work


if __name__ == "__main__":
    main()
