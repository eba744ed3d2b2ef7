"""Whether a change moved CASE's numbers: write them with the code before, compare with the code after, bit for bit.

    PYTHONPATH=BEFORE python python_tests/golden.py write before.json --store ed.store --run ed.run
    PYTHONPATH=AFTER  python python_tests/golden.py compare before.json --store ed.store --run ed.run

Of a prepared store: losses and gradients of batches in both phases, and the weights after 20 steps of the trainer, without
dropout and with it; with --run also greedy and beam replies of that run to 200 contexts. Equal bits need one processor, one torch
and one number of threads. Exit status 1 where something differs.

Dropout seeds used to be drawn from torch's generator inside forward; since they come with the batch, the code after is given that
old rule here, so that everything else can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from case_fast.data import Store, open_store
from case_fast.generation import GenerationConfig, generate_all
from case_fast.models import CASE, CASEConfig, layers
from case_fast.training import TrainConfig, train

STEPS, BATCH, CONTEXTS = 10, 16, 200  # steps of each phase
SHOWN = 20  # of what differs
DROPOUT = {"without dropout": 0.0, "with dropout": 0.1}


def digest(tensors: Iterable[Tensor]) -> str:
    sha = hashlib.sha256()
    for x in tensors:
        sha.update(x.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def batch_of(store: Store, indices: range) -> Any:
    """A seed that is given is not drawn from torch's generator, which goes on as it did before there was one."""
    given = {"seed": 0} if "seed" in inspect.signature(store.batch).parameters else {}
    return store.batch("train", indices, **given)


def in_phase(model: CASE, phase: int) -> None:
    """Phases had numbers before they had names."""
    model.set_phase(model.phases[phase - 1] if hasattr(model, "phases") else phase)


def old_seeds() -> None:
    """Seeds of dropout as they were drawn before they came with the batch."""
    if hasattr(layers, "Dropping"):
        def drop(self: Any, seed: int) -> tuple[float, int]:
            p = self.dropout_p if self.training else 0.0
            return p, int(torch.randint(2**63 - 1, ())) if p else 0

        layers.Dropping.drop = drop


def losses_and_gradients(store: Store, config: CASEConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for phase in (1, 2):
        torch.manual_seed(0)
        model = CASE(config)
        in_phase(model, phase)
        for place in range(3):
            output = model(batch_of(store, range(place * BATCH, (place + 1) * BATCH)))
            output.loss.backward()
        found[f"phase {phase}: losses"] = {name: value.item().hex() for name, value in output.losses.items()}
        found[f"phase {phase}: gradients"] = {
            name: digest([p.grad]) for name, p in model.named_parameters() if p.grad is not None
        }
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        found[f"phase {phase}: norm"] = float(sum(squares) ** 0.5)
    return found


def trained(store: Store, config: CASEConfig) -> dict[str, Any]:
    """Weights after the trainer's steps, and the losses of its log."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        recipe = TrainConfig(model=config, phase1_steps=STEPS, max_steps=STEPS, warmup=100, validate_every=STEPS, valid_limit=64,
                             batch_size=BATCH, log_every=1, device="cpu")
        train(store, run, recipe, console=Console(quiet=True))
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        model = CASE.from_pretrained(run / "best")
    steps = [record["loss"] for record in records if record["event"] == "step"]
    (validation,) = [record for record in records if record["event"] == "validation"]
    return {
        "weights": digest(p for _, p in sorted(model.named_parameters())),
        "word counts": digest([model.word_counts]),
        "losses of the steps": [float(x).hex() for x in steps],
        "validation": {name: float(validation[name]) for name in ("ppl", "accuracy")},
    }


def replies(store: Store, run: Path) -> dict[str, Any]:
    model = CASE.from_pretrained(run / "best")
    found = {}
    for name, config in (("greedy", GenerationConfig()), ("beam", GenerationConfig(strategy="beam"))):
        said = generate_all(model, store, "test", range(min(CONTEXTS, store.size("test"))), config)
        found[f"replies, {name}"] = hashlib.sha256(json.dumps([reply.words for reply in said]).encode()).hexdigest()[:16]
        found[f"scores, {name}"] = [reply.score.hex() for reply in said]
        found[f"distinct replies, {name}"] = len({reply.words for reply in said})
    return found


def values(store: Store, run: Path | None, config: CASEConfig) -> dict[str, Any]:
    """Everything that is compared, by name."""
    old_seeds()
    config = replace(config, vocab_size=len(store.featurizer.vocabulary))
    found: dict[str, Any] = {}
    for name, p in DROPOUT.items():
        dropping = replace(config, graph_dropout=p, encoder_dropout=p, decoder_dropout=p)
        found |= {f"{name}, {key}": value for key, value in losses_and_gradients(store, dropping).items()}
        found |= {f"{name}, 20 steps: {key}": value for key, value in trained(store, dropping).items()}
    return found | (replies(store, run) if run else {})


def machine() -> dict[str, str | int]:
    from case_fast.ops import native_report

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    simd = native_report().get("simd", "")
    return {"processor": name, "torch": torch.__version__, "threads": torch.get_num_threads(), "simd": simd}


def differing(before: Any, after: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        parts = [differing(before.get(key), after.get(key), f"{name}.{key}".strip(".")) for key in {**before, **after}]
        return [found for part in parts for found in part]
    return [] if before == after else [f"{name}: {before} before, {after} after"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--store", required=True)
    parser.add_argument("--run", type=Path)
    given = parser.parse_args()
    print(f"code: {Path(inspect.getfile(CASE)).parents[2]}")
    found = {"machine": machine(), "values": values(open_store(given.store), given.run, CASEConfig())}
    if given.what == "write":
        given.file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found['values'])} values written to {given.file}")
        return 0
    wrong = differing(json.loads(given.file.read_text()), found)
    for line in wrong[:SHOWN]:
        print(line)
    print(f"{len(found['values'])} values compared, {len(wrong)} differ")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
