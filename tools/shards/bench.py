"""`python -m tools.shards bench`: how fast your shards are read, decoded and made into batches."""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console

from data_pipeline.images.decode import DecodeError, decode, read_header
from data_pipeline.images.transforms import ImageSettings
from data_pipeline.order.order import Order
from data_pipeline.reading.reader import BadSample, Sample, SampleReader
from data_pipeline.rng import sample_rng
from data_pipeline.samples.images import ImageProcessor
from data_pipeline.samples.members import AbsentValue, bad
from data_pipeline.samples.pictures import PictureDataSettings
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.errors import ShardError
from tools.benchmark.__main__ import show
from tools.support.arguments import natural, positive
from tools.support.measure import LEAST_REPEATS, Measurement, interleaved, machine, median_rate

_BATCH = 64


def add_command(commands: Any, text: str) -> None:
    """Add `bench` to the sub-commands of tools.shards; `text` says what it does."""
    parser = commands.add_parser("bench", help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("shards", nargs="+", help="folders, tars, globs or {000..123} expressions")
    parser.add_argument(
        "--samples", type=positive, default=2000, help="per repetition (default %(default)s)"
    )
    parser.add_argument("--size", type=positive, default=224, help="of crops (default %(default)s)")
    parser.add_argument(
        "--workers", type=natural, nargs="*", default=[0, 2], help="loaders to time (default: 0 2)"
    )
    parser.add_argument(
        "--repeats", type=positive, default=LEAST_REPEATS, help="medians of so many (default: 5)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if options.repeats < LEAST_REPEATS:
        raise ShardError(f"--repeats {options.repeats}: medians need at least {LEAST_REPEATS}")
    import torch  # --help and wrong arguments do without

    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # as in the workers
    bench = ShardBench(ShardSet.open(options.shards), options.samples, options.size)
    with Console(stderr=True).status("reading all samples once") as status:
        sizes, faults = bench.survey()
        measured = interleaved(bench.cases(options.workers), options.repeats, status.update)
    result = _result(measured, sizes, faults, bench)
    described = machine("python -m tools.shards bench " + " ".join(options.shards))
    show(result, described)
    if options.json is not None:
        text = json.dumps({**result, "machine": described}, indent=1) + "\n"
        options.json.write_text(text, encoding="utf-8")
    return 0


class ShardBench:
    """The cases; each method does one repetition and returns the number of samples.

    Rows come in the order of training; bad ones, which `survey` finds, are left out.
    """

    def __init__(self, shards: ShardSet, samples: int, size: int) -> None:
        self.shards = shards
        self.order = Order.plan(len(shards), 0, _BATCH)
        self.rows = self.order.rows(np.arange(min(samples, len(shards)))).tolist()
        settings = ImageSettings(size=size, flip_probability=0.5)
        self.settings = PictureDataSettings(shards=["unused"], image=settings)
        self.processor = ImageProcessor(self.settings, train=True)
        self.images = 0
        """Rows whose image can be decoded."""

    def survey(self) -> tuple[list[int], list[BadSample]]:
        """Read and decode every row once; keep the good ones.

        Returns:
            bytes of all members of each row that could be read; what is wrong with the others.
            Rows without an image are only read, if no row has one.
        """
        sizes, faults, without, good, decoded = [], [], [], [], []
        with SampleReader(self.shards) as reader:
            for row in self.rows:
                try:
                    sample = reader.read(row)
                    sizes.append(sum(map(len, sample.members.values())))
                    good.append(row)
                    self._decoded(sample)
                    decoded.append(row)
                except AbsentValue as fault:
                    without.append(fault)
                except BadSample as fault:
                    faults.append(fault)
        if not good:
            raise faults[0]
        if decoded:
            faults += without
        self.images = len(decoded)
        self.rows = decoded or good
        return sizes, faults

    def cases(self, workers: list[int]) -> dict[str, Callable[[], float]]:
        """Name -> case; of shards without images only reading is timed."""
        cases: dict[str, Callable[[], float]] = {"read": self.read}
        if self.images:
            cases |= {"read, decode": self.decode, "read, decode, crop, resize": self.crop}
            for count in workers:
                name = f"loader, {count} workers" if count else "loader, in this process"
                cases[name] = partial(self.load, count)
        return cases

    def read(self) -> float:
        """All members of each sample."""
        for _ in self._samples(None):
            pass
        return len(self.rows)

    def decode(self) -> float:
        """The image in full."""
        for sample in self._samples(self.processor.extensions):
            self._decoded(sample)
        return len(self.rows)

    def crop(self) -> float:
        """A random-resized crop, as in training; scaled decoding where the crop allows it."""
        for sample in self._samples(self.processor.extensions):
            draws = partial(sample_rng, 0, "bench", sample.row)
            self.processor.load_image(sample, draws, None, None)
        return len(self.rows)

    def load(self, workers: int) -> float:
        """Batches of the loader."""
        from data_pipeline.loader.loader import LoaderSettings, StepLoader, TaskStream

        stream = TaskStream(
            "bench", SampleReader(self.shards), self.order, self.processor, 0, _BATCH, _BATCH
        )
        settings = LoaderSettings(workers=workers, max_bad_fraction=1.0)
        steps = max(1, len(self.rows) // _BATCH)
        loader = StepLoader(
            {"bench": stream}, lambda step: ("bench", step), settings, 0, 1, 0, steps
        )
        return sum(len(window.micro_batches[0]["valid"]) for window in loader)

    def _samples(self, extensions: frozenset[str] | None) -> Iterator[Sample]:
        with SampleReader(self.shards) as reader:
            for row in self.rows:
                yield reader.read(row, extensions)

    def _decoded(self, sample: Sample) -> np.ndarray:
        names = [e for e in self.settings.image_extensions if e in sample.members]
        if not names:
            raise bad(sample, "has no image", AbsentValue)
        data = sample.members[names[0]]
        try:
            return decode(data, read_header(data, self.settings.image.max_pixels))
        except DecodeError as error:
            raise bad(sample, str(error)) from error


def _result(
    measured: dict[str, list[Measurement]],
    sizes: list[int],
    faults: list[BadSample],
    bench: ShardBench,
) -> dict[str, Any]:
    """What `show` of `tools.benchmark` prints."""
    mean = sum(sizes) / len(sizes)
    rows = [
        {
            "case": name,
            "samples/s": median_rate(repetitions),
            "MB/s": median_rate(repetitions) * mean / 1e6,
            "us per sample": 1e6 / median_rate(repetitions),
            "us per sample (CPU)": 1e6 / median_rate(repetitions, "cpu_seconds"),
        }
        for name, repetitions in measured.items()
    ]
    notes = [
        f"{len(bench.rows):,} of {len(bench.shards):,} samples, {mean / 1e3:,.1f} kB each on "
        f"average, in the order of training; crops of {bench.settings.image.size} px",
        "read once before: figures of storage that the page cache does not hold are lower",
    ]
    if not bench.images:
        notes.append("none of them has an image that can be decoded: only reading was timed")
    if faults:
        notes.append(f"{len(faults)} samples are bad and were left out; the first: {faults[0]}")
    return {"title": "loading from shards", "rows": rows, "notes": notes}
