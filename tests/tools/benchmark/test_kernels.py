"""Counting the machine code of kernels: loops, occupancy, and one operator all the way."""

from argparse import ArgumentParser

import pytest

from tools.benchmark import kernels as bench_kernels
from tools.benchmark.arguments import ARGUMENTS
from tools.benchmark.machine_code import Code, executed


def options(*arguments: str):
    parser = ArgumentParser()
    ARGUMENTS["kernels"](parser)
    return parser.parse_args(arguments)


def code(names: str, *loops: tuple[int, int]) -> Code:
    """Of instructions named by letters."""
    return Code(32, 0, 0, 4, [(name, None) for name in names], list(loops), "")


@pytest.mark.parametrize(
    "given, expected, inner, count",
    [
        (code("aLLb"), 2, 2, 4),
        # One loop, whose two loads make six in three trips.
        (code("aLLbc", (1, 4)), 6, 6, 2 + 3 * 3),
        # Two points of four in a trip of the inner loop, and five trips of the outer one.
        (code("aoLLbpq", (2, 5), (1, 6)), 20, 4, 2 + 5 * (2 + 2 * 3)),
        # The outer loop's body is straight: as if there were one loop.
        (code("aoLLLLq", (1, 6)), 20, 4, 2 + 5 * 5),
        # A load more, before the loop.
        (code("LLbc", (1, 3)), 8, 8, 2 + 8 * 2),
    ],
)
def test_trips_follow_from_the_loads(given, expected, inner, count):
    assert executed(given, "L", expected, inner) == count


@pytest.mark.parametrize(
    "given, expected, says",
    [
        (code("aLLLb", (1, 5)), 4, "3 L, which does not divide 4"),
        (code("abb", (1, 3)), 4, "0 L, which does not divide 4"),
        (code("aLL"), 4, "2 L are executed, not 4"),
        (code("LLLLLLL"), 4, "7 L are executed, not 4"),
        (code("LLLL")._replace(instructions=[("CALL.REL.NOINC", "$div")]), 4, "div.* is not known"),
    ],
)
def test_code_of_another_form_is_not_counted(given, expected, says):
    with pytest.raises(ValueError, match=says):
        executed(given, "L", expected, expected)


@pytest.mark.parametrize(
    "registers, warps, held",
    [(32, 4, 64), (40, 4, 48), (64, 4, 32), (128, 4, 16), (255, 8, 8), (32, 1, 32), (88, 1, 20)],
)
def test_warps_that_a_multiprocessor_holds(registers, warps, held):
    """64 registers: 65,536 / (64 * 32) = 32 warps. Of one warp each, 32 programs at most. 88: five
    warps of 2,816 in the 16,384 of each of four schedulers, though 65,536 would hold 23."""
    assert bench_kernels.resident(registers, warps) == held


@pytest.mark.slow
def test_rows_of_an_operator(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from pretrain.models.operators import dcnv3_triton as module

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(bench_kernels, "cases", lambda dtype: [bench_kernels._dcnv3(16, 2, dtype)])
    for kernel in (module.forward_kernel, module.backward_kernel):
        monkeypatch.setattr(kernel, "configs", kernel.configs[:2])
    result = bench_kernels.run(options("--all"))
    rows = {(row["type"], row["pass"], row["span, points"]): row for row in result["rows"]}
    assert len(rows) == 2 * 2 * 2
    for (dtype, what, _), row in rows.items():
        bytes_of = 2 if dtype == "bfloat16" else 4
        numbers = 16 + 27 + 16 + (16 + 27 if what == "backward" else 0)
        share = numbers * bytes_of / (0.9 * 3.35e12)
        share /= row["instructions an item"] / (132 * 4 * 1.98e9)
        assert row["share of the floor at most"] == pytest.approx(share)
        # At four corners of nine points, 16 channels are multiplied and added, by 32 threads.
        assert row["instructions an item"] > 4 * 9 * 16 / 32
        assert row["spilled bytes"] == 0 and row["registers"] <= 255
    add = rows["bfloat16", "backward", "32, 3"]["added / touched"]
    assert add == pytest.approx(4 * 9 * 16 * 4 / (2 * (59 + 43)))
    names = [bar["what"] for bar in result["bars"]]
    assert len(names) == 3 and [bar["bar"] for bar in result["bars"]] == [0, 0.6, 0.35]


def test_interpreted_kernels_have_no_machine_code(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET=1 is set"):
        bench_kernels.run(options())
