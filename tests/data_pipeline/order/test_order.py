"""The order: every row once per epoch, well shuffled, near-sequential, in no memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order.order import Order

AWKWARD = [1, 2, 3, 50, 300, 4095, 4096, 4097, 5000, 100_003, 118_287, 600_001]
CLASSES = 1000
WINDOW = 1024


def epoch_rows(order: Order, epoch: int) -> np.ndarray:
    return order.rows(np.arange(epoch * order.n_rows, (epoch + 1) * order.n_rows))


@pytest.mark.parametrize("n_rows", AWKWARD)
def test_every_row_once_per_epoch(n_rows):
    order = Order(n_rows, seed=5)
    epochs = [epoch_rows(order, epoch) for epoch in (0, 1, 1_000_003)]
    for rows in epochs:
        assert np.array_equal(np.sort(rows), np.arange(n_rows))
    if n_rows >= 50:
        assert not np.array_equal(epochs[0], epochs[1])


@settings(max_examples=150, deadline=None)
@given(
    n_rows=st.integers(1, 3000),
    seed=st.integers(0, 2**63),
    row_lanes=st.integers(1, 40),
    phases=st.integers(1, 6),
    chunk_rows=st.integers(1, 70),
)
def test_every_row_once_for_any_plan(n_rows, seed, row_lanes, phases, chunk_rows):
    order = Order(n_rows, seed, row_lanes, phases, chunk_rows)
    assert np.array_equal(np.sort(epoch_rows(order, 3)), np.arange(n_rows))


@settings(max_examples=50, deadline=None)
@given(n_rows=st.integers(1, 100_000), start=st.integers(0, 10**12), count=st.integers(0, 700))
def test_a_position_does_not_depend_on_its_company(n_rows, start, count):
    order = Order(n_rows, seed=1)
    positions = np.arange(start, start + count)
    shuffled = np.random.default_rng(0).permutation(positions)
    by_position = dict(zip(shuffled.tolist(), order.rows(shuffled).tolist(), strict=True))
    assert [by_position[p] for p in positions.tolist()] == order.rows(positions).tolist()


def test_epoch():
    order = Order(300, seed=0)
    assert [order.epoch(p) for p in (0, 299, 300, 10**12)] == [0, 0, 1, 10**12 // 300]


def test_describe_accounts_for_every_row():
    for n_rows in AWKWARD:
        parts = Order(n_rows, 0).describe()
        assert (
            sum(parts[f"{part}_rows"] for part in ("first_pass", "second_pass", "tail")) == n_rows
        )
    assert Order(600_001, 0).describe()["first_pass_rows"] == 262_144
    assert Order(4095, 0).describe()["tail_rows"] == 4095


@pytest.mark.parametrize("arguments", [(0, 0), (5, 0, 0), (5, 0, 1, 0), (5, 0, 1, 1, 0)])
def test_sizes_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        Order(*arguments)


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="start at 0"):
        Order(10, 0).rows(np.array([3, -1]))


def distinct_classes(labels: np.ndarray) -> np.ndarray:
    starts = range(0, len(labels) - WINDOW, 331)
    return np.array([len(np.unique(labels[start : start + WINDOW])) for start in starts])


@pytest.mark.parametrize("batch", [16, 48, 1024])
@pytest.mark.parametrize("n_rows", [118_287, 270_000, 540_000, 1_281_167])
def test_windows_of_class_sorted_shards_are_diverse(n_rows, batch):
    """Sliding windows of 1,024 positions over two epochs, seams between the parts included."""
    order = Order.plan(n_rows, 11, batch)
    labels = np.arange(n_rows) * CLASSES // n_rows
    found = distinct_classes(labels[order.rows(np.arange(2 * n_rows))])
    independent = CLASSES * (1 - (1 - 1 / CLASSES) ** WINDOW)
    assert found.mean() >= 0.95 * independent
    assert found.min() >= 0.9 * independent  # a single window varies by 2 %


def test_lanes_read_nearly_sequentially():
    n_rows = 1_281_167
    order = Order(n_rows, 2)
    rows = epoch_rows(order, 0)[: n_rows - n_rows % order.lanes].reshape(-1, order.lanes)
    steps_of_a_lane = np.diff(rows, axis=0)
    assert (steps_of_a_lane == 1).mean() > 0.975  # 1 - 1/64 in the first pass


def test_chunks_are_opened_evenly():
    """No step asks the storage for all its lanes' next chunks at once."""
    order = Order(2_000_000, 2)
    rows = order.rows(np.arange(order.describe()["first_pass_rows"]))
    opened = (rows % order.chunk_rows == 0).reshape(-1, 1024).sum(axis=1)
    assert abs(opened.mean() - 1024 / order.chunk_rows) < 0.1
    assert opened.max() <= 64


@pytest.mark.parametrize("batch", [1, 2, 16, 48, 100, 512, 768, 1000, 1024, 1536, 4096, 10_000])
def test_plan_keeps_a_lane_at_one_place_of_the_batch(batch):
    order = Order.plan(10**9, 0, batch)
    assert order.row_lanes % batch == 0 or batch % order.row_lanes == 0
    assert 4096 <= order.lanes <= 8192 + 8 * 512


def test_a_prime_batch_still_gets_a_plan():
    assert Order.plan(10**6, 0, 1031).lanes == 4096


def test_substitutes_of_a_batch_never_meet():
    """Any position of a batch may be replaced any number of times, by ranks that do not talk."""
    order = Order(5000, 3)
    for batch_start in (0, 4992, 123_456):
        batch = np.arange(batch_start, batch_start + 256)
        batch = batch[batch // 5000 == batch_start // 5000]
        chosen = np.concatenate([order.rows(batch, attempt) for attempt in range(1, 16)])
        assert len(np.unique(chosen)) == len(chosen)


def test_substitutes_are_shuffled_and_repeatable():
    order = Order(50_000, 3)
    chosen = order.rows(np.arange(1000), 2)
    assert chosen.tolist() == order.rows(np.arange(1000), 2).tolist()
    assert abs(chosen.mean() - 25_000) < 2500
    assert (np.diff(chosen) == 1).mean() < 0.01
    assert not np.array_equal(chosen, order.rows(np.arange(1000), 18))


def test_a_billion_rows_take_no_memory():
    """Memory is bounded by the positions of one call; the benchmark measures the time."""
    tracemalloc.start()
    order = Order.plan(10**9, 0, 1024)
    for call in range(40):
        order.rows(np.arange(128) + call * 10**10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
