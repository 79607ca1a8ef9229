"""Stages: exact bookkeeping across borders, and a past that no recipe can change."""

import json
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.sampler import (
    MixedSchedule,
    SamplingSettings,
    Stage,
    build_schedule,
    ledger_entries,
    plan_stages,
    stages_of,
)

TASKS = ["a", "b", "c"]
MODES = ["block", "iid", "mixed"]
some_weights = st.dictionaries(
    st.sampled_from(TASKS), st.sampled_from([0.5, 1.0, 2.0, 3.3]), min_size=1
)


@st.composite
def plans(draw, mode=None) -> list[Stage]:
    starts = [0, *sorted(draw(st.sets(st.integers(1, 400), max_size=3)))]
    modes = st.just(mode) if mode else st.sampled_from(MODES)
    return [Stage(start, draw(modes), draw(some_weights)) for start in starts]


def run(schedule, stop: int, start: int = 0) -> list:
    return [schedule.parts(step) for step in range(start, stop)]


@given(plans(), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_visits_are_what_counting_gives_in_every_mode_and_across_borders(stages, seed):
    schedule = build_schedule(stages, TASKS, seed)
    seen = dict.fromkeys(TASKS, 0)
    for step in range(500):
        assert schedule.visits(step) == seen
        stage = [stage for stage in stages if stage.from_step <= step][-1]
        parts = schedule.parts(step)
        assert len(parts) == (len(stage.weights) if stage.mode == "mixed" else 1)
        assert len(parts) <= schedule.most_parts
        if len(parts) == 1:
            assert schedule(step) == parts[0]
        for task, visit in parts:
            assert visit == seen[task]
            assert task in stage.weights, "a task that is off"
            seen[task] += 1


def test_ratios_and_loss_weights_are_those_in_force():
    schedule = build_schedule(
        [
            Stage(0, "block", {"a": 1.0, "b": 3.0}),
            Stage(10, "iid", {"a": 1.0, "c": 1.0}),
            Stage(20, "mixed", {"a": 1.0, "b": 1.0, "c": 2.0}),
        ],
        TASKS,
        0,
    )
    assert schedule.ratio(9) == {"a": 0.25, "b": 0.75, "c": 0.0}
    assert schedule.ratio(10) == {"a": 0.5, "b": 0.0, "c": 0.5}
    assert schedule.ratio(10**9) == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert schedule.loss_weights(5) == {schedule(5)[0]: 1.0}
    assert schedule.loss_weights(20) == {"a": 0.25, "b": 0.25, "c": 0.5}
    schedule.own_weights = {"b": 8.0, schedule(5)[0]: 3.0}
    assert schedule.loss_weights(5) == {schedule(5)[0]: 3.0}
    assert schedule.loss_weights(20)["b"] == 0.25 * schedule.own_weights["b"]
    assert schedule.most_parts == 3
    with pytest.raises(ValueError, match="runs several tasks"):
        schedule(20)
    lines = schedule.describe().splitlines()
    assert lines[0].startswith("from step 0: cycle of 4 steps: a 1/4, b 3/4; largest error")
    assert lines[0].endswith("; off: c")
    assert lines[1] == (
        "from step 10: every step draws its task independently: a 0.5, c 0.5; off: b"
    )
    assert "weights of their losses: a 0.25, b 0.25, c 0.5" in lines[2]


def test_far_out_is_cheap_behind_borders():
    schedule = build_schedule(
        [Stage(0, "iid", {"a": 1.0, "b": 2.0}), Stage(10**9, "block", {"a": 1.0, "b": 1.0})],
        ["a", "b"],
        3,
    )
    visits = schedule.visits(2 * 10**9)
    assert sum(visits.values()) == 2 * 10**9
    assert visits["a"] - schedule.visits(10**9)["a"] == 5 * 10**8


def test_equal_stages_do_not_repeat_each_other():
    weights = {"a": 1.0, "b": 1.0}
    schedule = build_schedule([Stage(0, "block", weights), Stage(64, "block", weights)], "ab", 1)
    tasks = [[task for task, _ in parts] for [*parts] in run(schedule, 128)]
    assert tasks[:64] != tasks[64:]


@given(plans("block") | plans(), plans(), plans(), st.integers(1, 450), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_what_ran_stays_whatever_the_recipe_says_later(first, second, third, resume, more):
    """Three starts with three recipes: each follows its own plan, and keeps the past of the others.
    The ledger goes through JSON, as in a checkpoint."""
    ledger: list[dict] = []
    past: list = []
    for start, plan in ((0, first), (resume, second), (resume + more, third)):
        ledger = json.loads(json.dumps(ledger + ledger_entries(plan, ledger, start)))
        assert ledger_entries(plan, ledger, start + 7) == []
        schedule = build_schedule(stages_of(ledger), TASKS, 11)
        assert run(schedule, start) == past[:start]
        past = run(schedule, 700)
        for step in {start, start + 1, 699}:
            wanted = [stage for stage in plan if stage.from_step <= step][-1]
            assert set(schedule.ratio(step)) == set(TASKS)
            assert {t for t, s in schedule.ratio(step).items() if s} == set(wanted.weights)
    seen = dict.fromkeys(TASKS, 0)
    for parts in past:  # visits stay consecutive through all of it
        for task, visit in parts:
            assert visit == seen[task]
            seen[task] += 1


def test_adding_a_future_stage_leaves_the_present_one_alone():
    now = [Stage(0, "block", {"a": 1.0, "b": 1.7})]
    ledger = ledger_entries(now, [], 0)
    alone = run(build_schedule(stages_of(ledger), "ab", 5), 900)
    later = [*now, Stage(600, "block", {"b": 1.0})]
    ledger += ledger_entries(later, ledger, 333)
    assert [entry["step"] for entry in ledger] == [0, 333]
    longer = run(build_schedule(stages_of(ledger), "ab", 5), 900)
    assert longer[:600] == alone[:600]
    assert {task for parts in longer[600:] for task, _ in parts} == {"b"}


def test_a_run_older_than_the_ledger_is_taken_to_have_followed_its_recipe():
    plan = [Stage(0, "block", {"a": 1.0})]
    other = {"kind": "skipped", "step": 3}
    assert ledger_entries(plan, [other], 500)[0]["step"] == 0
    assert stages_of([other]) == []


def test_tasks_that_the_run_does_not_have():
    with pytest.raises(ValueError, match="the stage from step 0 runs gone, but the run has"):
        build_schedule([Stage(0, "block", {"gone": 1.0})], ["a"], 0)


# -------------------------------------------------------------------------------------- settings


def test_sizes_and_alpha_make_weights():
    sizes = {"a": 1_000_000, "b": 10_000}
    plan = plan_stages(SamplingSettings(alpha=0.5), {"a": 1.0, "b": 2.0}, sizes)
    assert plan == [Stage(0, "block", {"a": 1000.0, "b": 200.0})]
    odd = plan_stages(SamplingSettings(alpha=0.3), {"a": 1.0}, {"a": 123_457})
    assert odd[0].weights["a"] == float(f"{odd[0].weights['a']:.9g}")
    with pytest.raises(ValueError, match=r"sampling\.alpha needs the samples of a, b"):
        plan_stages(SamplingSettings(alpha=0.5), {"a": 1.0, "b": 2.0})


def test_stages_begin_with_the_weights_of_the_tasks():
    settings = SamplingSettings(
        mode="iid", stages=[{"from_step": 10, "weights": {"a": 0.0, "b": 5.0}}]
    )
    assert plan_stages(settings, {"a": 1.0, "b": 2.0}) == [
        Stage(0, "iid", {"a": 1.0, "b": 2.0}),
        Stage(10, "iid", {"b": 5.0}),
    ]
    replaced = SamplingSettings(stages=[{"from_step": 0, "weights": {"a": 1.0, "b": 5.0}}])
    assert len(plan_stages(replaced, {"a": 1.0, "b": 2.0})) == 1


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ([{"from_step": 5, "weights": {"a": 0.0}}], "at least one task must have a weight above"),
        ([{"from_step": 5, "weights": {"a": -1.0}}], "a=-1.0 must be 0 or more, and finite"),
        ([{"from_step": 5, "weights": {"a": inf}}], "must be 0 or more, and finite"),
        ([{"from_step": 5, "weights": {"a": 1.0}}] * 2, "must increase from stage to stage"),
    ],
)
def test_stages_that_cannot_be(stages, text):
    with pytest.raises(ValueError, match=text):
        SamplingSettings(stages=stages)


def test_mixed_steps_by_themselves():
    schedule = MixedSchedule({"b": 3.0, "a": 1.0})
    assert schedule.parts(7) == [("a", 7), ("b", 7)]
    assert schedule.loss_weights(7) == {"a": 0.25, "b": 0.75}
    assert MixedSchedule({"a": 2.0})(7) == ("a", 7)
