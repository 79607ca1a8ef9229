"""Weighted sources of one task: exact counts, whole epochs, partners that stay together."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order.mixed_order import MixedOrder
from data_pipeline.order.mixture import BlockCycle, arrange
from data_pipeline.order.order import Order
from data_pipeline.samples.captions import CaptionDataSettings

weights = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5)


@given(weights, st.integers(0, 10**12), st.integers(1, 300), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_vectors_single_positions_and_counting_agree(values, start, count, seed):
    cycle = BlockCycle(values, seed, "test")
    positions = np.arange(start, start + count)
    choices, places = BlockCycle(values, seed, "test").locate(positions)
    seen = cycle.before(start)
    assert seen.sum() == start
    for position, choice, place in zip(positions.tolist(), choices, places, strict=True):
        assert cycle.locate_one(position) == (choice, place)
        assert place == seen[choice]
        seen[choice] += 1
    assert np.array_equal(cycle.before(start + count), seen)
    shuffled = np.random.default_rng(0).permutation(count)
    again, _ = cycle.locate(positions[shuffled])
    assert np.array_equal(again, choices[shuffled])


def test_arrangements_are_uniform_and_zeros_are_allowed():
    choices, earlier = arrange(np.array([2, 0, 1]), np.arange(6000, dtype=np.uint64))
    assert Counter(map(tuple, choices.tolist())).keys() == {(0, 0, 2), (0, 2, 0), (2, 0, 0)}
    assert all(1800 < n < 2200 for n in Counter(map(tuple, choices.tolist())).values())
    assert earlier[(choices == [0, 0, 2]).all(1)][0].tolist() == [0, 1, 0]


def mixed(sizes: dict[str, int], values: list[float], seed: int = 5) -> MixedOrder:
    return MixedOrder(
        {n: Order.plan(s, i, 64) for i, (n, s) in enumerate(sizes.items())}, values, seed
    )


@given(
    st.lists(
        st.tuples(st.integers(1, 400), st.sampled_from([0.5, 1.0, 2.0, 3.7])),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 3),
)
@settings(max_examples=30, deadline=None)
def test_exact_counts_and_every_row_once_per_epoch_of_its_source(parts, first_cycle):
    sizes = {f"s{i}": size for i, (size, _) in enumerate(parts)}
    order = mixed(sizes, [weight for _, weight in parts])
    bounds = np.cumsum([0, *sizes.values()])
    length = 2 * order.cycle.length
    for cycle in range(first_cycle, first_cycle + 2):  # in every cycle, not on average
        rows = order.rows(np.arange(cycle * length, (cycle + 1) * length))
        counts, _ = np.histogram(rows, bounds)
        assert counts.tolist() == (2 * order.cycle.counts).tolist()
    horizon = min(
        20_000,
        4
        * length
        * max(-(-s // c) for s, c in zip(sizes.values(), 2 * order.cycle.counts, strict=True)),
    )
    rows = order.rows(np.arange(horizon))
    for number, size in enumerate(sizes.values()):
        own = rows[(rows >= bounds[number]) & (rows < bounds[number + 1])] - bounds[number]
        for epoch in range(len(own) // size):
            assert np.array_equal(np.sort(own[epoch * size :][:size]), np.arange(size))


def test_partners_share_a_source_and_are_neighbours_in_it():
    order = mixed({"big": 900, "small": 50}, [2.0, 1.3])
    choices, places = order.locate(np.arange(4000))
    assert np.array_equal(choices[::2], choices[1::2])
    assert np.array_equal(places[::2] + 1, places[1::2])
    assert np.array_equal(places[::2] % 2, np.zeros(2000))


def test_substitutes_stay_in_their_source_and_out_of_the_batch():
    order = mixed({"big": 2000, "small": 640}, [3.0, 1.0])
    batch = np.arange(32 * 7, 32 * 8)
    choices, _ = order.locate(batch)
    every = [order.rows(batch, attempt) for attempt in range(16)]
    for rows in every[1:]:
        assert np.array_equal((rows >= 2000).astype(int), choices)
    # All rows that 15 attempts give for one batch differ, as within a single order.
    assert len(set(np.stack(every[1:]).ravel().tolist())) == 15 * 32
    assert order.can_avoid(batch, int(batch[0]))
    tiny = mixed({"big": 2000, "tiny": 3}, [1.0, 1.0])
    verdicts = {
        int(c): tiny.can_avoid(batch, int(p))
        for p, c in zip(batch, tiny.locate(batch)[0], strict=True)
    }
    assert verdicts == {0: True, 1: False}


def test_epochs_of_each_source():
    order = mixed({"big": 100, "small": 10}, [3.0, 1.0])
    assert order.epochs(8) == {"big": 0.06, "small": 0.2}
    for samples in (0, 7, 8, 123):
        choices, _ = order.locate(np.arange(samples))
        expected = {"big": (choices == 0).sum() / 100, "small": (choices == 1).sum() / 10}
        assert order.epochs(samples) == expected


def test_cost_does_not_depend_on_the_position():
    order = mixed({"a": 10**8, "b": 10**6}, [0.1234, 0.9])
    begin = time.perf_counter()
    for start in (0, 10**9, 10**15):
        for batch in range(20):
            order.rows(np.arange(start + 128 * batch, start + 128 * (batch + 1)))
    assert time.perf_counter() - begin < 60  # sample by sample it would be years


def test_is_the_same_forever():
    """Frozen: another deal here would silently change what every resumed run trains on."""
    order = mixed({"a": 1000, "b": 70}, [2.0, 1.0])
    assert order.rows(np.array([0, 1, 2, 3, 4, 5, 6, 7])).tolist() == GOLDEN_START
    assert order.rows(np.array([10**9, 10**9 + 1, 10**9 + 2])).tolist() == GOLDEN_FAR


GOLDEN_START = [405, 41, 1002, 1015, 527, 239, 83, 33]
GOLDEN_FAR = [176, 507, 668]


def test_settings_name_shards_or_sources():
    two = {"a": {"shards": ["x"], "weight": 2.0}, "b": {"shards": ["y"]}}
    assert CaptionDataSettings(sources=two).sources["b"].weight == 1.0
    with pytest.raises(ValueError, match="shards, sources and stream is needed, none is given"):
        CaptionDataSettings()
    with pytest.raises(ValueError, match="shards and sources are given; set one to null"):
        CaptionDataSettings(shards=["x"], sources=two)
    with pytest.raises(ValueError, match="'a b' must be letters, digits and _ only"):
        CaptionDataSettings(sources={"a b": {"shards": ["x"]}})
    with pytest.raises(ValueError, match="greater than 0"):
        CaptionDataSettings(sources={"a": {"shards": ["x"], "weight": 0.0}})
