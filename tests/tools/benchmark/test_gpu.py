"""The benchmark for GPUs runs through on a CPU, where its figures say nothing."""

import math
import sys
from argparse import ArgumentParser
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pretrain.models.operators.dcnv3 import dcnv3
from tools.benchmark import dcnv4 as bench_dcnv4
from tools.benchmark import gpu as bench_gpu
from tools.benchmark.arguments import ARGUMENTS


def options(*arguments: str):
    parser = ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    ARGUMENTS["gpu"](parser)
    return parser.parse_args(arguments)


def test_all_rows_have_all_columns(monkeypatch):
    monkeypatch.setattr(bench_gpu, "STAGES", (("T", 5, 4, 32, 16), ("H", 4, 4, 64, 32)))
    small = ("--device=cpu", "--batch=1", "--models", "T:1", "--image=32", "--copy-mib=1")
    result = bench_gpu.run(options(*small))
    *kernels, model = result["rows"]
    assert len(kernels) == 2 * 2 * 2 and all(set(row) == set(model) for row in kernels)
    assert all(row["ms"] > 0 and row["share of the floor"] > 0 for row in kernels)
    assert model["images/s"] > 0 and model["MFU"] > 0 and model["peak GiB"] is None
    assert [bar["bar"] for bar in result["bars"]] == [0.6, 0.35]
    assert "MFU is a share of the matrix product" in result["notes"][0]
    # A GPU whose peak is known, as a run's MFU has it.
    monkeypatch.setattr(bench_gpu, "_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(bench_gpu, "_kernel_rows", lambda *_: [])
    monkeypatch.setattr(bench_gpu, "floor_bars", lambda *_: [])
    result = bench_gpu.run(options(*small))
    assert result["rows"][0]["MFU"] == pytest.approx(result["rows"][0]["TFLOP/s"] / 989.4)
    assert "share of 989.4, the dense peak" in result["notes"][0]


def package(monkeypatch, function) -> None:
    """A DCNv4 package whose kernel is `function`."""
    functions = ModuleType("DCNv4.functions")
    functions.DCNv4Function = SimpleNamespace(apply=function)
    monkeypatch.setitem(sys.modules, "DCNv4", ModuleType("DCNv4"))
    monkeypatch.setitem(sys.modules, "DCNv4.functions", functions)


def test_dcnv4_gets_its_own_layout(monkeypatch):
    """The package as its sources read it: 18 offsets, then 9 weights, group by group."""
    groups, depth = 5, 16
    value, offset, mask = (
        tensor.detach()
        for tensor in bench_gpu._inputs(
            2, 5, 4, groups * depth, groups, torch.float32, torch.device("cpu")
        )
    )

    def kernel(value, joined, *rest):
        assert joined.shape[-1] == 136 and not joined[..., 135:].any()  # 5 * 27, and one zero
        assert rest == (3, 3, 1, 1, 1, 1, 1, 1, groups, depth, 1.0, 256, 0)
        parts = joined[..., :135].unflatten(-1, (groups, 27))
        return dcnv3(value, parts[..., :18].flatten(-2), parts[..., 18:].flatten(-2), groups=groups)

    package(monkeypatch, kernel)
    function, said = bench_dcnv4.find()
    assert "the same sampling" in said
    found = bench_dcnv4.call(function, value, bench_dcnv4.join(offset, mask, groups), groups)
    torch.testing.assert_close(found, dcnv3(value, offset, mask, groups=groups))


def test_dcnv4_is_timed_where_it_is_there(monkeypatch):
    monkeypatch.setattr(bench_gpu, "STAGES", (("T", 5, 4, 32, 16),))
    small = options("--device=cpu", "--batch=1", "--models", "--image=32", "--copy-mib=1")
    monkeypatch.setitem(sys.modules, "DCNv4", None)
    result = bench_gpu.run(small)
    assert "DCNv4 was not compared" in result["notes"][-1]
    assert not any("DCNv4 / ours" in row for row in result["rows"])

    def kernel(value, joined, *rest):
        if value.dtype == torch.bfloat16:
            raise RuntimeError("no bfloat16")
        parts = joined[..., :54].unflatten(-1, (2, 27))
        return dcnv3(value, parts[..., :18].flatten(-2), parts[..., 18:].flatten(-2), groups=2)

    package(monkeypatch, kernel)
    rows = {(row["type"], row["pass"]): row for row in bench_gpu.run(small)["rows"]}
    for (kind, _), row in rows.items():
        assert math.isnan(row["DCNv4 / ours"]) == (kind == "bfloat16")
        assert kind == "bfloat16" or row["DCNv4 / ours"] > 0
    package(monkeypatch, lambda value, joined, *rest: value)
    with pytest.warns(UserWarning, match="computes something else"):
        rows = bench_gpu.run(small)["rows"]
    assert all(math.isnan(row["DCNv4 / ours"]) and row["ms"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no GPU here"):
        bench_gpu.run(options())
