"""`python -m tools.benchmark decode`: what decoding large photographs at a fraction of their size
gains, and what it costs.

Every case draws the same random-resized crops and decodes, crops and resizes from memory in one
process. The pictures of a margin are compared with those that the same resize makes of the same
region of the image decoded at full size.
"""

import argparse
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from rich.console import Console

from data_pipeline.images.crops import at_scale, random_box
from data_pipeline.images.decode import decode, grid_origin, read_header
from data_pipeline.images.transforms import ImageSettings, ImageTransform
from data_pipeline.rng import sample_rng
from tools.benchmark.data import made_up_photographs, photographs
from tools.support.measure import interleaved, median_rate, ratio

MARGINS = (1.0, 1.5, 2.0, 3.0)
FULL = "full size"
PILLOW_RESIZE = "full size, Pillow's resize"
PILLOW = "full size, Pillow"
LIMIT = "limit: decoding to 1/8, nothing else"
# What a margin is judged by: the default of the recipe.
DEFAULT = ImageSettings().scaled_decode_margin


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see `tools.benchmark` for the form of the result."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # as in the workers
    if args.images is None:
        width = round((args.megapixels * 1e6 * 4 / 3) ** 0.5)
        shape = width * 3 // 4, width
        jpegs = made_up_photographs(args.count, *shape, args.bits_per_pixel, "420")
    else:
        jpegs = photographs(args.images)
    bench = DecodeBench(jpegs, args.crops, args.size, args.least_scale)
    cases: dict[str, Callable[[], float]] = {
        FULL: partial(bench.make, None),
        PILLOW_RESIZE: partial(bench.make_pillow, bench.decoded),
        PILLOW: partial(bench.make_pillow, bench.decoded_by_pillow),
        LIMIT: bench.entropy,
        **{f"margin {margin:g}": partial(bench.make, margin) for margin in MARGINS},
    }
    with Console(stderr=True).status("starting") as status:
        results = interleaved(cases, args.repeats, status.update)
        status.update("comparing")
        quality = {f"margin {margin:g}": bench.compare(margin) for margin in MARGINS}
    rows = [
        {
            "case": name,
            "images per CPU-s": median_rate(measured, "cpu_seconds"),
            "speed / full size": ratio(measured, results[FULL], "cpu_seconds"),
            "speed / Pillow's resize": ratio(measured, results[PILLOW_RESIZE], "cpu_seconds"),
            "speed / Pillow": ratio(measured, results[PILLOW], "cpu_seconds"),
            **quality.get(name, {"scaled": None, "PSNR mean": None, "PSNR 5 %": None}),
        }
        for name, measured in results.items()
    ]
    default = next(row for row in rows if row["case"] == f"margin {DEFAULT:g}")
    return {
        "title": f"{args.size} px random-resized crops of {args.least_scale:g} to 1 of the area",
        "rows": rows,
        "bars": [
            {"what": what, "measured": default[column], "bar": bar, "at_least": True}
            for what, column, bar in (
                (
                    f"margin {DEFAULT:g}: speed / full size with Pillow's resize",
                    "speed / Pillow's resize",
                    2.0,
                ),
                (f"margin {DEFAULT:g}: PSNR, mean in dB", "PSNR mean", 43.0),
            )
        ],
        "notes": [
            bench.describe(),
            "PSNR: of the images that the margin lets be scaled, in dB",
            "the limit is Huffman decoding of whole images, which no scale saves; a window saves "
            "that of what lies below it",
        ],
    }


class DecodeBench:
    """The cases; `make` and `make_pillow` do one repetition and return the number of images."""

    def __init__(self, jpegs: list[bytes], crops: int, size: int, least_scale: float) -> None:
        self.jpegs, self.crops, self.size = jpegs, crops, size
        self.scale = (least_scale, 1.0)
        self.out = np.empty((size, size, 3), dtype=np.uint8)

    def make(self, margin: float | None) -> float:
        """Decode at the scale that `margin` allows."""
        transform = self._transform(margin)
        for number in range(self.crops):
            transform(self._jpeg(number), self._rng(number), self.out)
        return self.crops

    def make_pillow(self, decoded: Callable[[bytes], Image.Image]) -> float:
        """Crop and resize with one call of Pillow."""
        settings = self._transform(None).settings
        for number in range(self.crops):
            rgb = decoded(self._jpeg(number))
            rng = self._rng(number)
            x, y, w, h = random_box(*rgb.size, settings.scale, settings.ratio, rng)
            box = (x, y, x + w, y + h)
            self.out[:] = rgb.resize((self.size,) * 2, Image.Resampling.BICUBIC, box=box)
        return self.crops

    def decoded(self, jpeg: bytes) -> Image.Image:
        """By the decoder of this project."""
        return Image.fromarray(decode(jpeg, read_header(jpeg, 10**10)))

    def decoded_by_pillow(self, jpeg: bytes) -> Image.Image:
        """By Pillow."""
        with Image.open(io.BytesIO(jpeg)) as picture:
            return picture.convert("RGB")

    def entropy(self) -> float:
        """Decode at the smallest scale, whose cost is that of reading the coefficients."""
        for number in range(self.crops):
            jpeg = self._jpeg(number)
            decode(jpeg, read_header(jpeg, 10**10), 8)
        return self.crops

    def compare(self, margin: float) -> dict[str, Any]:
        """Share of crops that are scaled, and their PSNR against the same region at full size."""
        transform = self._transform(margin)
        found = []
        for number in range(self.crops):
            data, rng = self._jpeg(number), self._rng(number)
            header = read_header(data, transform.settings.max_pixels)
            cut = transform.plan(header, rng)
            if cut.factor == 1:
                continue
            place = at_scale(cut.box, cut.factor, grid_origin(header, cut.factor))
            scaled, whole = (
                transform.render(decode(data, header, *scale), cut, rng, None).image
                for scale in ((cut.factor, None, place), (1, None, cut.box))
            )
            found.append(psnr(scaled, whole))
        return {
            "scaled": len(found) / self.crops,
            "PSNR mean": float(np.mean(found)) if found else None,
            "PSNR 5 %": float(np.percentile(found, 5)) if found else None,
        }

    def describe(self) -> str:
        """The photographs in words."""
        sizes = [read_header(jpeg, 10**10) for jpeg in self.jpegs]
        pixels = np.array([header.height * header.width for header in sizes])
        bits = 8 * np.array([len(jpeg) for jpeg in self.jpegs]) / pixels
        return (
            f"{len(self.jpegs)} JPEGs: median {np.median(pixels) / 1e6:.2f} megapixels, "
            f"{np.median(bits):.2f} bits per pixel"
        )

    def _transform(self, margin: float | None) -> ImageTransform:
        settings = ImageSettings(size=self.size, scale=self.scale, scaled_decode_margin=margin)
        return ImageTransform(settings)

    def _jpeg(self, number: int) -> bytes:
        return self.jpegs[number % len(self.jpegs)]

    def _rng(self, number: int) -> np.random.Generator:
        return sample_rng(0, "bench", number, "image")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images in dB; 100 if they are equal."""
    error = ((a.astype(np.float64) - b) ** 2).mean()
    return 100.0 if error == 0 else float(10 * np.log10(255**2 / error))
