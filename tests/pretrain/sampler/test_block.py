"""The schedule: exact shares in every cycle, closed-form visits, cheap far out."""

import pickle
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order.mixture import GOOD_ERROR, MAX_CYCLE, apportion
from pretrain.sampler import BlockSchedule as Schedule

weights = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6)


def named(values: list[float]) -> dict[str, float]:
    return {f"task{i}": value for i, value in enumerate(values)}


def test_one_task_is_every_step():
    schedule = Schedule({"caption": 0.3}, seed=5)
    assert schedule.cycle == 1
    assert [schedule(step) for step in (0, 1, 10**12)] == [
        ("caption", 0),
        ("caption", 1),
        ("caption", 10**12),
    ]


@given(weights, st.integers(0, 2**40), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_every_cycle_has_exact_proportions_and_consecutive_visits(values, cycle, seed):
    schedule = Schedule(named(values), seed)
    first = cycle * schedule.cycle
    seen = schedule.visits(first)
    assert seen == {name: cycle * slots for name, slots in schedule.slots.items()}
    for step in range(first, first + schedule.cycle):
        task, visit = schedule(step)
        assert visit == seen[task], f"visit of {task} at step {step}"
        seen[task] += 1
    assert seen == {name: (cycle + 1) * slots for name, slots in schedule.slots.items()}
    assert schedule.visits(first + schedule.cycle) == seen


@given(weights)
@settings(max_examples=60, deadline=None)
def test_apportionment_is_within_its_reported_error(values):
    counts, error = apportion(values)
    shares = np.array(values) / sum(values)
    assert min(counts) >= 1 and sum(counts) <= MAX_CYCLE
    assert np.max(np.abs(np.array(counts) / sum(counts) - shares) / shares) <= error + 1e-9
    # Any real share of at least 1 % is met to 1/2 slot of a cycle of 4,096 at the worst.
    if shares.min() > 0.01:
        assert error <= max(GOOD_ERROR, 1 / (2 * MAX_CYCLE * shares.min()) * len(values))


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ([1, 3], [1, 3]),
        ([0.1, 0.2, 0.7], [1, 2, 7]),
        ([2.0, 4.0], [1, 2]),
        ([1 / 3, 1 / 3, 1 / 3], [1, 1, 1]),
        ([30, 45, 1], [30, 45, 1]),
        ([1e-9, 1e-9], [1, 1]),
        ([1e6, 2.5e6], [2, 5]),
    ],
)
def test_rational_shares_are_exact(values, counts):
    assert apportion(values) == (counts, 0.0)


def test_a_share_too_small_for_a_cycle_is_reported():
    counts, error = apportion([1.0, 1e-5])
    assert counts[1] == 1
    assert error == pytest.approx(1e5 / sum(counts) - 1, rel=1e-3)
    assert f"{error:.2%}" in Schedule({"a": 1.0, "b": 1e-5}, seed=0).describe()


def test_tasks_are_mixed_within_a_cycle():
    """A keyed permutation, not blocks: neighbours differ about as often as chance has it."""
    schedule = Schedule({"a": 1000, "b": 1001}, seed=3)
    assert schedule.cycle == 2001
    order = [schedule(step)[0] for step in range(schedule.cycle)]
    changes = sum(x != y for x, y in pairwise(order))
    assert 0.4 < changes / len(order) < 0.6


def test_permutations_of_a_short_cycle_are_uniform():
    schedule = Schedule({"a": 1, "b": 1, "c": 1}, seed=11)
    orders = Counter(
        tuple(schedule(3 * cycle + place)[0] for place in range(3)) for cycle in range(6000)
    )
    assert len(orders) == 6
    # 1,000 expected each; the standard deviation is 29.
    assert all(abs(count - 1000) < 150 for count in orders.values())


def test_depends_on_seed_but_not_on_the_order_of_tasks():
    one = Schedule({"a": 1, "b": 2, "c": 3}, seed=1)
    same = Schedule({"c": 3, "a": 1, "b": 2}, seed=1)
    other = Schedule({"a": 1, "b": 2, "c": 3}, seed=2)
    steps = range(600)
    assert [one(s) for s in steps] == [same(s) for s in steps]
    assert [one(s) for s in steps] != [other(s) for s in steps]


def test_is_the_same_forever():
    """Frozen: another order here would silently change what every resumed run trains on."""
    schedule = Schedule({"caption": 2, "classify": 1}, seed=7)
    order = [schedule(step)[0] for step in range(24)]
    assert (
        "".join("." if task == "caption" else "|" for task in order) == ".|...||....|.|.|...|..|."
    )


def test_far_out_is_cheap_and_access_may_be_random():
    schedule = Schedule({"a": 0.37, "b": 0.41, "c": 0.22}, seed=0)
    begin = time.perf_counter()
    far = [schedule(step) for step in range(10**9, 10**9 + 3000)]
    assert time.perf_counter() - begin < 60  # step by step it would be hours
    steps = np.random.default_rng(0).permutation(3000)
    copy = pickle.loads(pickle.dumps(schedule))
    assert all(copy(10**9 + int(s)) == far[s] for s in steps)
    visit = far[-1][1]
    share = schedule.slots[far[-1][0]] / schedule.cycle
    assert visit == pytest.approx(10**9 * share, rel=1e-5)


@pytest.mark.parametrize("tasks", [{}, {"a": 0.0}, {"a": -1.0}, {"a": float("inf")}])
def test_refuses_impossible_weights(tasks):
    with pytest.raises(ValueError, match="task"):
        Schedule(tasks, seed=0)


def test_refuses_negative_steps():
    with pytest.raises(ValueError, match="step must be 0 or more"):
        Schedule({"a": 1.0}, seed=0)(-1)
