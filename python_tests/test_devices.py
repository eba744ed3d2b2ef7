"""One resolver of "device", and one sentence with which everything that takes a device refuses what is not here."""

from __future__ import annotations

import io

import pytest
import torch
from helpers import tiny_model
from rich.console import Console

from case_fast.data.prepare import PrepareSettings, prepare
from case_fast.devices import device_in_words, resolve_device
from case_fast.errors import ConfigError
from case_fast.knowledge.comet import CometSource
from case_fast.serving import load
from case_fast.training import preset, train


def seen(patch: pytest.MonkeyPatch, count: int) -> None:
    """As if torch saw so many GPUs."""
    patch.setattr(torch.cuda, "is_available", lambda: count > 0)
    patch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto_is_the_gpu_where_there_is_one_else_the_cpu(monkeypatch):
    for count, expected in ((0, "cpu"), (1, "cuda"), (2, "cuda")):
        seen(monkeypatch, count)
        assert resolve_device() == resolve_device("auto") == torch.device(expected)


def test_a_device_that_is_here_is_taken_as_it_is_named(monkeypatch):
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    seen(monkeypatch, 2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert resolve_device(name) == torch.device(name) == resolve_device(torch.device(name))


@pytest.mark.parametrize("name", ["gpu", "tpu", "meta", "mps", "", "cuda:", "cuda:-1", "cuda:x", "cuda:1\n", "CUDA", "cpu:1",
                                  "cuda:" + "9" * 30, "cuda:٠", "auto:0", None, 0])
def test_what_is_no_device_of_ours_is_refused_by_name(name, monkeypatch):
    for count, ending in ((0, "no CUDA device"), (1, "1 CUDA device, counted from 0"), (2, "2 CUDA devices, counted from 0")):
        seen(monkeypatch, count)
        with pytest.raises(ConfigError) as refused:
            resolve_device(name)
        expected = f"device {str(name)!r} cannot be used here: give auto, cpu, cuda or cuda:N; torch sees {ending}"
        assert str(refused.value) == expected


def test_a_gpu_that_is_not_here_is_refused_with_the_number_of_those_that_are(monkeypatch):
    for count, name in ((0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (2, "cuda:2"), (8, "cuda:99")):
        seen(monkeypatch, count)
        with pytest.raises(ConfigError, match=f"device '{name}' cannot be used here.* torch sees {count or 'no'} CUDA device"):
            resolve_device(name)


def test_the_words_on_a_device_name_the_processor_and_its_threads():
    said = device_in_words(torch.device("cpu"))
    assert said.startswith("cpu (") and said.endswith(f"), {torch.get_num_threads()} CPU threads") and "()" not in said


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """As much of a run folder as is looked at before its device."""
    folder = tmp_path_factory.mktemp("run")
    tiny_model().save_pretrained(folder / "best")
    return folder


@pytest.mark.parametrize("name", ["gpu", "cuda:7", "tpu"])
def test_training_evaluation_chat_prepare_and_comet_refuse_it_by_one_sentence(name, run, sample_store, tmp_path):
    from case_fast.commands.runs import run_evaluation
    from case_fast.generation import GenerationConfig

    quiet = Console(file=io.StringIO())
    bundled = ("bundled",) * 4
    users = {
        "train": lambda: train(sample_store, tmp_path / "new", preset("demo", device=name), quiet),
        "evaluate": lambda: run_evaluation(str(run), str(sample_store.path), "test", 1, 1, name, GenerationConfig(), quiet),
        "load": lambda: load(run, name),
        "prepare": lambda: prepare(PrepareSettings(*bundled, out=str(tmp_path / "store"), device=name)),
        "COMET": lambda: CometSource(tmp_path / "nowhere", device=name),
    }
    with pytest.raises(ConfigError) as refused:
        resolve_device(name)
    for user, call in users.items():
        with pytest.raises(ConfigError) as found:
            call()
        assert str(found.value) == str(refused.value), user
    assert not list(tmp_path.iterdir())  # nothing was begun
