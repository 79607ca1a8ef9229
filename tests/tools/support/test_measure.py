"""Benchmarks say what they do, and end in time."""

import argparse
import tempfile
import time
from pathlib import Path

import pytest
import torch

from data_pipeline.reading.reader import SampleReader
from tools.benchmark import (
    __main__ as benchmark,
)
from tools.benchmark import (
    data as bench_data,
)
from tools.benchmark import (
    gpu as bench_gpu,
)
from tools.benchmark import (
    memory as bench_memory,
)
from tools.support import measure as bench_measure
from tools.support.measure import end_after, interleaved, shorten, shortened


@pytest.fixture(autouse=True)
def no_limit_for_others():
    yield
    end_after(None)


def case():
    time.sleep(0.02)
    return 3.0


@pytest.mark.parametrize(("seconds", "turns"), [(None, 7), (60.0, 7), (0.25, 3), (0.0, 1)])
def test_as_many_repetitions_as_there_is_time_for(seconds, turns, capsys):
    end_after(seconds)
    results = interleaved({"one": case, "other": case}, 7, lambda _: None)
    found = len(results["one"])
    assert found == len(results["other"])
    assert found == turns if turns != 3 else 1 <= found < 7
    said = capsys.readouterr().err
    assert said.count("a second") == 2 * found * (seconds != 0.0)
    assert "warm-up: one ..." in said
    noted = f"{found} of 7 repetitions" if seconds else "one repetition of 7"
    assert [noted in line for line in shortened()] == [True] * (found < 7)


@pytest.mark.parametrize("long", [False, True])
def test_the_start_says_what_is_done_and_how_long(long, monkeypatch, capsys):
    seen = {}

    def run(options):
        seen["end"] = bench_measure._end
        if not long:
            shorten("2 of 7 repetitions")
        return {"title": "t", "rows": [{"case": "a", "speed": 1.0}], "bars": []}

    from tools.benchmark import decode as bench_decode

    monkeypatch.setattr(bench_decode, "run", run)
    assert benchmark.main(["decode", *(["--long"] if long else [])]) == 0
    captured = capsys.readouterr()
    assert ("shortened to end in time: 2 of 7 repetitions" in captured.out) != long
    first = captured.err.splitlines()[0]
    assert first.startswith("decode: large photographs: decoding at a fraction")
    assert ("about 5 minutes" in first) != long
    assert (seen["end"] is None) == long


def test_measurements_that_share_the_time_leave_some_for_the_later_ones():
    end_after(1.2)
    first = interleaved({"one": case}, 50, sharers=2)["one"]
    second = interleaved({"one": case}, 50)["one"]
    assert 10 < len(first) < 40 and len(second) > 8


def test_the_loaders_of_others_make_batches():
    """What the workers of `benchmark data` run, in this process."""
    jpegs = bench_data.made_up_photographs(2, 48, 64)
    with tempfile.TemporaryDirectory() as folder:
        shards = bench_data.pack(jpegs, Path(folder), 16)
        bench = bench_data.DataBench(shards, jpegs, 32)
        with SampleReader(shards) as reader:
            samples = [{"__key__": s.key, **s.members} for s in map(reader.read, range(4))]
    for decode in (bench.decode_fast, bench.peers.decode_pillow):
        batch = bench._collate(list(map(decode, samples)))
        assert batch["images"].shape == (4, 3, 32, 32) and batch["tokens"].shape[0] == 4


def test_memory_is_measured_over_fewer_steps_where_time_is_short(monkeypatch, capsys):
    """What it loads is fitted to the time before it is loaded."""
    monkeypatch.setattr(bench_memory, "_TRIED", 4)
    rows = bench_memory.measure(0, 800, 1, 700, 2, seconds=1.5)
    assert len(rows) == 3 and 2 <= rows[0]["samples"] < 700
    said = capsys.readouterr().err
    assert "steps a second" in said and "epoch 3: " in said
    monkeypatch.setattr(bench_memory, "in_fresh_process", lambda *_: rows)
    options = argparse.Namespace(workers=0, rows=800, batch=1, steps=700, repeats=5)
    bench_memory.run(options)
    assert any("of 700 steps of each epoch" in line for line in shortened())


def test_cases_on_a_gpu_have_one_repetition_when_the_time_is_over():
    calls = []
    end_after(0.0)
    bench_gpu._Clock(torch.device("cpu"), 7).seconds(lambda: calls.append(1))
    assert len(calls) == 2  # the first one warms up
    assert "fewer than 7 repetitions" in shortened()[0]
