"""Several processes train as one does: gloo, on the CPU; and what happens when one of them is stopped, fails, hangs or is killed.

All of it happens in one program, which loads torch once and forks the processes:
``python -m python_tests.training.test_processes FOLDER`` leaves what it found in FOLDER, and the tests read that.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))  # what tests share is imported by bare names

from helpers import as_double, random_examples, tiny_config, tiny_vocabulary
from training_helpers import MemoryStore, records, run, tiny_run

import case_fast
from case_fast.data.pack import make_batch
from case_fast.errors import ConfigError, DataError
from case_fast.knowledge import CachedSource, InferenceCache
from case_fast.models import MODELS, build
from case_fast.training import TrainConfig, loop
from case_fast.training.group import Group
from case_fast.training.processes import Several, SharedStep, together
from case_fast.training.sampler import Sampler
from case_fast.training.step import EagerStep

PACKAGE = str(Path(case_fast.__file__).parents[1])
STEPS = 30
STILL = tiny_run(model=tiny_config(num_negatives=2), log_every=1, phase1_steps=10, max_steps=20, validate_every=10, min_steps=10,
                 warmup=400, checkpoint_every=100)  # no dropout: what it draws depends on the shares
TINY = {"vocab_size": len(tiny_vocabulary()), "d_model": 16, "ffn": 12}
KINDS = {name: [{"attention_width": 8}] for name in MODELS}  # settings of each model; what is drawn for each row is off
KINDS["case"] = [{"graph_dropout": 0.0}]
KINDS["case"] += [{"graph_dropout": 0.0, **changes} for changes in (
    {"mim_score": "bilinear_sigmoid", "kl_reduction": "sum"}, {"mim_score": "dot", "num_negatives": 3}, {"num_negatives": 2})]
KINDS["kemp"][0]["graph_dropout"] = 0.0
KINDS["mime"] = [{"attention_width": 8, "stochastic": False}]


# ---------------------------------------------------------------------------------------------------------------- the program


def forked(count: int, work: Callable[[int], Any], timeout: float = 15) -> list[dict[str, Any]]:
    """What came of ``work(rank)`` in so many processes: "value", or "error" and "message"; "status", and "seconds" to its end."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as name:
        free.bind(("127.0.0.1", 0))
        port, folder, started = str(free.getsockname()[1]), Path(name), time.monotonic()
        free.close()
        ranks: dict[int, int] = {}
        for rank in range(count):
            pid = os.fork()
            if not pid:
                if count > 1:
                    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "MASTER_PORT": port,
                                   "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "CASE_FAST_TIMEOUT": str(timeout)}
                _child(work, rank, folder / f"{rank}")
            ranks[pid] = rank
        found: list[dict[str, Any]] = [{} for _ in ranks]
        while ranks and time.monotonic() - started < 100:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in ranks:
                rank = ranks.pop(pid)
                answer = json.loads((folder / f"{rank}").read_text()) if (folder / f"{rank}").exists() else {}
                found[rank] = answer | {"status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - started}
            time.sleep(0.01)
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        return found


def _child(work: Callable[[int], Any], rank: int, path: Path) -> None:
    code = 1
    try:
        path.write_text(json.dumps({"value": work(rank)}))
        code = 0
    except BaseException as error:
        path.write_text(json.dumps({"error": type(error).__name__, "message": str(error)}))
    finally:
        os._exit(code)


def trained(out: Path, store: MemoryStore, config: TrainConfig = STILL, resume: bool | str = False, step: int = 0,
            action: Callable[[loop.Trainer], Any] | None = None, double: bool = False) -> dict[str, Any]:
    """A run of this process: its steps, and the sha256 of the weights at the end. ``action``: after a step; ``double``: in
    float64."""
    with pytest.MonkeyPatch.context() as patch:
        if action:
            take = loop.Trainer.train_step
            patch.setattr(loop.Trainer, "train_step", lambda self: (take(self), self.step == step and action(self)))
        if double:
            new_model = loop.Trainer._new_model
            patch.setattr(loop.Trainer, "_new_model", lambda self: new_model(self).double())
        ends: list[str] = []
        finish = loop.Trainer._finish

        def finished(self: loop.Trainer) -> Any:
            weights = b"".join(x.numpy().tobytes() for x in self.model.state_dict().values())
            ends.append(hashlib.sha256(weights).hexdigest())
            return finish(self)

        patch.setattr(loop.Trainer, "_finish", finished)
        result = run(store, out, config, resume)
    return {"steps": result.steps, "weights": ends, "accelerate": "accelerate" in sys.modules}


def watched(store: MemoryStore, path: Path, change: Callable[[int, Any], Any] = lambda number, batch: batch) -> MemoryStore:
    """The store, noting the examples of each training batch in a file; it gives what ``change`` makes of the n-th (from 1)."""
    path.parent.mkdir(exist_ok=True)
    numbers = itertools.count(1)

    def on_batch(split: str, indices: list[int], batch: Any) -> Any:
        if split != "train":
            return batch
        with open(path, "a") as stream:
            stream.write(json.dumps(indices) + "\n")
        return change(next(numbers), batch)

    store.on_batch = on_batch
    return store


def stepped(kind: str, changes: dict[str, Any], phase: str, size: int, processes: Several | None, negatives: bool = True
            ) -> tuple[dict[str, float], dict[str, torch.Tensor | None], list[int]]:
    """Numbers, gradients and word counts of a step of a model on a batch of so many dialogues, in float64; ``processes``: which
    have a share of it each, or None."""
    torch.manual_seed(0)
    model = build(kind, **TINY | changes).double()
    model.set_phase(phase)
    examples, texts = random_examples(size, seed=3)
    places = list(range(size))
    own = places if processes is None else processes.share(places)
    batch = as_double(make_batch([examples[place] for place in own], texts, model.needs, seed=7))
    arguments = model, TrainConfig(device="cpu"), torch.device("cpu")
    if processes is None:
        form = EagerStep(*arguments)
    else:
        form, batch = SharedStep(processes.group, *arguments), processes.shared(batch, size, negatives)
        batch, _ = batch.others.weighed(batch, 0)
    output, norm = form._backward(batch)
    numbers = {"norm": norm, "loss": output.loss, **output.losses, **output.diagnostics}
    counts = model.word_counts.tolist() if hasattr(model, "word_counts") else []
    return {name: float(x) for name, x in numbers.items()}, {name: p.grad for name, p in model.named_parameters()}, counts


def compared(processes: Several, *case: Any) -> dict[str, Any]:
    """A step of several processes beside that of one: the numbers, the largest difference of a gradient as a share of its largest
    number, the parameters that only one of them has a gradient of, and whether as many words were counted."""
    (ones, whole, counts), (numbers, shared, own_counts) = stepped(*case, None), stepped(*case, processes)
    unlike = [name for name, x in whole.items() if (x is None) != (shared[name] is None)]
    # what cancels out but for rounding is compared with the norm of all gradients
    errors = [float((shared[name] - x).abs().max() / max(x.abs().max(), 1e-6 * ones["norm"])) for name, x in whole.items()
              if x is not None and shared[name] is not None]
    return {"numbers": numbers, "ones": ones, "unlike": unlike, "error": max(errors), "counts": counts == own_counts}


CASES = [(kind, changes, "interactive" if kind == "empdg-d" else "all", 5) for kind, own in KINDS.items() for changes in own]
CASES += [("case", {"graph_dropout": 0.0}, phase, 2) for phase in ("bow", "all")]  # two leave nothing for the third process


def gradients() -> list[dict[str, Any]]:
    with together("cpu") as processes:
        own = stepped("case", KINDS["case"][0], "all", 5, processes, negatives=False)[0]
        return [{"numbers": own}, *(compared(processes, *case) for case in CASES)]


class Asked:
    """A source of knowledge that keeps what it is asked for."""

    identity, settings = "made up", {}

    def __init__(self) -> None:
        self.texts: list[str] = []

    def infer(self, texts: list[str], relations: list[str], k: int) -> list[dict[str, list[str]]]:
        self.texts += texts
        return [{relation: [f"{text} {relation}"] for relation in relations} for text in texts]


def inferred(folder: Path) -> dict[str, Any]:
    texts, source = [f"text {number}" for number in range(150)], Asked()
    with together("cpu") as processes, InferenceCache(folder / "cache.sqlite") as cache:
        told: list[tuple[int, int]] = []
        cached = CachedSource(source, cache, lambda done, total: told.append((done, total)))
        answers = processes.infer(cached, texts, ["xWant", "xReact"], 3)
    return {"texts": source.texts, "answers": answers, "told": told}


def torn(number: int, batch: Any) -> Any:
    if number == 4:
        raise DataError("ed.store", "it is torn")
    return batch


def poisoned(number: int, batch: Any) -> Any:
    if number == 14:
        batch.concept.intensity[:] = float("nan")
    return batch


def shifted(trainer: loop.Trainer) -> None:
    with torch.no_grad():
        trainer.parameters[0].view(-1)[0] += 1e-6


def interrupt(trainer: loop.Trainer) -> None:
    signal.raise_signal(signal.SIGTERM)


def program(folder: Path) -> None:
    torch.set_num_threads(1)  # also: forking is safe as long as no thread pool has been started
    with suppress(ImportError):
        importlib.import_module("torch.utils.tensorboard")  # likewise
    store, found = MemoryStore(), {}

    def together_in(name: str, count: int, **options: Any) -> None:
        """`trained` in so many processes; an option that is a list has a value for each."""
        def work(rank: int) -> dict[str, Any]:
            own = {key: value[rank] if isinstance(value, list) else value for key, value in options.items()}
            watched(store, folder / f"{name} taken" / f"{rank}", own.pop("change", lambda number, batch: batch))
            return trained(own.pop("out", folder / name), store, **own)

        found[name] = forked(count, work, own_timeout.get(name, 15))

    own_timeout = {"hangs": 2}
    together_in("one", 1)  # before accelerate is loaded
    importlib.import_module("torch._inductor")  # which deterministic algorithms load
    importlib.import_module("accelerate").PartialState  # noqa: B018
    for count, name in ((2, "two"), (3, "three")):
        together_in(name, count)
        found[f"gradients {count}"] = forked(count, lambda rank: gradients())
    for count, name in ((1, "one in float64"), (2, "two in float64")):
        together_in(name, count, double=True)

    # one process, stopped; two, of which the last is asked to stop; one to the end
    legs = folder / "legs"
    together_in("leg 1", 1, out=legs, step=13, action=interrupt)
    together_in("leg 2", 2, out=legs, step=22, action=[None, interrupt], resume=True)
    found["checkpoints"] = sorted(path.name for path in (legs / "checkpoints").iterdir())
    together_in("leg 3", 1, out=legs, resume=True)

    often = replace(STILL, checkpoint_every=5)
    together_in("killed", 3, config=often, step=17, action=[None, lambda _: os.kill(os.getpid(), signal.SIGKILL), None])
    together_in("after", 2, out=folder / "killed", config=often, resume="auto")
    together_in("hangs", 3, step=17, action=[None, lambda _: time.sleep(4), None])
    together_in("fails", 2, change=[lambda number, batch: batch, torn])
    together_in("nan", 2, change=[lambda number, batch: batch, poisoned])
    together_in("apart", 2, config=often, step=3, action=[None, shifted])
    together_in("padded", 2, config=replace(STILL, step="padded"))
    together_in("unlike", 2, config=[STILL, replace(STILL, seed=1)])
    together_in("there", 2, out=folder / "one")
    found["inferred"] = forked(3, lambda rank: inferred(folder))
    (folder / "found.json").write_text(json.dumps(found))


# ------------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `program` left."""
    path = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())


def values(answers: list[dict[str, Any]]) -> list[Any]:
    assert all("value" in answer for answer in answers), answers
    return [answer["value"] for answer in answers]


def taken(folder: Path, name: str, count: int) -> list[list[list[int]]]:
    """Of each process, the examples of its training batches."""
    return [[json.loads(line) for line in (folder / f"{name} taken" / f"{rank}").read_text().splitlines()]
            for rank in range(count)]


def curve(out: Path) -> list[dict[str, float]]:
    return [{"loss": record["loss"], **record["losses"], **record["diagnostics"]} for record in records(out, "step")]


def same_curve(out: Path, other: Path, tolerance: float = 1e-5) -> None:
    one, two = curve(out), curve(other)
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name, count", [("two", 2), ("three", 3)])
def test_losses_of_thirty_steps_and_validations_are_those_of_one_process(folder, found, name, count):
    values(found[name])
    same_curve(folder / name, folder / "one")
    ones, others = (records(folder / run, "validation") for run in ("one", name))
    assert len(ones) == len(others) == 2
    for one, other in zip(ones, others, strict=True):
        for key in ("ppl", "ppl_geometric", "loss", "accuracy", "losses"):
            assert other[key] == pytest.approx(one[key], rel=1e-5), key
    weights = {ends for value in values(found[name]) for ends in value["weights"]}
    assert len(weights) == 1, "the processes' weights differ"


def test_what_is_left_of_a_difference_is_rounding(folder, found):
    values(found["two in float64"])
    same_curve(folder / "two in float64", folder / "one in float64", 3e-7)  # of the log, which has the digits of float32


@pytest.mark.parametrize("name, count", [("two", 2), ("three", 3)])
def test_each_step_has_the_same_examples_in_the_same_order(folder, found, name, count):
    sampler = Sampler(22, 4, 0)
    shares = taken(folder, name, count)
    for step in range(STEPS):
        whole = sampler.indices(step)
        assert taken(folder, "one", 1)[0][step] == whole
        parts = [share[step] for share in shares]
        if len(whole) >= count:
            assert [index for part in parts for index in part] == whole
        else:  # two dialogues for three processes: the first of all stands in, without any weight
            assert parts == [whole[:1], whole[:1], whole[1:]] and count == 3
    assert any(len(sampler.indices(step)) < 3 for step in range(STEPS))


def test_one_process_knows_nothing_of_others(found):
    (value,) = values(found["one"])
    assert not value["accelerate"]
    assert all(value["accelerate"] for value in values(found["two"]))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("place", range(len(CASES)), ids=[" ".join(map(str, case)) for case in CASES])
def test_losses_gradients_and_word_counts_of_a_step_are_those_of_one_process(found, count, place):
    for part in values(found[f"gradients {count}"]):
        step = part[1 + place]
        assert step["numbers"] == pytest.approx(step["ones"], rel=1e-9, abs=1e-12)
        assert step["counts"] and step["unlike"] == []
        assert step["error"] < 1e-8


@pytest.mark.parametrize("count", [2, 3])
def test_negatives_of_the_own_dialogues_alone_are_a_setting(found, count):
    """L_coarse is then the mean over all pairs of what each share makes of its own."""
    own, gathered = values(found[f"gradients {count}"])[0][:2]
    for name in ("coarse", "fine"):
        assert own["numbers"][name] < 0.95 * gathered["numbers"][name]  # of fewer negatives
    assert own["numbers"]["generation"] == pytest.approx(gathered["numbers"]["generation"])
    examples, texts = random_examples(5, seed=3)
    torch.manual_seed(0)
    model = build("case", **TINY | KINDS["case"][0]).double()
    pairs = coarse = 0
    for rank in range(count):
        batch = as_double(make_batch(examples[5 * rank // count : 5 * (rank + 1) // count], texts))
        number = int(batch.case.coarse_sizes[0])
        pairs, coarse = pairs + number, coarse + number * model(batch).losses["coarse"].item()
    assert own["numbers"]["coarse"] == pytest.approx(coarse / pairs)


def test_a_signal_to_any_process_stops_all_with_one_checkpoint(folder, found):
    assert [answer["error"] for answer in found["leg 1"] + found["leg 2"]] == ["Interrupted"] * 3
    said = {answer["message"] for answer in found["leg 2"]}
    assert len(said) == 1 and "stopped by SIGTERM after step 23; the state is in" in said.pop()
    assert found["checkpoints"] == ["00000013", "00000023", "latest"]


def test_a_run_goes_on_in_another_number_of_processes(folder, found):
    values(found["leg 3"])
    same_curve(folder / "legs", folder / "one")
    assert [record["step"] for record in records(folder / "legs", "resume")] == [13, 23]
    resumed = taken(folder, "leg 2", 2)
    sampler = Sampler(22, 4, 0)
    for step in range(13, 23):
        assert [index for share in resumed for index in share[step - 13]] == sampler.indices(step)


def test_when_one_is_killed_all_end_and_the_run_goes_on_from_its_last_checkpoint(folder, found):
    first, killed, third = found["killed"]
    assert killed["status"] == -signal.SIGKILL
    for other in (first, third):
        assert other["error"] == "Elsewhere" and other["seconds"] - killed["seconds"] < 5
        assert "another process has ended, or did not answer" in other["message"]
    values(found["after"])
    assert [record["step"] for record in records(folder / "killed", "resume")] == [15]
    same_curve(folder / "killed", folder / "one")


def test_when_one_hangs_the_others_wait_no_longer_than_they_may(found):
    first, hung, third = found["hangs"]
    assert all(other["error"] == "Elsewhere" for other in found["hangs"])
    assert all("did not answer within 2 s" in other["message"] for other in (first, third))
    assert all(other["seconds"] < hung["seconds"] for other in (first, third))


def test_an_error_in_one_process_is_a_sentence_in_all(found):
    first, torn = found["fails"]
    assert (torn["error"], torn["message"]) == ("DataError", "ed.store: it is torn.")
    assert (first["error"], first["message"]) == ("Elsewhere", "process 2 of 2 has failed: ed.store: it is torn.")


def test_a_loss_that_is_not_finite_in_one_share_stops_all_at_that_step(folder, found):
    assert {answer["error"] for answer in found["nan"]} == {"NotFinite"}
    assert len({answer["message"] for answer in found["nan"]}) == 1
    assert "step 14: loss nan; nothing was changed" in found["nan"][0]["message"]
    dump = json.loads((folder / "nan" / "failure" / "step-00000014.json").read_text())
    assert dump["indices"] == Sampler(22, 4, 0).indices(13)


def test_weights_that_come_apart_are_noticed_before_they_are_saved(folder, found):
    assert {answer["error"] for answer in found["apart"]} == {"Unlike"}
    assert "the weights of process 2 of 2 are not those of the first" in found["apart"][0]["message"]
    assert [path.name for path in (folder / "apart" / "checkpoints").iterdir()] == []


def test_what_cannot_work_is_refused_by_name(found):
    for answer in found["padded"]:
        assert answer["error"] == "ConfigError" and answer["message"].startswith("step padded: 2 processes exchange rows whose")
    for answer in found["unlike"]:
        assert answer["error"] == "ConfigError" and "process 2 of 2 has another settings than the first" in answer["message"]
    first, second = found["there"]
    assert first["error"] == "CheckpointError" and "already holds a run" in first["message"]
    assert second["error"] == "Elsewhere" and "process 1 of 2 has failed: " in second["message"]
    assert "already holds a run" in second["message"]


def test_knowledge_is_inferred_by_all_and_each_text_asked_for_once(found):
    shares = values(found["inferred"])
    texts = [f"text {number}" for number in range(150)]
    assert sorted(text for share in shares for text in share["texts"]) == sorted(texts)
    assert [len(share["texts"]) for share in shares] == [50, 50, 50]
    assert shares[0]["answers"] == [{relation: [f"{text} {relation}"] for relation in ("xWant", "xReact")} for text in texts]
    assert shares[0]["told"][-1] == [300, 300]


KILLS_ITSELF = """
import os, signal, sys
from case_fast import cli
from case_fast.training import loop

taken = loop.Trainer.train_step

def train_step(self):
    taken(self)
    if self.step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

loop.Trainer.train_step = train_step
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


def test_torchrun_starts_the_command_anew_from_the_last_checkpoint(sample_store, tmp_path):
    """One process of two kills itself in the fifth step of the first attempt."""
    (tmp_path / "script.py").write_text(KILLS_ITSELF)
    settings = {"model.d_model": 16, "model.ffn": 16, "phase1_steps": 2, "max_steps": 5, "validate_every": 5, "valid_limit": 33,
                "checkpoint_every": 3, "log_every": 1, "device": "cpu"}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
               str(tmp_path / "script.py"), "--data", str(sample_store.path), "--out", str(tmp_path / "run"), *words]
    environment = os.environ | {"PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("in 2 processes; 431 training dialogues") == 2  # said by the first process alone, in each attempt
    assert done.stdout.count("done after 7 steps") == 1
    assert [record["step"] for record in records(tmp_path / "run", "resume")] == [3]
    assert [record["step"] for record in records(tmp_path / "run", "step")] == [*range(1, 8)]


def test_a_bound_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("CASE_FAST_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match="CASE_FAST_TIMEOUT must be a number of seconds above 0, not 'soon'"):
        Group("cpu")


if __name__ == "__main__":
    program(Path(sys.argv[1]))
