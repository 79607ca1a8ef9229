"""Momentum of each update, and declarations that make no sense."""

import math

import pytest

from pretrain.optim.momentum import MomentumTargets


def test_momentum_rises_by_half_a_cosine():
    targets = MomentumTargets({"target": "online"}, start=0.995, end=1.0)
    assert targets.momentum_at(0, 8) == pytest.approx(0.995, abs=1e-15)
    assert targets.momentum_at(4, 8) == pytest.approx(0.9975, abs=1e-15)
    # The form of MoCo v3, whose end is 1.
    for update in range(9):
        share = 0.5 * (1.0 + math.cos(math.pi * update / 8))
        assert targets.momentum_at(update, 8) == pytest.approx(1.0 - share * 0.005, abs=1e-15)
    assert targets.momentum_at(8, 8) == targets.momentum_at(100, 8) == 1.0


def test_constant_and_falling_momentum():
    constant = MomentumTargets({"target": "online"}, start=0.9, end=0.9)
    assert {constant.momentum_at(update, 5) for update in range(7)} == {0.9}
    falling = MomentumTargets({"target": "online"}, start=1.0, end=0.0)
    assert [falling.momentum_at(u, 2) for u in (0, 1, 2)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize(("update", "updates"), [(-1, 5), (0, 0)])
def test_updates_out_of_range_are_refused(update, updates):
    with pytest.raises(ValueError, match=f"momentum of update {update} of {updates}"):
        MomentumTargets({"target": "online"}).momentum_at(update, updates)


@pytest.mark.parametrize(
    ("pairs", "values", "message"),
    [
        ({}, {}, "no pair"),
        ({"": "online"}, {}, "an empty path"),
        ({"target": ""}, {}, "an empty path"),
        ({"target": "a", "target.inner": "b"}, {}, "target.inner lies within target"),
        ({"target": "online"}, {"start": -0.1}, r"start=-0.1 is not in \[0, 1\]"),
        ({"target": "online"}, {"end": 1.1}, r"end=1.1 is not in \[0, 1\]"),
        ({"target": "online"}, {"start": float("nan")}, "start=nan"),
    ],
)
def test_declarations_without_sense_are_refused(pairs, values, message):
    with pytest.raises(ValueError, match=message):
        MomentumTargets(pairs, **values)


def test_names_that_only_begin_alike_are_two_targets():
    MomentumTargets({"target": "online", "target_projector": "projector"})
