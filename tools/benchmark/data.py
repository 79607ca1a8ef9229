"""`python -m tools.benchmark data`: how fast images become batches, and what bounds it.

All loaders read the same shards, draw a random-resized crop of each image, encode its caption, and
hand over batches of 64. The limit is what two processes reach that decode and resize images which
they hold in memory, and do nothing else: whole images, or only the windows that the crops need.
"""

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from rich.console import Console

from data_pipeline.images import decode
from data_pipeline.images.transforms import ImageSettings, ImageTransform
from data_pipeline.loader.loader import LoaderSettings, StepLoader, TaskStream
from data_pipeline.order.order import Order
from data_pipeline.reading.reader import Sample, SampleReader
from data_pipeline.rng import sample_rng
from data_pipeline.samples.captions import CaptionDataSettings, CaptionProcessor
from data_pipeline.samples.tokenizer import train_byte_level_bpe
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet
from tools.benchmark.peers import Peers
from tools.benchmark.tiny import BUNDLE, TinyBench
from tools.support.measure import Measurement, interleaved, median_rate, ratio, say

WORKERS = 2
BATCH = 64
SHARDS = 8
CAPTION = b"a photograph of something that is worth a caption"
# Photographs on the web carry this much; decoding is bound by it, not by the number of pixels.
BITS_PER_PIXEL = 4.4


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see `tools.benchmark` for the form of the result."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # as in the workers
    samples = args.samples or (9600 if args.long else 1920)
    tiny_samples = args.tiny_samples or (20_000 if args.long else 4000)
    say(f"packing {samples:,} photographs and {tiny_samples:,} tiny images")
    with tempfile.TemporaryDirectory() as folder:
        jpegs = photographs(args.images)
        shards = pack(jpegs, Path(folder) / "shards", samples)
        bench = DataBench(shards, jpegs, args.size)
        tiny = TinyBench(Path(folder) / "tiny", tiny_samples)
        cases = {
            "omnipretrain": bench.ours,
            "webdataset, same decoder": lambda: _drain(bench.peers.webdataset(bench.decode_fast)),
            "webdataset + Pillow": lambda: _drain(
                bench.peers.webdataset(bench.peers.decode_pillow)
            ),
            "open_clip's way": lambda: _drain(bench.peers.open_clip_style()),
            "limit: decode + resize in memory": partial(bench.limit, bench.resize_part),
            "limit: the same with windows": partial(bench.limit, bench.transform_part),
            "limit: decode in memory": partial(bench.limit, bench.decode_part),
            "reading only, omnipretrain": bench.read_ours,
            "reading only, webdataset": bench.read_webdataset,
            "tiny images, read + decode, omnipretrain": tiny.ours,
            "tiny images, read + decode, webdataset + Pillow": tiny.webdataset_pillow,
            f"in bundles of {BUNDLE}, omnipretrain": partial(tiny.ours, bundled=True),
            "order, 128 positions a call": bench.order,
            "first batch at position 10": partial(bench.first_batch, 10),
            "first batch at position 10^9": partial(bench.first_batch, 10**9),
        }
        with Console(stderr=True).status("packing") as status:

            def prepare(text: str) -> None:
                status.update(text)
                into_page_cache(shards)

            results = interleaved(cases, args.repeats, prepare)
        result = report(results, bench, jpegs)
        plain, bundled = (
            sum(shard.bytes for shard in stored.shards) / tiny.samples
            for stored in (tiny.shards, tiny.bundles)
        )
        result["notes"].append(
            f"tiny images take {plain:,.0f} bytes each in a tar, {bundled:,.0f} in bundles"
        )
        return result


def report(
    results: dict[str, list[Measurement]], bench: "DataBench", jpegs: list[bytes]
) -> dict[str, Any]:
    """Table, bars and notes from the measurements."""
    ours, same, pillow, open_clip, limit, windows = list(results.values())[:6]
    rows = [
        {
            "case": name,
            "items/s": median_rate(measured),
            "items per CPU-s": median_rate(measured, "cpu_seconds"),
            "us per item (CPU)": 1e6 / median_rate(measured, "cpu_seconds"),
            "ours / this": ratio(ours, measured) if position < 7 else None,
            "ours / this (CPU)": ratio(ours, measured, "cpu_seconds") if position < 7 else None,
        }
        for position, (name, measured) in enumerate(results.items())
    ]
    cost = {name: 1e6 / median_rate(m, "cpu_seconds") for name, m in results.items()}

    def bar(what: str, measured: float, value: float, at_least: bool) -> dict[str, Any]:
        return {"what": what, "measured": measured, "bar": value, "at_least": at_least}

    reading = cost["reading only, omnipretrain"]
    tiny, tiny_peer = (results[name] for name in results if name.startswith("tiny"))
    near, far = (results[name] for name in results if name.startswith("first batch"))
    bars = [
        bar("webdataset, same decoder: ratio", ratio(ours, same), 1.3, True),
        bar("webdataset + Pillow: ratio", ratio(ours, pillow), 2.0, True),
        bar("open_clip's way: ratio", ratio(ours, open_clip), 3.0, True),
        bar("share of the in-memory limit", ratio(ours, limit), 0.9, True),
        bar("share of the in-memory limit with windows", ratio(ours, windows), 0.9, True),
        bar("order: us per sample", cost["order, 128 positions a call"], 10.0, False),
        bar("reading from tars: us per sample, with checksums", reading, 20.0, False),
        bar("tiny images, against webdataset + Pillow", ratio(tiny, tiny_peer), 10.0, True),
        bar("first batch at 10^9: time / time at 10", ratio(near, far), 1.1, False),
    ]
    pixels = [simplejpeg.decode_jpeg_header(jpeg)[:2] for jpeg in jpegs]
    megapixels = [h * w / 1e6 for h, w in pixels]
    bits = [8 * len(j) / (m * 1e6) for j, m in zip(jpegs, megapixels, strict=True)]
    return {
        "title": f"loading JPEGs, {WORKERS} workers, {bench.size} px random-resized crops",
        "rows": rows,
        "bars": bars,
        "notes": [
            f"{len(jpegs)} JPEGs, repeated to {bench.samples}: median {np.median(megapixels):.3f} "
            f"megapixels, {np.mean([len(j) for j in jpegs]) / 1e3:.0f} kB, "
            f"{np.median(bits):.2f} bits per pixel; no scaled decoding; windows of JPEGs are "
            + ("decoded alone" if decode.has_windows() else "cut from whole images: not compiled"),
            "shards in the page cache; wall time includes starting the workers; CPU time is that "
            "of all processes",
        ],
    }


class DataBench:
    """The cases; each method does one repetition and returns the number of items."""

    def __init__(self, shards: ShardSet, jpegs: list[bytes], size: int) -> None:
        self.shards, self.jpegs, self.size = shards, jpegs, size
        self.samples = len(shards)
        self.image = ImageSettings(size=size, flip_probability=0.5, scaled_decode_margin=None)
        self.tokenizer = train_byte_level_bpe([CAPTION.decode()] * 2, 300)
        data = CaptionDataSettings(shards=["unused"], image=self.image)
        self.fields = CaptionProcessor(data, self.tokenizer, train=True)
        self.transform = ImageTransform(self.image)
        self.big_order = Order.plan(10**9, 0, 1024)
        urls = [shard.path for shard in shards.shards]
        self.peers = Peers(urls, self.image, self.tokenizer.encode, self._collate, BATCH, WORKERS)

    def ours(self) -> float:
        """The loader of this project."""
        return _drain(self._loader(0, self.samples // BATCH, WORKERS))

    def first_batch(self, position: int) -> float:
        """From nothing to the first batch of a run that goes on at `position`."""
        step = position // BATCH
        return _drain(self._loader(step, step + 1, 0))

    def _loader(self, start: int, stop: int, workers: int) -> Iterator[dict[str, Any]]:
        order = Order.plan(self.samples, 0, BATCH)
        stream = TaskStream("bench", SampleReader(self.shards), order, self.fields, 0, BATCH, BATCH)
        settings = LoaderSettings(workers=workers, prefetch_batches=2)
        loader = StepLoader(
            {"bench": stream}, lambda step: ("bench", step), settings, 0, 1, start, stop
        )
        return (window.micro_batches[0] for window in loader)

    def decode_fast(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The very code that the loader of this project runs on a sample."""
        key, members = sample["__key__"], {"jpg": sample["jpg"], "txt": sample["txt"]}
        return self.fields.sample(Sample(0, "", key, members), self._rng_for(key))

    def limit(self, work: Callable[[range], None]) -> float:
        """Work on images in memory in as many processes, keeping nothing."""
        context = multiprocessing.get_context("fork")
        parts = [range(worker, self.samples, WORKERS) for worker in range(WORKERS)]
        processes = [context.Process(target=work, args=(part,)) for part in parts]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError("a process of the in-memory case failed")
        return self.samples

    def read_ours(self) -> float:
        """Read all members of all samples, in the order of training."""
        with SampleReader(self.shards) as reader:
            for row in Order.plan(self.samples, 0, BATCH).rows(np.arange(self.samples)).tolist():
                reader.read(row)
        return self.samples

    def read_webdataset(self) -> float:
        """Read all members of all samples, in storage order."""
        import webdataset

        urls = [shard.path for shard in self.shards.shards]
        return sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))

    def order(self) -> float:
        """Evaluate the order of a billion rows, 128 positions at a time."""
        calls = 500
        for call in range(calls):
            self.big_order.rows(np.arange(call * 128, call * 128 + 128) + 123_456_789)
        return calls * 128

    def _collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return self.fields.collate(items, [True] * len(items))

    def _rng_for(self, key: str):
        return lambda purpose: sample_rng(0, "bench", int(key), purpose)

    def decode_part(self, part: range) -> None:
        """Decode whole images."""
        buffer = np.empty(max(h * w * 3 for h, w in map(_size, self.jpegs)), dtype=np.uint8)
        for number in part:
            simplejpeg.decode_jpeg(self.jpegs[number % len(self.jpegs)], "RGB", buffer=buffer)

    def resize_part(self, part: range) -> None:
        """Decode whole images, then crop and resize."""
        decode.without_windows()
        self.transform_part(part)

    def transform_part(self, part: range) -> None:
        """Decode, crop, resize and flip as the loader does."""
        out = np.empty((self.size, self.size, 3), dtype=np.uint8)
        for number in part:
            jpeg = self.jpegs[number % len(self.jpegs)]
            self.transform(jpeg, sample_rng(0, "bench", number, "image"), out)


def photographs(source: Path | None) -> list[bytes]:
    """JPEGs of a folder or of shards; without either, 200 made-up ones of 500 x 375 pixels."""
    if source is None:
        return made_up_photographs(200, 375, 500)
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if files:
        return [path.read_bytes() for path in files]
    reader = SampleReader(ShardSet.open(str(source)))
    rows = range(min(len(reader.shards), 1000))
    found = [reader.read(row, {"jpg", "jpeg"}).members for row in rows]
    jpegs = [jpeg for members in found for jpeg in members.values()]
    if not jpegs:
        raise SystemExit(f"{source}: holds no JPEG, neither as files nor in shards")
    return jpegs


def made_up_photographs(
    count: int,
    height: int,
    width: int,
    bits_per_pixel: float = BITS_PER_PIXEL,
    subsampling: str = "444",
) -> list[bytes]:
    """Noise with the spectrum of photographs (amplitude falls as 1 / frequency), as JPEGs whose
    quality gives `bits_per_pixel`."""
    encode = partial(simplejpeg.encode_jpeg, colorsubsampling=subsampling)
    first, bits = _noise(0, height, width), bits_per_pixel * height * width
    quality = min(range(50, 100), key=lambda q: abs(8 * len(encode(first, quality=q)) - bits))
    return [encode(_noise(seed, height, width), quality=quality) for seed in range(count)]


def pack(jpegs: list[bytes], folder: Path, samples: int) -> ShardSet:
    """Shards of `samples` samples (jpg, txt, json), the images repeated in turn."""
    per_shard = -(-samples // SHARDS)
    with ShardWriter(folder, "bench", max_samples=per_shard) as writer:
        for number in range(per_shard * SHARDS):
            members = {"jpg": jpegs[number % len(jpegs)], "txt": CAPTION, "json": b'{"label": 1}'}
            writer.write(f"{number:08d}", members)
    return ShardSet.open(str(folder))


def into_page_cache(shards: ShardSet) -> None:
    """Read all bytes once. A system that reclaims idle pages would otherwise have the case that
    comes after the in-memory ones read from the disk, and the next one from memory."""
    for shard in shards.shards:
        with open(shard.path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def _noise(seed: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    frequency[0, 0] = 1.0
    spectrum = np.fft.fft2(rng.standard_normal((3, height, width))) / frequency
    planes = np.fft.ifft2(spectrum).real
    planes = planes[0] + 0.3 * planes  # channels of a photograph resemble each other
    planes = 128 + 50 * (planes - planes.mean()) / planes.std()
    return np.ascontiguousarray(np.clip(planes, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def _size(jpeg: bytes) -> tuple[int, int]:
    return simplejpeg.decode_jpeg_header(jpeg)[:2]


def _drain(batches: Iterable[Any]) -> float:
    """Take all batches, touching each as a copy to the device would begin to."""
    count = 0
    for batch in batches:
        images = batch["images"] if isinstance(batch, dict) else batch[0]
        count += len(images)
        images[-1, 0, 0, 0].item()
    return count
