"""Ranks that have nothing but padding take part in every collective, and change no number.

A batch of two is one pair, which the first rank gets; the others idle, in every objective and in
every evaluation (one held-out sample). All of it is one run for each world and division.
"""

import json

import pytest

from tests.distributed.launch import run_ranks, tails
from tests.distributed.test_m3i import tiny_m3i
from tests.tiny_run import pack_scenes, three_tasks, write_recipe

TASKS = ("aspect", "caption", "classify", "contrast", "m3i", "sizes")
VISITS = 4
SHARED = (
    "loss",
    "cross_entropy",
    "top1",
    "token_accuracy",
    "image_to_text",
    "intra",
    "inter",
    "text",
    "category",
    "labelled",
    "gradient_norm",
    "image_to_text_r1",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder, train=40, heldout=3)
    return folder


def recipe_of(data, run_dir, stage: int) -> dict:
    """Every objective, with what makes passes and collectives of its own."""
    recipe = three_tasks(data, run_dir, steps=VISITS * len(TASKS), deepspeed=f"zero{stage}")
    m3i = tiny_m3i(data, run_dir)["tasks"]["m3i"]
    if stage < 3:  # measured, without an effect on the losses
        m3i["objective"]["balance"] = {"every_steps": 1, "limits": [1.0, 1.0]}
    tasks = recipe["tasks"]
    aspect = {"size": 32, "mode": "keep_aspect", "max_size": 32}
    tasks |= {
        "m3i": m3i,
        "aspect": {**tasks["caption"], "data": {**tasks["caption"]["data"], "image": aspect}},
        "sizes": {
            **tasks["classify"],
            "objective": {"type": "classification", "smaller_sizes": [24, 16]},
            "data": {
                **tasks["classify"]["data"],
                "label_source": "json:nothing",
                "unlabelled": "expected",
            },
        },
    }
    recipe["model"]["encoders"]["text"] |= {"causal": False, "pool": "mean"}
    for task in tasks.values():
        task |= {"global_batch": 2, "micro_batch": 1}
        task["evaluation"] = {**task["evaluation"], "max_samples": 1}
    m3i["micro_batch"] = 2
    recipe["checkpoint"] = {"every_steps": 10, "keep_last": 1}
    return recipe


def lines_of(data, folder, world: int, stage: int) -> list[dict]:
    path = write_recipe(folder / "recipe.yaml", recipe_of(data, folder / "run", stage))
    codes = run_ranks("pretrain.train", [path], world, folder, timeout_s=240)
    assert codes == [0] * world, tails(folder)
    return [json.loads(x) for x in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """Two ranks, the second of which idles, under ZeRO-3."""
    folder = tmp_path_factory.mktemp("two")
    return folder, lines_of(data, folder, 2, 3)


def test_every_objective_and_evaluation_with_a_rank_that_idles(two):
    _, lines = two
    for kind, count in (("train", VISITS), ("evaluation", 1)):
        tasks = [line["task"] for line in lines if line["kind"] == kind]
        assert sorted(tasks) == sorted([*TASKS] * count)


def test_metrics_of_nothing_have_no_value(two):
    """The task `sizes` has no labels at all, which its recipe says is meant."""
    _, lines = two
    for line in lines:
        if line["task"] in ("classify", "sizes"):
            for name in ("loss", "cross_entropy", "top1", "top5"):
                assert (line[name] is None) == (line["labelled"] == 0), line
            if line["kind"] == "train":
                assert (line["gradient_norm"] is None) == (line["labelled"] == 0), line
            assert "non_finite" not in line
    assert all(line["labelled"] == 0 for line in lines if line["task"] == "sizes")
    assert any(line["labelled"] for line in lines if line["task"] == "classify")


def test_the_log_says_which_batch_would_leave_no_rank_idle(two):
    folder, _ = two
    text = (folder / "run/logs/rank_00000.log").read_text()
    for task in TASKS:
        assert (
            f"tasks.{task}: 1 of 2 ranks would get padding only, since global_batch=2 is 1 pair: "
            "set global_batch to a multiple of 4"
        ) in text


@pytest.mark.slow
@pytest.mark.parametrize("world, stage", [(1, 1), (2, 1), (3, 1), (3, 3)])
def test_idle_ranks_change_no_number(data, two, tmp_path, world, stage):
    """Against the run above; in particular against one rank, which has all of each batch."""
    lines = lines_of(data, tmp_path, world, stage)
    for one, other in zip(lines, two[1], strict=True):
        names = {name for name in SHARED if name in one and one[name] is not None}
        assert "loss" in one or one["kind"] == "evaluation"
        assert {n: other[n] for n in names} == pytest.approx(
            {n: one[n] for n in names}, rel=2e-4, abs=2e-5
        ), (one["step"], one["task"])
