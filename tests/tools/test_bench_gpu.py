"""The benchmark for GPUs runs through on a CPU, where its figures say nothing."""

from argparse import ArgumentParser

import pytest
import torch

from tools import bench_gpu


def options(*arguments: str):
    parser = ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    bench_gpu.add_arguments(parser)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no GPU here"):
        bench_gpu.run(options())
