"""The benchmarks of the operators on the CPU, at sizes that say nothing about speed."""

import argparse

import pytest

from pretrain.models.operators import cpu_library
from tools.benchmark import dcnv3 as bench_dcnv3
from tools.benchmark import deform_attn as bench_deform_attn
from tools.benchmark.arguments import ARGUMENTS

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _compiled():
    if cpu_library.missing() is not None:
        pytest.skip(cpu_library.missing())


def _run(benchmark, *arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    ARGUMENTS[benchmark.__name__.removeprefix("tools.bench_")](parser)
    return benchmark.run(parser.parse_args(arguments))


def test_dcnv3():
    result = _run(bench_dcnv3, "--threads", "1", "--scale", "0.2", "--depths", "16")
    rows, bars = result["rows"], result["bars"]
    assert len(rows) == 3 * 2 * 2 and all(set(row) == set(rows[0]) for row in rows)
    assert all(min(row[k] for k in ("ns", "peer", "bytes", "flops")) > 0 for row in rows)
    speeds, memory = bars[:6], bars[6:]
    # The slowest type of each shape and pass.
    for bar, start in zip(speeds, (0, 1, 4, 5, 8, 9), strict=True):
        assert bar["measured"] == min(rows[start]["ratio"], rows[start + 2]["ratio"])
    assert all(not bar["at_least"] and bar["measured"] < 1.5 for bar in memory)


def test_deformable_attention():
    result = _run(bench_deform_attn, "--threads", "1", "--images", "1")
    assert [row["queries"] for row in result["rows"]] == ["encoder"] * 2 + ["decoder"] * 2
    assert all(row["ns"] > 0 and row["peer"] > 0 for row in result["rows"])
    assert [bar["at_least"] for bar in result["bars"][:4]] == [True] * 4
