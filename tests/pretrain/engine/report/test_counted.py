"""Means over nothing have no value, and parts of a loss that stay without targets are told of."""

import logging
from types import SimpleNamespace

import pytest

from pretrain.engine.report.counted import PATIENCE_STEPS, TargetWatch, has_targets, with_absences
from pretrain.objectives.objective import Objective

OBJECTIVE = SimpleNamespace(
    counted_by={
        "loss": ("texts", "labels"),
        "category": ("labels",),
        "top1": ("labels",),
        "text": ("texts",),
    }
)


@pytest.mark.parametrize("texts, labels", [(0, 0), (3, 0), (0, 2), (3, 2)])
def test_a_metric_has_a_value_if_one_of_its_counts_does(texts, labels):
    metrics = {"loss": 1.0, "category": 0.0, "top1": 0.0, "text": 2.0, "weight": 0.5}
    found = with_absences(OBJECTIVE, metrics, {"texts": texts, "labels": labels})
    assert found == {
        "loss": 1.0 if texts or labels else None,
        "category": 0.0 if labels else None,
        "top1": 0.0 if labels else None,
        "text": 2.0 if texts else None,
        "weight": 0.5,
    }
    assert has_targets(OBJECTIVE, {"texts": texts, "labels": labels}) == bool(texts or labels)
    assert has_targets(SimpleNamespace(counted_by=Objective.counted_by), {})


@pytest.fixture
def warned(caplog):
    """Feeds a watch with the labels of each step; returns the warnings."""
    caplog.set_level(logging.WARNING)

    def run(labels, speaks=True, meant=()) -> list[str]:
        watch = TargetWatch(speaks, meant)
        for step, count in enumerate(labels):
            watch.observe(step, "m3i", OBJECTIVE, {"texts": 2, "labels": count})
        return [record.getMessage() for record in caplog.records]

    return run


def test_a_part_without_targets_is_told_of_once(warned):
    (line,) = warned([0] * PATIENCE_STEPS + [1] + [0] * 3 * PATIENCE_STEPS)
    assert "task m3i: no labels in any of the last 100 steps up to step 99" in line
    assert "category, top1" in line and "tasks.m3i.data.unlabelled=expected" in line


@pytest.mark.parametrize(
    "labels, options",
    [
        ([0] * (PATIENCE_STEPS - 1) + [1] + [0] * (PATIENCE_STEPS - 1), {}),
        ([0] * 300, {"meant": ["m3i"]}),
        ([0] * 300, {"speaks": False}),
    ],
)
def test_nothing_is_said_without_reason(warned, labels, options):
    assert warned(labels, **options) == []
