"""Orders that leave rows out from the border of an epoch on."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.filters.selection import Selection
from data_pipeline.loader.loader import LoaderSettings, StepLoader
from data_pipeline.order.kept_order import KeptOrder
from data_pipeline.order.mixed_order import MixedOrder
from data_pipeline.order.order import Order
from data_pipeline.order.revisions import (
    RevisedOrder,
    Revision,
    expand,
    next_border,
    revise,
    to_ranges,
)
from tests.data_pipeline.photos import pack, stream


def epoch(order, start: int, rows: int) -> list[int]:
    return sorted(order.rows(np.arange(start, start + rows)).tolist())


@given(st.lists(st.integers(0, 500), max_size=60))
@settings(max_examples=50)
def test_ranges_are_the_rows(rows):
    ranges = to_ranges(rows)
    assert expand(ranges).tolist() == sorted(set(rows))
    assert all(stop < first for (_, stop), (first, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize("n", [100, 40_000])
def test_epochs_before_the_border_are_as_they_were_and_those_behind_it_lack_the_rows(n):
    base = Order(n, seed=3)
    border, bad = 2 * n, [5, 6, 7, n - 1]
    order = RevisedOrder(base, [Revision(border, to_ranges(bad), [])])
    before = np.arange(border)
    assert np.array_equal(order.rows(before), base.rows(before))
    left = sorted(set(range(n)) - set(bad))
    for number in range(3):
        start = border + number * len(left)
        assert epoch(order, start, len(left)) == left
    # Another epoch, another order; and one call that crosses the border gives both sides.
    one, two = (order.rows(border + k * len(left) + np.arange(len(left))) for k in range(2))
    assert (one == two).mean() < 0.1
    across = order.rows(np.arange(border - 5, border + 5))
    assert np.array_equal(across, np.concatenate([base.rows(before[-5:]), one[:5]]))


def test_substitutes_are_never_excluded_rows():
    order = RevisedOrder(Order(50, seed=1), [Revision(50, [[0, 25]], [])])
    for attempt in range(1, 40):
        assert order.rows(np.arange(50, 100), attempt).min() >= 25


def test_revisions_add_up_and_rows_can_come_back():
    order = RevisedOrder(
        Order(20, seed=1),
        [
            Revision(20, [[1, 3]], []),
            Revision(20, [[7, 8]], []),  # from another checkpoint of the same epoch
            Revision(20 + 2 * 17, [[9, 10]], [[1, 2]]),
        ],
    )
    assert epoch(order, 20, 17) == sorted(set(range(20)) - {1, 2, 7})
    assert epoch(order, 54, 17) == sorted(set(range(20)) - {2, 7, 9})
    assert order.epochs(20) == 1 and order.epochs(37) == 2 and order.epochs(54 + 34) == 5
    assert [order.next_border(p) for p in (0, 54, 55, 71, 72)] == [54, 54, 71, 71, 88]
    assert next_border(Order(20, seed=1), 0) == next_border(Order(20, seed=1), 20) == 20


@pytest.mark.parametrize("start", [0, 7, 19, 21])
def test_a_revision_inside_an_epoch_is_refused(start):
    with pytest.raises(ValueError, match="no border of an epoch"):
        RevisedOrder(Order(20, seed=1), [Revision(start, [[1, 2]], [])])


def test_a_revision_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="leaves no row"):
        RevisedOrder(Order(20, seed=1), [Revision(20, [[0, 20]], [])])


def test_filtered_rows_stay_out_and_the_state_travels():
    kept = Selection.everything(100).without(np.arange(0, 100, 2))
    base = KeptOrder(Order(50, seed=2), kept)
    order = RevisedOrder(base, [Revision(50, [[0, 4]], [])])  # of these only 1 and 3 took part
    assert epoch(order, 50, 48) == list(range(5, 100, 2))
    copy = pickle.loads(pickle.dumps(order))
    assert np.array_equal(copy.rows(np.arange(200)), order.rows(np.arange(200)))


def test_each_source_of_a_mixture_has_borders_of_its_own():
    orders = {"a": Order(30, seed=1), "b": Order(12, seed=2)}
    mixed = MixedOrder(orders, [3, 1], seed=5)
    taken = mixed.taken(60)
    revised = revise(mixed, {"b": [Revision(next_border(orders["b"], taken["b"]), [[2, 4]], [])]})
    positions = np.arange(400)
    before, after = mixed.rows(positions), revised.rows(positions)
    assert np.array_equal(before[:60], after[:60])
    of_b = before >= 30
    assert np.array_equal(of_b, after >= 30) and np.array_equal(before[~of_b], after[~of_b])
    border = revised.by_source()["b"]._starts[1]
    own = after[of_b] - 30
    assert np.array_equal(own[:border], before[of_b][:border] - 30)
    assert sorted(own[border : border + 10].tolist()) == [0, 1, *range(4, 12)]
    assert revised.epochs_by_source(400)["b"] > mixed.epochs_by_source(400)["b"]
    assert [rows.tolist() for rows in mixed.split(np.array([3, 29, 30, 41])).values()] == [
        [3, 29],
        [0, 11],
    ]
    with pytest.raises(ValueError, match=r"revisions of the sources \['c'\]"):
        revise(mixed, {"c": []})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_takes_up_a_new_order_in_mid_run(tmp_path, workers):
    task = stream(pack(tmp_path, 30), 12, 4, name="a")
    settings = LoaderSettings(workers=workers)
    loader = StepLoader({"a": task}, lambda step: ("a", step), settings, 0, 1, 0, 8)
    revision = {"": [Revision(30, [[4, 7]], [])]}
    expected = revise(task.order, revision).rows(np.arange(96))
    rows = {}
    for window in loader:
        for batch in window.micro_batches:
            rows |= dict(zip(batch["position"].tolist(), batch["row"].tolist(), strict=True))
        if window.step == 1:  # positions up to 23; workers have read ahead behind 30 by now
            task.order = revise(task.order, revision)
            loader.restart()
    assert rows == dict(enumerate(expected.tolist()))
