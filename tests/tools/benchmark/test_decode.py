"""The benchmark of scaled decoding, on photographs small enough for a test."""

from argparse import ArgumentParser

import numpy as np
import pytest

from tools.benchmark import decode as bench_decode
from tools.benchmark.arguments import ARGUMENTS
from tools.benchmark.data import made_up_photographs
from tools.benchmark.decode import DecodeBench, psnr


def test_a_run_has_a_row_per_case():
    parser = ArgumentParser()
    parser.add_argument("--repeats", type=int)
    ARGUMENTS["decode"](parser)
    small = ["--repeats=5", "--count=1", "--megapixels=0.3", "--crops=2", "--size=48"]
    result = bench_decode.run(parser.parse_args(small))
    rows = {row["case"]: row for row in result["rows"]}
    assert next(iter(rows)) == "full size" and len(rows) == 8
    assert all(row["images per CPU-s"] > 0 for row in rows.values())
    assert rows["full size"]["speed / full size"] == 1
    assert rows["margin 1"]["scaled"] == 1 and rows["full size"]["scaled"] is None
    assert [bar["bar"] for bar in result["bars"]] == [2.0, 43.0]


def test_fidelity_grows_with_the_margin():
    bench = DecodeBench(made_up_photographs(2, 480, 640, 2.0, "420"), 12, 48, 0.35)
    found = [bench.compare(margin) for margin in (1.0, 2.0, 3.0)]
    means = [quality["PSNR mean"] for quality in found]
    assert means == sorted(means) and means[1] > 43
    assert found[0]["scaled"] == 1
    assert bench.compare(100.0) == {"scaled": 0, "PSNR mean": None, "PSNR 5 %": None}


def test_signal_to_noise():
    image = np.full((4, 4, 3), 100, np.uint8)
    assert psnr(image, image) == 100
    assert psnr(image, image + 1) == pytest.approx(48.13, abs=0.01)
    assert psnr(image, 255 - image) == pytest.approx(20 * np.log10(255 / 55))
