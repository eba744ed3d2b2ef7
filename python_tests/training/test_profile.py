"""`case-fast profile`: real steps of both phases, a trace that Perfetto reads, and floors counted from shapes."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from helpers import offsets
from torch.profiler import ProfilerActivity, profile
from training_helpers import MemoryStore, run

from case_fast.cli import main
from case_fast.errors import ConfigError, PlaceError
from case_fast.ops import graph_attention, linear_cross_entropy, packed_attention
from case_fast.training import profile as profile_module
from case_fast.training.floors import COSTS, Rates, measure_rates
from case_fast.training.profile import markdown, parts_of, profile_training

RATES = Rates(flop=1e9, bytes=1e12)  # so that a floor in ms is the number of MFLOP


def recorded(function) -> dict[str, object]:
    """The parts of one call, by name."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        function()
    parts = parts_of(found.events(), 1, RATES, {1, 6, 5})
    return {part.name: part for part in parts}


def test_products_are_counted_from_their_shapes():
    x, weight, bias = torch.randn(30, 6), torch.randn(5, 6), torch.randn(5)
    part = recorded(lambda: torch.addmm(bias, x, weight.T))["aten::addmm"]
    assert part.gflop == pytest.approx(2 * 30 * 6 * 5 / 1e9) and part.shapes == "5, n x 6, 6 x 5" and part.calls == 1
    assert part.megabytes == pytest.approx(4 * (30 * 6 + 6 * 5 + 30 * 5) / 1e6)
    assert part.floor_ms == pytest.approx(2 * 30 * 6 * 5 / 1e6)


def test_own_ops_are_seen_by_name_with_their_shapes_forward_and_backward():
    q, k, v = (torch.randn(12, 2, 3, requires_grad=True) for _ in range(3))
    cu, indptr = offsets([4, 8]), torch.arange(13)
    hidden, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((12, 6), (20, 6), (20,)))

    def step():
        out = packed_attention(q, k, v, cu, cu).sum() + graph_attention(q, k, v, indptr, torch.arange(12)).sum()
        (out + linear_cross_entropy(hidden, weight, bias, torch.arange(12))[0].sum()).backward()

    found = recorded(step)
    pairs, edges, scores = 12 * 12 / 2, 12, 12 * 20
    expected = {"packed_attention": 4 * pairs * 6, "graph_attention": 4 * edges * 6, "linear_cross_entropy": 2 * scores * 6}
    for family, flop in expected.items():
        assert found[f"case_fast::{family}_forward"].gflop == pytest.approx(flop / 1e9), family
        assert found[f"case_fast::{family}_backward"].gflop == pytest.approx(2 * flop / 1e9), family


def test_every_cost_is_of_an_op_that_exists():
    coming = ("linear_forward", "linear_backward", "residual_norm", "pooled_attention")
    for name in COSTS:
        space, op = name.split("::")
        assert hasattr(getattr(torch.ops, space), op) or op.startswith(coming), name


def test_rates_are_those_of_a_machine():
    rates = measure_rates(torch.device("cpu"), seconds=0.02)
    assert 1e8 < rates.flop < 1e16 and 1e7 < rates.bytes < 1e14
    assert rates.seconds(rates.flop, 0) == 1 and rates.seconds(0, 2 * rates.bytes) == 2


def test_profile_of_both_phases(sample_store, tmp_path, capsys):
    assert main(["profile", "--store", str(sample_store.path), "--steps", "1", "--out", str(tmp_path / "found")]) == 0
    told = capsys.readouterr().out
    for phase in ("bow", "all"):
        assert f"Phase {phase}:" in told and str(tmp_path / "found" / f"{phase}.trace.json.gz") in told.replace("\n", "")
        assert (tmp_path / "found" / f"{phase}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        events = json.loads(gzip.decompress((tmp_path / "found" / f"{phase}.trace.json.gz").read_bytes()))["traceEvents"]
        names = {event.get("name") for event in events}
        ours = {f"case_fast::{op}" for op in ("graph_attention_forward", "pooled_attention_backward", "linear_backward")}
        assert ours | {"aten::_fused_adam_"} <= names
    assert told.count("other parts") == told.count("between ops") == 2


def test_profile_of_a_run(tmp_path, monkeypatch):
    store = MemoryStore()
    run(store, tmp_path / "run")
    monkeypatch.setattr(profile_module, "WARM_UP", 60)  # more steps than the log's records are apart
    rates, phases = profile_training(store, tmp_path / "found", 1, tmp_path / "run", "cpu")
    profiled, other = phases
    assert profiled.phase == "bow" and other.phase == "all" and profiled.ms > 0
    assert " x 16" in markdown(profiled, rates)  # the run's own width


def test_profile_refuses_what_it_cannot_do(sample_store, tmp_path):
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        profile_training(sample_store, tmp_path, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaceError, match="cannot be written .Not a directory"):
        profile_training(sample_store, tmp_path / "file" / "folder")
    assert main(["profile", "--store", str(tmp_path / "none")]) == 1
