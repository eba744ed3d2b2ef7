"""Learning rate, early stopping, and the order of examples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from case_fast.errors import ConfigError
from case_fast.training import TrainConfig
from case_fast.training.sampler import WINDOW, Sampler, epoch_order
from case_fast.training.schedule import EarlyStopping, cooling, noam


@pytest.mark.parametrize(
    ("step", "expected"), [(1, 4.3920523e-08), (6_000, 2.6352314e-04), (12_000, 5.2704628e-04), (48_000, 2.6352314e-04)]
)
def test_noam_of_the_paper(step, expected):
    assert noam(step, 300, 12_000) == pytest.approx(expected, rel=1e-7)
    assert noam(step, 300, 12_000, scale=0.5) == pytest.approx(expected / 2, rel=1e-7)


def test_noam_rises_to_the_end_of_warmup_and_falls_after_it():
    rates = [noam(step, 64, 50) for step in range(1, 200)]
    assert np.argmax(rates) == 49
    assert all(np.diff(rates[:50]) > 0) and all(np.diff(rates[49:]) < 0)


def test_the_learning_rate_falls_over_the_last_steps_of_a_phase():
    assert [cooling(step, 10, 4) for step in range(1, 11)] == [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [cooling(step, 4, 4) for step in (1, 4)] == [1, 0.25]
    assert cooling(5, None, 4) == cooling(5, 5, 0) == 1  # no end is known, or no cooldown asked for


def test_early_stopping_counts_failures_in_a_row_after_the_minimum():
    stopping = EarlyStopping(patience=2, min_steps=30)
    assert stopping.update(10, 5.0)
    assert not stopping.update(20, 6.0) and stopping.failures == 0  # too early to count
    assert not stopping.update(30, 5.0) and stopping.failures == 1  # equal is no better
    assert stopping.update(40, 4.0) and (stopping.failures, stopping.best_step) == (0, 40)
    assert not stopping.update(50, 4.5) and not stopping.stop
    assert not stopping.update(60, 4.5) and stopping.stop
    assert (stopping.best, stopping.best_step) == (4.0, 40)


@given(st.integers(1, 5), st.integers(0, 40), st.integers(1, 7), st.lists(st.sampled_from([1.0, 2.0]), max_size=6))
def test_earliest_stop_is_what_happens_when_nothing_gets_better(patience, min_steps, every, values):
    stopping = EarlyStopping(patience, min_steps)
    step = 0
    for value in values:
        step += every
        stopping.update(step, value)
        if stopping.stop:
            return
    foreseen = stopping.earliest_stop(step, every)
    while not stopping.stop:
        step += every
        stopping.update(step, 3.0)
    assert step == foreseen


def test_the_paper_s_recipe_ends_at_step_18_000_at_the_earliest():
    config = TrainConfig()
    assert config.fewest(config.lengths(1)[-1]) == (-(-13_000 // 2_000) + 3 - 1) * 2_000 == 18_000
    assert config.fewest(TrainConfig(max_steps=15_000).lengths(1)[-1]) == 15_000
    quick = TrainConfig(min_steps=0, validate_every=10, patience=2)
    assert quick.fewest(quick.lengths(1)[-1]) == 30  # the first validation is the best so far
    stopping, step = EarlyStopping(3, 13_000), 0
    while not stopping.stop:
        step += 2_000
        stopping.update(step, float(step))  # worse each time
    assert (step, stopping.best_step) == (18_000, 2_000)


@pytest.mark.parametrize("batching", ["bucketed", "balanced"])
@given(st.integers(1, 500), st.integers(1, 6), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_batches_cut_by_cost_hold_each_example_once_an_epoch(batching, examples, batch_size, seed, epoch):
    costs = np.random.default_rng(0).integers(1, 50, examples)
    sampler = Sampler(examples, batch_size, seed, batching, costs)
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    batches = [sampler.indices(step) for step in steps]
    assert sorted(index for batch in batches for index in batch) == list(range(examples))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    order = epoch_order(seed, epoch, examples).tolist()
    for first in range(0, len(batches), WINDOW):  # each window holds the examples that the shuffle gave it
        found = [index for batch in batches[first : first + WINDOW] for index in batch]
        assert sorted(found) == sorted(order[first * batch_size : (first + WINDOW) * batch_size])
    for step in (steps[-1], steps[0]):  # a function of the step alone: another sampler, in another order
        assert Sampler(examples, batch_size, seed, batching, costs).indices(step) == batches[step - steps[0]]


def test_bucketed_batches_are_alike_inside_and_balanced_ones_among_each_other():
    costs = np.random.default_rng(1).lognormal(3, 0.5, 4_000)

    def spread(batching: str) -> tuple[float, float]:
        sampler = Sampler(len(costs), 16, 0, batching, costs)
        batches = [costs[sampler.indices(step)] for step in range(sampler.steps_per_epoch)]
        totals = np.array([batch.sum() for batch in batches])
        return float(np.mean([batch.std() for batch in batches])), float(totals.std())

    within, among = zip(*(spread(batching) for batching in ("bucketed", "shuffled", "balanced")), strict=True)
    assert within[0] < 0.2 * within[1] and among[2] < 0.4 * among[1] < 0.2 * among[0]


def test_bucketed_batches_come_in_random_order():
    costs = np.arange(64 * 4)
    sampler = Sampler(len(costs), 4, 0, "bucketed", costs)
    first = [sampler.indices(step)[0] for step in range(WINDOW)]
    assert sorted(first) == list(range(0, 64 * 4, 4)) != first
    assert first != [sampler.indices(step)[0] for step in range(WINDOW, 2 * WINDOW)]  # the next epoch


def test_batching_by_cost_needs_costs():
    with pytest.raises(ConfigError, match="batching 'bucketed' needs the cost of each example"):
        Sampler(5, 2, 0, "bucketed")
    with pytest.raises(ConfigError, match="batching 'balanced' needs the cost of each example"):
        Sampler(5, 2, 0, "balanced", np.ones(4))
    with pytest.raises(ConfigError, match="batching must be one of shuffled, bucketed, balanced, not 'sorted'"):
        Sampler(5, 2, 0, "sorted")


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_each_epoch_holds_each_example_once(examples, batch_size, seed, epoch):
    sampler = Sampler(examples, batch_size, seed)
    first = epoch * sampler.steps_per_epoch
    batches = [sampler.indices(step) for step in range(first, first + sampler.steps_per_epoch)]
    assert sorted(index for batch in batches for index in batch) == list(range(examples))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert len(batches[-1]) == (examples - 1) % batch_size + 1  # the short last batch is kept
    assert [Sampler(examples, batch_size, seed).indices(step) for step in (first, first)] == [batches[0]] * 2


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 9))
def test_the_order_does_not_depend_on_the_batch_size(examples, batch_size, seed):
    sampler, one = Sampler(examples, batch_size, seed), Sampler(examples, 1, seed)
    order = [index for step in range(2 * sampler.steps_per_epoch) for index in sampler.indices(step)]
    assert order == [one.indices(step)[0] for step in range(2 * examples)]


def test_the_order_is_the_same_everywhere_and_for_good():
    assert epoch_order(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert epoch_order(2**62, 10**6, 10).tolist() == [4, 9, 5, 2, 8, 7, 1, 3, 6, 0]


def test_orders_differ_between_epochs_and_seeds_and_are_uniform():
    assert epoch_order(3, 0, 50).tolist() != epoch_order(3, 1, 50).tolist() != epoch_order(4, 1, 50).tolist()
    places = np.array([epoch_order(7, epoch, 5) for epoch in range(2_000)])
    for place in places.T:
        counts = np.bincount(place, minlength=5)
        assert ((counts - 400) ** 2 / 400).sum() < 18.5  # chi-square with 4 degrees of freedom: p = 0.001


def test_an_empty_split_is_refused():
    with pytest.raises(ConfigError, match="holds no examples"):
        Sampler(0, 4, 0)
