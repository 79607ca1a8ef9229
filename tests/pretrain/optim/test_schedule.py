"""Schedules against their closed forms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pretrain.optim.schedule import ScheduleSettings, lr_factor, problems


def factors(total: int, **settings) -> list[float]:
    return [lr_factor(step, ScheduleSettings(**settings), total) for step in range(total)]


def test_cosine_values():
    values = factors(1100, kind="cosine", warmup_steps=100, final_ratio=0.1)
    assert values[0] == pytest.approx(1 / 101)
    assert values[99] == pytest.approx(100 / 101)
    assert values[100] == 1.0
    assert values[350] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert values[600] == pytest.approx(0.55)
    assert 0.1 < values[-1] < 0.1001


def test_inverse_sqrt_values():
    values = factors(10000, kind="inverse_sqrt", warmup_steps=99, final_ratio=0.2)
    assert values[99] == 1.0
    assert values[399] == pytest.approx(0.5)
    assert values[899] == pytest.approx(1 / 3)
    assert values[-1] == 0.2


def test_constant_values():
    values = factors(50, kind="constant", warmup_steps=9)
    assert values[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert set(values[10:]) == {1.0}


def test_warm_up_stable_decay_values():
    values = factors(50, kind="wsd", warmup_steps=9, decay_steps=10, final_ratio=0.1)
    assert values[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert set(values[10:41]) == {1.0}
    assert values[41:] == [pytest.approx(1.0 - 0.09 * step) for step in range(1, 10)]
    assert factors(50, kind="wsd", warmup_steps=0)[44:] == [
        1.0,
        1.0,
        *(pytest.approx(1 - step / 5) for step in range(1, 5)),
    ]


@given(st.integers(0, 50), st.integers(1, 50), st.integers(0, 100), st.integers(0, 200))
def test_a_longer_run_has_the_same_rates_up_to_the_decay(warmup, decay, stable, more):
    settings = {"kind": "wsd", "warmup_steps": warmup, "decay_steps": decay}
    short = warmup + decay + stable
    assert (
        factors(short, **settings)[: short - decay + 1]
        == (factors(short + more, **settings)[: short - decay + 1])
    )


@given(
    st.sampled_from(["cosine", "constant", "inverse_sqrt", "wsd"]),
    st.integers(0, 200),
    st.integers(1, 500),
)
def test_rises_then_never_rises_and_never_wastes_a_step(kind, warmup, rest):
    values = factors(warmup + rest, kind=kind, warmup_steps=warmup)
    if problems(ScheduleSettings(kind=kind, warmup_steps=warmup), warmup + rest):
        return
    assert all(0.0 < value <= 1.0 for value in values)
    assert values[warmup] == 1.0
    assert values[: warmup + 1] == sorted(set(values[: warmup + 1]))
    assert values[warmup:] == sorted(values[warmup:], reverse=True)


def test_after_the_end_the_final_value_stays():
    settings = ScheduleSettings(kind="cosine", warmup_steps=0, final_ratio=0.25)
    assert [lr_factor(step, settings, 10) for step in (10, 11, 10**9)] == [0.25] * 3


def test_refusals():
    with pytest.raises(ValueError, match="warmup_steps=10 must be smaller than the 10 steps"):
        lr_factor(0, ScheduleSettings(warmup_steps=10), 10)
    with pytest.raises(ValueError, match="step must be 0 or more"):
        lr_factor(-1, ScheduleSettings(warmup_steps=1), 10)
    with pytest.raises(ValidationError, match="no effect with kind=constant"):
        ScheduleSettings(kind="constant", final_ratio=0.5)
    with pytest.raises(ValidationError, match="decay_steps=5 belongs to kind=wsd"):
        ScheduleSettings(kind="cosine", decay_steps=5)
    wsd = ScheduleSettings(kind="wsd", warmup_steps=6, decay_steps=5)
    assert "warmup_steps=6 and the 5 steps of the decay" in problems(wsd, 10)[0]
    assert not problems(wsd, 11)
