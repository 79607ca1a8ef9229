"""A stall tells what every process does: stage, sample, bytes, and how its storage fails."""

import errno
import itertools
import logging
import os
import re
import time

import numpy as np
import pytest

from data_pipeline import activity
from data_pipeline.activity import ActivityBoard, retrying, working_on
from data_pipeline.loader.evaluation import EvaluationLoader
from data_pipeline.loader.loader import LoaderSettings, StepLoader
from data_pipeline.reading.local_files import LocalFiles
from tests.data_pipeline.photos import pack, stream


class Failing(LocalFiles):
    """Storage that fails some times at one row's bytes, and is slow to say so."""

    def __init__(self, shards, row: int, failures: int, seconds: float) -> None:
        super().__init__(shards)
        number, local = shards.locate(row)
        self.bad = number, shards.index(number).span(local)
        self.failures, self.seconds = failures, seconds

    def pread(self, number: int, begin: int, end: int) -> bytes:
        first, behind = self.bad[1]
        if number == self.bad[0] and first <= begin < behind and self.failures:
            self.failures -= 1
            time.sleep(self.seconds)
            raise OSError(errno.EIO, "the disk is tired")
        return super().pread(number, begin, end)


@pytest.mark.parametrize(
    ("workers", "method"),
    [(0, "fork"), (2, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)],
)
def test_a_stall_names_everything(tmp_path, caplog, workers, method):
    shards = pack(tmp_path, 50)
    task = stream(shards, 12, 4, name="a")
    row = int(task.order.rows(np.array([5]))[0])
    task.reader.source = Failing(shards, row, 3, 0.3)
    task.reader.first_wait_s = 0.3
    settings = LoaderSettings(workers=workers, stall_seconds=0.9, start_method=method)
    loader = StepLoader({"a": task}, lambda step: ("a", step), settings, 0, 1, 0, 2)
    with caplog.at_level(logging.WARNING, "omnipretrain.data"):
        assert len(list(loader)) == 2
    assert loader.counters("a")["retries"] == 3
    texts = [r.getMessage() for r in caplog.records if "no batch for" in r.getMessage()]
    (text,) = [text for text in texts if "attempts failed" in text]
    number, local = shards.locate(row)
    begin, end = shards.index(number).span(local)
    found = re.search(
        rf"worker (\d) \(process (\d+)\): read for \d\.\d s, step 0 micro 1 task a, position 5 "
        rf"row {row}, bytes (\d+) to (\d+) of (.+), [123] attempts failed, the last: .*tired",
        text,
    )
    assert found, text
    assert int(found[1]) == (1 if workers == 2 else 0)
    assert (int(found[2]) == os.getpid()) == (workers == 0)
    assert begin <= int(found[3]) < int(found[4]) <= end
    assert found[5] == shards.shards[number].path
    assert re.search(r"waiting: step 0 micro 1 task a positions \[4, 5, 6, 7\] in .*\.tar", text)
    if workers == 2:  # the other one has done what it may do ahead
        assert re.search(r"worker 0 \(process \d+\): idle for", text)


def test_an_evaluation_that_stalls_says_so_too(tmp_path, caplog):
    shards = pack(tmp_path, 20)
    task = stream(shards, 4, 4, train=False)
    task.reader.source = Failing(shards, 6, 2, 0.3)
    task.reader.first_wait_s = 0.3
    with caplog.at_level(logging.WARNING, "omnipretrain.data"):
        batches = list(EvaluationLoader(task, 0, 1, workers=1, stall_seconds=0.6))
    assert sum(int(batch["valid"].sum()) for batch in batches) == 20
    text = next(r.getMessage() for r in caplog.records if "no batch for" in r.getMessage())
    assert re.search(r"worker 0 \(process \d+\): read for .* row 6, bytes .* attempts failed", text)
    assert re.search(r"waiting: step 1 micro 0 task \S+ positions \[4, 5, 6, 7\] in .*\.tar", text)


def test_outside_of_a_loader_notes_do_nothing():
    board = ActivityBoard(2, "fork")
    retrying(1, "nobody asks")
    assert [activity.process for activity in board.read()] == [0, 0]
    board.use(1)
    working_on(3, 4)
    retrying(2, "é" * 500)
    activity = board.read()[1]
    assert activity[:3] == (os.getpid(), 3, 4) and activity.stage == "order"
    assert activity.failures == 2 and activity.reason == "é" * 80


def test_what_failed_before_is_no_matter_of_the_next_sample(monkeypatch):
    monkeypatch.setattr(activity, "_slot", None)
    board = ActivityBoard(1, "fork")
    board.use(0)
    working_on(3, 1)
    activity.reading(5, 7, 2)
    activity.reading_bytes(1, 10, 20)
    retrying(4, "the disk is tired")
    noted = (3, 1), "read", (5, 7, 2), (1, 10, 20), (4, "the disk is tired")
    for expected in (noted, ((3, 1), "decode", (5, 8, 0), (-1, 0, 0), (0, ""))):
        (found,) = board.read()
        assert found.process == os.getpid()
        assert ((*found[1:3],), found.stage, (*found[5:8],), (*found[8:11],), (*found[11:],)) == (
            expected
        )
        activity.decoding(5, 8, 0)


def test_the_last_spans_are_kept():
    """In order, with what the process did; more than fit push out the oldest."""
    board = ActivityBoard(2, "fork")
    board.use(1)
    working_on(3, 0)
    activity.reading(5, 7, 0)
    activity.decoding(5, 7, 0)
    activity.idle()
    working_on(4, 0)
    activity.collating()
    activity.idle()
    found = board.spans()
    assert [(s.stage, s.step, s.position) for s in found] == [
        ("order", 3, -1),
        ("read", 3, 5),
        ("decode", 3, 5),
        ("order", 4, -1),
        ("collate", 4, -1),
    ]
    assert all(s.process == os.getpid() and s.begin <= s.end for s in found)
    assert all(a.end <= b.begin for a, b in itertools.pairwise(found))
    for step in range(5000):
        working_on(step, 0)
        activity.idle()
    found = board.spans()
    assert len(found) == 4096 and [s.step for s in found] == list(range(5000 - 4096, 5000))
