"""Whole steps in schedule order: the same bytes after a restart, on any ranks and workers."""

import logging
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from data_pipeline.loader.loader import LoaderSettings, StepLoader
from data_pipeline.samples.captions import CaptionProcessor
from data_pipeline.shards.shard_set import ShardSet
from tests.data_pipeline.photos import pack, stream

STEPS = 14


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return pack(tmp_path_factory.mktemp("shards"), 103)


def schedule(step: int) -> tuple[str, int]:
    """Task b every third step."""
    return ("b", step // 3) if step % 3 == 2 else ("a", step - (step + 1) // 3)


def loader(
    shards: ShardSet, start=0, stop=STEPS, rank=0, world=1, workers=0, **options
) -> StepLoader:
    streams = {
        "a": stream(shards, 12, 4, name="a"),
        "b": stream(shards, 10, 6, name="b", captions_per_image=2, caption_source="json:captions"),
    }
    settings = LoaderSettings(workers=workers, **{"max_bad_fraction": 1.0, **options})
    return StepLoader(streams, schedule, settings, rank, world, start, stop)


def contents(windows) -> dict[tuple[int, int], tuple]:
    """(step, position) -> everything that was loaded for it, as bytes."""
    found = {}
    for window in windows:
        for batch in window.micro_batches:
            for place in range(len(batch["valid"])):
                if not batch["valid"][place]:
                    assert not batch["loss_mask"][place].any()
                    assert batch["position"][place] == batch["row"][place] == -1
                    continue
                supervised = [
                    tokens[mask].tolist()
                    for tokens, mask in zip(
                        batch["tokens"][place], batch["loss_mask"][place], strict=True
                    )
                ]
                key = (window.step, int(batch["position"][place]))
                assert key not in found
                pixels = batch["images"][place].numpy().tobytes()
                found[key] = (
                    window.task,
                    int(batch["row"][place]),
                    batch["key"][place],
                    pixels,
                    supervised,
                )
    return found


@pytest.fixture(scope="module")
def uninterrupted(shards) -> dict:
    # Only 26 of the 103 samples have no json caption: task b replaces those.
    return contents(loader(shards))


def test_windows_are_whole_and_in_order(shards):
    windows = list(loader(shards))
    assert [(w.step, w.task) for w in windows] == [(s, schedule(s)[0]) for s in range(STEPS)]
    for window in windows:
        assert [len(b["valid"]) for b in window.micro_batches] == (
            [4, 4, 4] if window.task == "a" else [6, 4]
        )
        for stage in ("read", "decode", "transform", "collate", "wait"):
            assert window.seconds[stage] > 0
        for batch in window.micro_batches:
            assert not {"seconds", "faults"} & set(batch)


def test_positions_are_those_of_the_visits(uninterrupted):
    for step in range(STEPS):
        task, visit = schedule(step)
        size = 12 if task == "a" else 10
        positions = sorted(p for s, p in uninterrupted if s == step)
        assert positions == list(range(visit * size, (visit + 1) * size))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("start", "world", "workers"), [(0, 1, 2), (5, 1, 0), (9, 2, 3), (3, 3, 0), (13, 1, 1)]
)
def test_restarts_and_other_worlds_load_the_same_bytes(
    shards, uninterrupted, start, world, workers
):
    found = {}
    for rank in range(world):
        mine = contents(loader(shards, start, rank=rank, world=world, workers=workers))
        assert not set(mine) & set(found)
        found |= mine
    expected = {key: value for key, value in uninterrupted.items() if key[0] >= start}
    assert found == expected


@pytest.mark.parametrize(
    "start_method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)]
)
def test_workers_that_are_not_forked(shards, uninterrupted, start_method):
    found = contents(loader(shards, 10, workers=1, start_method=start_method))
    assert found == {key: value for key, value in uninterrupted.items() if key[0] >= 10}


def test_all_ranks_have_equal_shapes(shards):
    ranks = [list(loader(shards, stop=3, rank=rank, world=4)) for rank in range(4)]
    for windows in zip(*ranks, strict=True):
        shapes = {tuple(len(b["valid"]) for b in window.micro_batches) for window in windows}
        assert len(shapes) == 1
        valid = sum(int(b["valid"].sum()) for window in windows for b in window.micro_batches)
        assert valid == (12 if windows[0].task == "a" else 10)


def test_windows_stay_intact_however_long_they_are_held(shards, uninterrupted):
    """Shared memory is used again only when nobody looks at it any more."""
    held, views = [], []
    for window in loader(shards, workers=2, prefetch_batches=1):
        held.append(window)
        views.append((window.micro_batches[0]["images"][0, 0], window.step))
    assert contents(held) == uninterrupted
    expected = [held[step].micro_batches[0]["images"][0, 0].clone() for _, step in views]
    del held, window
    for (view, _), pixels in zip(views, expected, strict=True):
        assert torch.equal(view, pixels)


def test_memory_is_flat(shards):
    """Resident memory of the trainer and size of the shared memory over 300 windows."""

    def resident() -> int:
        with open("/proc/self/statm", encoding="utf-8") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sizes = []
    for window in loader(shards, stop=330, workers=2):
        if window.step in (30, 329):
            sizes.append(resident())
    assert sizes[1] - sizes[0] < 8_000_000  # all images together: 12 MB


def test_the_random_state_of_the_trainer_is_left_alone(shards):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(loader(shards, stop=2, workers=1))
    assert torch.equal(torch.rand(1), expected)


def test_leaving_early_ends_the_workers(shards):
    windows = iter(loader(shards, stop=10**9, workers=2))
    next(windows)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:  # the job's signals are the trainer's business
        os.kill(worker.pid, signal.SIGUSR1)
        os.kill(worker.pid, signal.SIGINT)
    for _ in range(10):
        next(windows)
    windows.close()
    deadline = time.monotonic() + 20
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(worker.is_alive() for worker in workers)


class Slow:
    """Fields that take a nap at one row."""

    def __init__(self, fields: CaptionProcessor, row: int, seconds: float) -> None:
        self.fields, self.row, self.seconds = fields, row, seconds

    def __getattr__(self, name: str):
        return getattr(self.__dict__["fields"], name)

    def of_step(self, *step):
        return self

    def of_place(self, place):
        return self

    def sample(self, sample, *arguments):
        if sample.row == self.row:
            time.sleep(self.seconds)
        return self.fields.sample(sample, *arguments)


def test_a_stall_names_what_is_being_processed(shards, caplog):
    slow = loader(shards, stop=3, workers=1, stall_seconds=0.2)
    sleepy = slow.streams["a"]
    row = int(sleepy.order.rows(np.array([5]))[0])
    sleepy.fields = Slow(sleepy.fields, row, 1.0)
    with caplog.at_level(logging.WARNING, "omnipretrain.data"):
        assert len(list(slow)) == 3
    stalls = [r.getMessage() for r in caplog.records if "no batch for" in r.getMessage()]
    assert any("task a positions [4, 5, 6, 7] in" in text and ".tar" in text for text in stalls)


def test_what_storage_did_is_counted_by_task(shards):
    loads = loader(shards, workers=2)
    windows = list(loads)
    rows = {"a": [], "b": []}
    for window in windows:
        for batch in window.micro_batches:
            rows[window.task] += batch["row"][batch["valid"]].tolist()
    for task, read in rows.items():
        extensions = loads.streams[task].fields.extensions
        wanted = 0
        for row in read:
            members = shards.index(row // 25).members(row % 25)
            places = [(m[1] - 512, m[1] + m[2]) for m in members if m[0] in extensions]
            wanted += places[-1][1] - places[0][0]
        counted = loads.counters(task)
        assert counted["retries"] == counted["cache_hits"] == 0
        # Task b has read the bad samples that it replaced as well.
        assert counted["bytes_read"] == wanted if task == "a" else counted["bytes_read"] > wanted


def test_a_defect_says_where_it_happened(shards):
    class Broken(Slow):
        def sample(self, sample, *arguments):
            if sample.row == self.row:
                raise ZeroDivisionError("a defect")
            return self.fields.sample(sample, *arguments)

    for workers in (0, 1):
        broken = loader(shards, rank=1, world=2, workers=workers)
        task = broken.streams["a"]
        row = int(task.order.rows(np.array([6]))[0])
        task.fields = Broken(task.fields, row, 0)
        with pytest.raises(Exception, match="ZeroDivisionError: a defect") as caught:
            list(broken)
        # The workers are gone although the traceback, held here, still knows the DataLoader.
        assert not multiprocessing.active_children()
        text = str(caught.value)
        assert "rank 1, step 0: task a, position 6" in text
        assert f"row {row}" in text and f"'{row:05d}'" in text and ".tar" in text
