"""Damaged data: replaced the same way everywhere, counted, named, and fatal beyond a limit."""

import json
import logging
import shutil

import numpy as np
import pytest

from data_pipeline.loader.faults import FaultFile, _ThriftyLog
from data_pipeline.loader.loader import DataError, Fault, LoaderSettings, StepLoader
from data_pipeline.reading.reader import TransientReadError
from data_pipeline.shards.shard_set import ShardSet
from tests.data_pipeline.photos import damage, pack, stream

BAD = [3, 17, 18, 40, 41, 42, 77, 90]
SAMPLES = 103


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("damaged")
    pack(folder, SAMPLES)
    damage(folder, BAD)
    return ShardSet.open(str(folder))


def run(shards, start=0, stop=12, rank=0, world=1, global_batch=12, settings=None, **options):
    streams = {"a": stream(shards, global_batch, 4, name="a")}
    settings = settings or LoaderSettings(**{"workers": 0, "max_bad_fraction": 1.0, **options})
    loader = StepLoader(streams, lambda step: ("a", step), settings, rank, world, start, stop)
    rows: dict[int, int] = {}
    for window in loader:
        for batch in window.micro_batches:
            valid = batch["valid"]
            rows |= dict(
                zip(batch["position"][valid].tolist(), batch["row"][valid].tolist(), strict=True)
            )
    return rows, loader.faults()["a"]


def test_bad_samples_are_replaced_and_nothing_else_changes(damaged, caplog):
    with caplog.at_level(logging.WARNING, "omnipretrain.data"):
        rows, count = run(damaged)
    order = stream(damaged, 12, 4).order
    planned = dict(enumerate(order.rows(np.arange(144)).tolist()))
    assert rows.keys() == planned.keys()
    replaced = {position for position, row in planned.items() if row in BAD}
    assert {p for p in planned if rows[p] != planned[p]} == replaced
    assert not set(rows.values()) & set(BAD)
    assert (count.samples, count.replaced) == (144, len(replaced))
    for bad in BAD:
        assert any(f"key '{bad:05d}'" in record.getMessage() for record in caplog.records)
    text = caplog.records[0].getMessage()
    assert "rank 0, task a, position" in text and "bad sample replaced" in text
    assert "crc32" in text and ".tar" in text


def test_a_substitute_never_repeats_a_row_of_its_batch(damaged):
    rows, _ = run(damaged, stop=40)
    for step in range(40):
        positions = range(step * 12, (step + 1) * 12)
        if positions[0] // SAMPLES == positions[-1] // SAMPLES:  # not across the end of an epoch
            assert len({rows[p] for p in positions}) == 12


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 1), (1, 2)])
def test_substitutes_do_not_depend_on_ranks_workers_or_restarts(damaged, world, workers):
    expected, _ = run(damaged)
    found = {}
    for rank in range(world):
        found |= run(damaged, 4, 12, rank, world, workers=workers)[0]
    assert found == {p: row for p, row in expected.items() if p >= 48}


def test_batches_larger_than_the_data_set_still_get_substitutes(damaged):
    rows, count = run(damaged, stop=1, global_batch=150)
    assert len(rows) == 150
    assert not set(rows.values()) & set(BAD)
    assert count.replaced >= len(BAD)


def test_too_many_bad_samples_end_the_run(tmp_path):
    pack(tmp_path, 300)
    damage(tmp_path, list(range(0, 300, 4)))
    shards = ShardSet.open(str(tmp_path))
    with pytest.raises(DataError, match=r"5\d of \d+ samples .*max_bad_fraction is 10.0%"):
        run(shards, stop=100, max_bad_fraction=0.1)
    with pytest.raises(DataError, match=r"1 of \d+ samples .*last: .*\.tar, key '\d+': .*crc32"):
        run(shards, stop=100, max_bad_fraction=0.0)


def test_too_many_in_a_row_end_the_run(damaged):
    with pytest.raises(DataError, match=r"1 samples in a row \(loader.max_bad_run\)"):
        run(damaged, max_bad_run=1)
    run(damaged, max_bad_run=6)


def test_a_strict_run_ends_at_the_first_bad_sample(damaged):
    with pytest.raises(DataError, match=r"a sample \(loader.on_bad_sample is stop\) could not"):
        run(damaged, on_bad_sample="stop")


def test_all_faults_are_in_the_file_and_few_in_the_log(tmp_path, caplog):
    """75 of 300 samples: a rotten shard must not write a line for each into the log."""
    pack(tmp_path / "set", 300)
    damage(tmp_path / "set", list(range(0, 300, 4)))
    shards = ShardSet.open(str(tmp_path / "set"))
    with (
        caplog.at_level(logging.WARNING, "omnipretrain.data"),
        FaultFile(tmp_path / "faults/rank.jsonl") as file,
    ):
        loader = StepLoader(
            {"a": stream(shards, 12, 4, name="a")},
            lambda step: ("a", step),
            LoaderSettings(workers=0, max_bad_fraction=1.0),
            0,
            1,
            0,
            25,
            fault_file=file,
        )
        list(loader)
        lines = (tmp_path / "faults/rank.jsonl").read_text().splitlines()
        written = [json.loads(line) for line in lines]
    count = loader.faults()["a"]
    assert count.samples == 300 and count.replaced == 75
    assert len({fault["position"] for fault in written}) == 75 and len(written) > 75
    assert all(fault["step"] == fault["position"] // 12 + 1 for fault in written)
    assert {fault["row"] for fault in written} == set(range(0, 300, 4))
    assert written[0].keys() == {"step", *Fault._fields, "action"}
    assert written[0]["action"] == "replaced" and ".tar" in written[0]["shard"]
    texts = [record.getMessage() for record in caplog.records]
    assert sum("bad sample replaced" in text for text in texts) == 20
    assert sum("many bad samples" in text for text in texts) == 1 and len(texts) == 21
    taken = loader.take_faults()
    assert sorted(fault.row for fault in taken) == list(range(0, 300, 4))
    assert loader.take_faults() == []


def test_the_log_tells_how_many_it_did_not_name(caplog, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("data_pipeline.loader.faults.time.monotonic", lambda: now)
    log = _ThriftyLog()
    with caplog.at_level(logging.WARNING, "omnipretrain.data"):
        for number in range(50):
            log.warning("bad %d", number)
        now += 61
        log.warning("bad %d", 50)
    texts = [record.getMessage() for record in caplog.records]
    assert texts[:20] == [f"bad {number}" for number in range(20)] and len(texts) == 23
    assert texts[21].startswith("30 more bad samples in 61 s") and texts[22] == "bad 50"


def test_a_data_set_without_a_good_sample(tmp_path):
    pack(tmp_path, 30)
    damage(tmp_path, list(range(30)))
    with pytest.raises(DataError, match="100 substitutes gave nothing usable"):
        run(ShardSet.open(str(tmp_path)))


@pytest.mark.parametrize("workers", [0, 1])
def test_storage_that_fails_ends_the_run_and_changes_no_data(tmp_path, workers):
    shards = pack(tmp_path / "set", 103)
    task = stream(shards, 12, 4, name="a")
    task.reader.retries, task.reader.first_wait_s = 1, 0.01
    shutil.move(tmp_path / "set", tmp_path / "gone")
    settings = LoaderSettings(workers=workers)
    loader = StepLoader({"a": task}, lambda step: ("a", step), settings, 0, 1, 0, 4)
    with pytest.raises(TransientReadError, match=r"rank 0, step 0: task a, position \d+, row"):
        list(loader)


def test_an_order_for_another_data_set_is_refused(damaged, tmp_path):
    task = stream(pack(tmp_path, 20), 12, 4)
    with pytest.raises(ValueError, match="planned for 20 samples, the shards hold 103"):
        type(task)("a", stream(damaged).reader, task.order, task.processor, 0, 12, 4)
