"""Independent draws, counted in closed form."""

import pickle
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.sampler.iid import LEAF, IidSchedule

THREE = {"a": 0.5, "b": 0.3, "c": 0.2}


def test_visits_count_what_ran():
    """Over a horizon of many leaves and five segments; `visits` of a fresh object each time."""
    schedule, seen = IidSchedule(THREE, 3), dict.fromkeys(THREE, 0)
    for step in range(20 * LEAF):
        if step % 997 == 0 or step % LEAF in (0, LEAF - 1):
            assert IidSchedule(THREE, 3).visits(step) == seen
        task, visit = schedule(step)
        assert visit == seen[task]
        seen[task] += 1


@given(
    st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5),
    st.integers(0, 2**36),
    st.integers(0, 2**31),
)
@settings(max_examples=12, deadline=None)
def test_steps_far_out_are_consistent(values, step, seed):
    schedule = IidSchedule({f"t{i}": v for i, v in enumerate(values)}, seed)
    before, after = schedule.visits(step), schedule.visits(step + 3000)
    seen = dict(before)
    for here in range(step, step + 3000):
        task, visit = schedule(here)
        assert visit == seen[task]
        seen[task] += 1
    assert seen == after
    assert sum(before.values()) == step


def test_shares_and_independence():
    """20 seeds: shares within 4.5 standard deviations, successors as often as chance has it."""
    pairs: Counter = Counter()
    total = 0
    for seed in range(20):
        schedule = IidSchedule(THREE, seed)
        order = [schedule(step)[0] for step in range(5 * LEAF)]
        pairs.update(pairwise(order))
        total += len(order) - 1
    for one, share in THREE.items():
        for other, next_share in THREE.items():
            chance = share * next_share
            deviation = (total * chance * (1 - chance)) ** 0.5
            assert abs(pairs[one, other] - total * chance) < 5 * deviation, (one, other)


def test_counts_of_a_window_vary_as_binomials_do():
    """Windows inside a leaf, across leaves and across segments, over many seeds."""
    for first, length in ((100, 400), (900, 1200), (3 * LEAF, 3 * LEAF), (0, 8 * LEAF)):
        counts = []
        for seed in range(300):
            schedule = IidSchedule({"a": 1.0, "b": 3.0}, seed)
            counts.append(schedule.visits(first + length)["a"] - schedule.visits(first)["a"])
        variance = length * 3 / 16
        assert abs(np.mean(counts) - length / 4) < 4.5 * (variance / 300) ** 0.5
        assert np.var(counts) == pytest.approx(variance, rel=0.35)


def test_far_out_is_cheap():
    schedule = IidSchedule({f"t{i}": 1.0 + i for i in range(6)}, 0)
    begin = time.perf_counter()
    visits = schedule.visits(10**9)
    far = [schedule(step) for step in range(10**9, 10**9 + 2000)]
    assert time.perf_counter() - begin < 60  # step by step it would be hours
    assert visits["t5"] == pytest.approx(10**9 * 6 / 21, rel=1e-3)
    copy = pickle.loads(pickle.dumps(schedule))
    assert [copy(step) for step in range(10**9, 10**9 + 2000)] == far


def test_ratio_is_the_share():
    assert IidSchedule({"a": 1.0, "b": 3.0}, 0).ratio(10**6) == {"a": 0.25, "b": 0.75}


def test_is_the_same_forever():
    """Frozen: another order here would silently change what every resumed run trains on."""
    schedule = IidSchedule({"caption": 2, "classify": 1}, seed=7)
    order = [schedule(step)[0] for step in range(32)]
    assert "".join("." if task == "caption" else "|" for task in order) == GOLDEN_ORDER
    assert schedule.visits(10**9) == GOLDEN_FAR
    assert [schedule(step) for step in (5000, 123_456, 10**10)] == GOLDEN_STEPS


GOLDEN_ORDER = "....|....|...||.|||..|..|.....|."
GOLDEN_FAR = {"caption": 666655010, "classify": 333344990}
GOLDEN_STEPS = [("caption", 3292), ("caption", 82356), ("caption", 6666644213)]
