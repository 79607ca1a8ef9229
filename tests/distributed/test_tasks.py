"""Three objectives in one run, from shards to evaluation, in different worlds and divisions."""

import json
import re

import pytest

from tests.distributed.launch import run_ranks, tails
from tests.tiny_run import pack_scenes, three_tasks, write_recipe

STEPS = 9
FIRST = {  # of an evaluation, in the order of the objective
    "caption": ["cider_d", "bleu_4"],
    "classify": ["top1", "top5"],
    "contrast": ["image_to_text_r1", "text_to_image_r1"],
}
METRICS = {
    "caption": {"loss", "cross_entropy", "token_accuracy"},
    "classify": {"loss", "cross_entropy", "top1", "top5", "labelled"},
    "contrast": {"loss", "image_to_text", "text_to_image", "temperature"},
}
EVALUATED = {
    "caption": {"loss", "token_accuracy", "images", "cider_d"},
    "classify": {"loss", "top1", "top5", "images", "labelled"},
    "contrast": {"image_to_text_r1", "text_to_image_r10", "images", "texts", "temperature"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    return folder


def lines_of(data, folder, world: int, **changes) -> list[dict]:
    recipe = three_tasks(data, folder / "run", steps=STEPS, **changes)
    codes = run_ranks("pretrain.train", [write_recipe(folder / "r.yaml", recipe)], world, folder)
    assert codes == [0] * world, tails(folder)
    return [json.loads(x) for x in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the run `alone`."""
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(data, folder):
    """One process with undivided batches."""
    whole = {f"tasks__{name}__micro_batch": 8 for name in METRICS}
    return lines_of(data, folder, 1, **whole)


def test_every_task_trains_and_is_evaluated(alone):
    trained = [line for line in alone if line["kind"] == "train"]
    assert sorted(line["task"] for line in trained) == sorted([*METRICS] * (STEPS // 3))
    for line in trained:
        assert METRICS[line["task"]] <= set(line) and line["gradient_norm"] > 0
    tested = {line["task"]: line for line in alone if line["kind"] == "evaluation"}
    for name, wanted in EVALUATED.items():
        assert wanted <= set(tested[name]) and tested[name]["images"] == 10
        assert [x for x in tested[name] if x not in ("step", "task", "kind", "time")][:2] == (
            FIRST[name]
        )
    assert tested["contrast"]["texts"] == 50
    assert 0 < tested["classify"]["labelled"] < 1


def test_lines_of_an_evaluation_begin_with_what_matters(alone, folder):
    said = (folder / "run/logs/rank_00000.log").read_text(encoding="utf-8")
    for name, (first, second) in FIRST.items():
        assert re.search(rf"{name} on 10 held-out samples: {first} [\d.e-]+, {second} ", said), said


@pytest.mark.parametrize("world, stage", [(2, 2), (3, 1)])
def test_other_worlds_and_divisions_give_the_same_losses(data, alone, tmp_path, world, stage):
    """Micro-batches of 2: contrast goes through cached features; on 3 ranks there is padding."""
    lines = lines_of(data, tmp_path, world, deepspeed=f"zero{stage}")
    assert [(x["step"], x["task"], x["kind"]) for x in lines] == [
        (x["step"], x["task"], x["kind"]) for x in alone
    ]
    for one, other in zip(alone, lines, strict=True):
        names = (METRICS if one["kind"] == "train" else EVALUATED)[one["task"]]
        for name in names - {"cider_d"}:
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), (one["step"], name)
