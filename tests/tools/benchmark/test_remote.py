"""The benchmark of shards on a slow server runs, and its figures are what they are called."""

from argparse import ArgumentParser

from tools.benchmark import remote as bench_remote
from tools.benchmark.arguments import ARGUMENTS


def test_a_run_has_a_row_per_case():
    parser = ArgumentParser()
    parser.add_argument("--repeats", type=int)
    ARGUMENTS["remote"](parser)
    small = ["--repeats=5", "--samples=256", "--steps=3", "--step-s=0.01", "--delay-s=0.02"]
    result = bench_remote.run(parser.parse_args(small))
    rows = {row["case"]: row for row in result["rows"]}
    local, direct, cached = (
        rows[c] for c in (bench_remote.LOCAL, bench_remote.DIRECT, bench_remote.CACHED)
    )
    for row in (direct, cached):
        assert row["first batch, s"] > 0.02  # at least one answer stands before it
        assert row["MiB read"] > 0 and 0 <= row["waiting, share of the time"] < 1
    assert local["MiB read"] > 0
    (bar,) = result["bars"]
    assert bar["measured"] == cached["waiting, share of the time"]
