"""Kept rows: exact both ways, monotone, small, and equal in every process."""

import pickle
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.filters.selection import Selection
from data_pipeline.order.kept_order import KeptOrder
from data_pipeline.order.order import Order
from data_pipeline.storage.errors import ShardError


def selection_of(mask: np.ndarray) -> Selection:
    return Selection.gather(len(mask), [mask])


masks = st.tuples(
    st.integers(1, 5000), st.sampled_from([0.0, 0.001, 0.03, 0.5, 0.97, 1.0]), st.integers(0, 99)
).map(lambda drawn: np.random.default_rng(drawn[2]).random(drawn[0]) < drawn[1])


@given(masks)
def test_select_and_rank_are_those_of_a_list(mask):
    selection = selection_of(mask)
    kept = np.flatnonzero(mask)
    assert (selection.n_rows, selection.n_kept) == (len(mask), len(kept))
    ranks = np.random.default_rng(0).permutation(len(kept))
    assert np.array_equal(selection.select(ranks), kept[ranks])
    assert np.array_equal(selection.rank(kept), np.arange(len(kept)))
    rows = np.arange(len(mask))
    assert np.array_equal(selection.contains(rows), mask)
    assert np.array_equal(selection.rank(rows), np.cumsum(mask) - mask)


@given(masks, st.lists(st.integers(1, 900), max_size=9), st.integers(0, 99))
def test_masks_of_shards_of_any_length_make_one_bitmap(mask, lengths, seed):
    borders = np.minimum(np.cumsum(lengths), len(mask)).astype(int)
    parts = np.split(mask, borders)
    gathered = Selection.gather(len(mask), parts)
    assert gathered.digest == selection_of(mask).digest
    rows = np.random.default_rng(seed).integers(0, len(mask), 20)
    left = mask.copy()
    left[rows] = False
    assert gathered.without(rows).digest == selection_of(left).digest
    assert gathered.digest == selection_of(mask).digest  # as it was


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1023, 1024, 1025, 4096])
def test_everything(count):
    selection = Selection.everything(count)
    assert selection.digest == selection_of(np.ones(count, bool)).digest
    assert np.array_equal(selection.select(np.arange(count)), np.arange(count))


def test_rows_that_do_not_exist_are_refused():
    selection = selection_of(np.arange(100) % 3 == 0)
    for ask, value in ((selection.select, 34), (selection.rank, 100), (selection.contains, -1)):
        with pytest.raises(IndexError):
            ask(np.array([0, value]))
    with pytest.raises(ValueError, match="masks of 3 rows for a data set of 4"):
        Selection.gather(4, [np.ones(3, bool)])
    with pytest.raises(ValueError, match="more masks than the 2 rows"):
        Selection.gather(2, [np.ones(3, bool)])
    assert selection.select(np.empty(0, np.int64)).size == 0


def test_a_file_is_mapped_and_a_pickle_of_it_is_its_path(tmp_path):
    selection = selection_of(np.arange(1_000_000) % 7 < 3)
    selection.save(tmp_path / "kept")
    mapped = Selection.load(tmp_path / "kept")
    for copy in (mapped, pickle.loads(pickle.dumps(mapped)), pickle.loads(pickle.dumps(selection))):
        assert copy.digest == selection.digest
        assert copy.select(np.array([5])) == selection.select(np.array([5]))
    assert len(pickle.dumps(mapped)) < 1000
    data = bytearray((tmp_path / "kept").read_bytes())
    data[-500] ^= 4
    (tmp_path / "kept").write_bytes(data)
    with pytest.raises(ShardError, match="digest does not match"):
        Selection.load(tmp_path / "kept")
    (tmp_path / "kept").write_bytes(data[: len(data) // 2])
    with pytest.raises(ShardError, match="damaged list of kept rows"):
        Selection.load(tmp_path / "kept")


def test_size_and_cost():
    words = np.random.default_rng(0).integers(0, 2**63, 16 * 20_000).astype(np.uint64)
    selection = Selection(words, 1024 * 20_000)
    extra = selection._before.nbytes
    assert extra < 0.1 * words.nbytes
    ranks = np.random.default_rng(1).integers(0, selection.n_kept, 128)
    begin = time.process_time()
    for _ in range(100):
        selection.select(ranks)
    assert (time.process_time() - begin) / 12_800 < 30e-6  # about 0.6 us where nothing else runs


def test_an_order_over_kept_rows_is_exact_and_keeps_its_locality():
    mask = np.random.default_rng(3).random(70_000) < 0.6
    kept = np.flatnonzero(mask)
    order = KeptOrder(Order(len(kept), 1, row_lanes=64), selection_of(mask))
    assert (order.n_rows, order.stored_rows) == (len(kept), 70_000)
    rows = order.rows(np.arange(3 * len(kept)))
    for epoch in np.split(rows, 3):
        assert np.array_equal(np.sort(epoch), kept)
    # A lane comes back every 512 positions: its next row is the next kept one in the shard.
    steps = rows[512 : len(kept)] - rows[: len(kept) - 512]
    assert ((steps > 0) & (steps < 20)).mean() > 0.9
    substitutes = order.rows(np.arange(100), attempt=1)
    assert mask[substitutes].all() and len(set(substitutes.tolist())) == 100
    with pytest.raises(ValueError, match="an order of 3 rows"):
        KeptOrder(Order(3, 1), selection_of(mask))
