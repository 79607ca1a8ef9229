"""Schedule, sources and dealing together: the same global batches on any ranks and workers."""

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_pipeline.loader.workers
from data_pipeline.loader.loader import LoaderSettings, StepLoader
from data_pipeline.loader.stream import TaskStream
from data_pipeline.order.mixed_order import MixedOrder
from data_pipeline.order.order import Order
from data_pipeline.order.plan import plan_order
from data_pipeline.order.sources import Source, concatenated
from data_pipeline.order.step_sampler import StepSampler
from data_pipeline.reading.reader import SampleReader
from data_pipeline.shards.shard_set import ShardSet
from pretrain.sampler import Stage, build_schedule
from tests.data_pipeline.photos import damage, pack, stream

WORLDS = [(1, 1), (2, 4), (6, 8), (8, 3)]
STAGES = {
    "block": [Stage(0, "block", {"one": 2.0, "two": 1.0, "three": 1.0})],
    "iid": [Stage(0, "iid", {"one": 2.0, "two": 1.0, "three": 1.0})],
    "mixed": [Stage(0, "mixed", {"one": 2.0, "two": 1.0, "three": 1.0})],
    "staged": [
        Stage(0, "iid", {"one": 1.0, "two": 1.0}),
        Stage(7, "mixed", {"one": 1.0, "three": 1.0}),
        Stage(15, "block", {"two": 1.0, "three": 2.0}),
    ],
}
SIZES = {"one": (48, 8), "two": (26, 4), "three": (10, 10)}
STEPS = 24


class Sized:
    """Batch sizes and order of a task, without shards."""

    def __init__(self, name: str) -> None:
        self.global_batch, self.micro_batch = SIZES[name]
        self.order = Order.plan(500, 1, self.global_batch)
        if name != "three":
            parts = {s: Order.plan(n, n, self.global_batch) for s, n in (("x", 300), ("y", 41))}
            self.order = MixedOrder(parts, [2.0, 0.7], 9)


TASKS = {name: Sized(name) for name in SIZES}


def rows_loaded(schedule, world: int, workers: int, start: int = 0) -> dict[tuple, list[int]]:
    """(step, task) -> sorted rows over all ranks; each (rank, worker) gets its own requests."""
    found: dict[tuple, list[int]] = {}
    for rank in range(world):
        requests = list(StepSampler(schedule, TASKS, rank, world, start, STEPS))
        for worker in range(workers):
            for request in requests[worker::workers]:
                real = np.array(request.positions)[np.array(request.valid)]
                rows = TASKS[request.task].order.rows(real)
                found.setdefault((request.step, request.task), []).extend(rows.tolist())
    return {key: sorted(rows) for key, rows in found.items()}


@pytest.mark.parametrize("mode", STAGES)
def test_global_batches_do_not_depend_on_ranks_and_workers(mode):
    schedule = build_schedule(STAGES[mode], SIZES, 3)
    alone = rows_loaded(schedule, 1, 1)
    assert {step for step, _ in alone} == set(range(STEPS))
    for step in range(STEPS):
        for task, visit in schedule.parts(step):
            size = SIZES[task][0]
            rows = TASKS[task].order.rows(np.arange(visit * size, (visit + 1) * size))
            assert alone.pop((step, task)) == sorted(rows.tolist())
    assert not alone
    alone = rows_loaded(schedule, 1, 1)
    for world, workers in WORLDS[1:]:
        assert rows_loaded(schedule, world, workers) == alone


@given(st.sampled_from(sorted(STAGES)), st.integers(0, STEPS - 1), st.sampled_from(WORLDS))
@settings(max_examples=20, deadline=None)
def test_resuming_anywhere_gives_the_suffix(mode, start, shape):
    stages = STAGES[mode]
    alone = rows_loaded(build_schedule(stages, SIZES, 3), 1, 1)
    later = rows_loaded(build_schedule(stages, SIZES, 3), *shape, start=start)
    assert later == {key: rows for key, rows in alone.items() if key[0] >= start}


@pytest.mark.parametrize("mode", STAGES)
def test_all_ranks_have_the_same_micro_steps(mode):
    schedule = build_schedule(STAGES[mode], SIZES, 3)
    samplers = [StepSampler(schedule, TASKS, rank, 6, 0, STEPS) for rank in range(6)]
    shapes = [[(r.step, r.micro, r.task, len(r.positions)) for r in s] for s in samplers]
    assert all(shape == shapes[0] for shape in shapes)
    for before, after in pairwise(shapes[0]):
        assert (after[0], after[1]) in {(before[0], before[1] + 1), (before[0] + 1, 0)}
    per_step = np.bincount([shape[0] for shape in shapes[0]])
    assert per_step.max() <= samplers[0].most_micro_steps()


# ---------------------------------------------------------------------------- with real shards


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("x", "y")]
    for folder, samples in zip(folders, (60, 12), strict=True):
        pack(folder, samples, per_shard=10)
    damage(folders[1], [4])
    return folders


def streams(folders) -> dict[str, TaskStream]:
    opened = [ShardSet.open(str(folder)) for folder in folders]
    sources = [Source("x", opened[0], 2.0), Source("y", opened[1], 1.0)]
    both = stream(opened[0], 12, 4, name="both")
    both = TaskStream(
        "both",
        SampleReader(concatenated(sources)),
        plan_order(sources, 12, 7, "both"),
        both.fields,
        7,
        12,
        4,
    )
    return {"both": both, "plain": stream(opened[0], 10, 6, name="plain")}


def load(folders, mode: str, rank=0, world=1, workers=0, start=0, stop=8):
    weights = {"both": 1.0, "plain": 1.0}
    schedule = build_schedule([Stage(0, mode, weights)], weights, 2)
    loaded = StepLoader(
        streams(folders),
        schedule,
        LoaderSettings(workers=workers, max_bad_fraction=1.0),
        rank,
        world,
        start,
        stop,
    )
    return list(loaded), loaded, schedule


def contents(windows) -> dict:
    return {
        (window.step, part.task, int(batch["position"][i])): (
            int(batch["row"][i]),
            batch["key"][i],
            batch["images"][i].numpy().tobytes(),
        )
        for window in windows
        for part in window.parts
        for batch in part.micro_batches
        for i in range(len(batch["valid"]))
        if batch["valid"][i]
    }


@pytest.mark.parametrize("mode", ["block", "mixed"])
def test_windows_hold_whole_parts_and_the_same_bytes_everywhere(folders, mode):
    windows, _, schedule = load(folders, mode)
    for window in windows:
        parts = schedule.parts(window.step)
        assert [part.task for part in window.parts] == [task for task, _ in parts]
        for (task, visit), part in zip(parts, window.parts, strict=True):
            size, micro = (12, [4, 4, 4]) if task == "both" else (10, [6, 4])
            assert window.positions[task] == range(visit * size, (visit + 1) * size)
            assert [len(batch["valid"]) for batch in part.micro_batches] == micro
        assert len(window.micro_batches) == sum(len(p.micro_batches) for p in window.parts)
    alone = contents(windows)
    for world, workers, start in ((2, 2, 0), (3, 0, 5)):
        found = {}
        for rank in range(world):
            found |= contents(load(folders, mode, rank, world, workers, start)[0])
        assert found == {key: value for key, value in alone.items() if key[0] >= start}
    if mode == "mixed":
        with pytest.raises(ValueError, match="too many values"):
            windows[0].task  # noqa: B018


def test_one_data_loader_serves_all_tasks(folders):
    with mock.patch.object(
        data_pipeline.loader.workers, "DataLoader", wraps=data_pipeline.loader.workers.DataLoader
    ) as made:
        load(folders, "mixed", workers=1)
    assert made.call_count == 1


def test_faults_name_the_shard_of_the_source_and_substitutes_come_from_it(folders, caplog):
    windows, loader, _ = load(folders, "block", stop=40)
    assert loader.faults()["both"].replaced > 0
    named = [record.getMessage() for record in caplog.records if "bad sample" in record.message]
    assert named and all(f"{folders[1]}" in text and "'00004'" in text for text in named)
    order = loader.streams["both"].order
    for (_, task, position), (row, *_) in contents(windows).items():
        if task == "both":
            choices, _ = order.locate(np.array([position]))
            assert (row >= 60) == bool(choices[0])
    assert loader.streams["both"].epochs(72) == {
        "epoch": 1.0,
        "epoch_x": 48 / 60,
        "epoch_y": 24 / 12,
    }
    located = loader.streams["both"].locate(np.arange(6))
    assert sum(str(folders[1]) in shard for shard in located) == 2
