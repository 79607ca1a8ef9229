"""Benchmarks say what they do, and end in time."""

import time

import pytest

from tools import bench_measure, benchmark
from tools.bench_measure import end_after, interleaved


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
    assert said.count("a second") == 2 * found and "warm-up: one" in said
    assert ("--long" in said) == (found < 7)


@pytest.mark.parametrize("long", [False, True])
def test_the_start_says_what_is_done_and_how_long(long, monkeypatch, capsys):
    seen = {}

    def run(options):
        seen["end"] = bench_measure._end
        return {"title": "t", "rows": [{"case": "a", "speed": 1.0}], "bars": []}

    from tools import bench_decode

    monkeypatch.setattr(bench_decode, "run", run)
    assert benchmark.main(["decode", *(["--long"] if long else [])]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("decode: large photographs: decoding at a fraction")
    assert ("about 5 minutes" in first) != long
    assert (seen["end"] is None) == long
