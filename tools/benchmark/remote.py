"""`python -m tools.benchmark remote`: does a trainer wait for shards on a slow server?

A server of its own process answers each request after a delay. The trainer is a pause as long as a
step; what it waits for batches is measured, apart from the first one, before which nothing can have
been read. Caches begin empty in every repetition, and hold less than the data set.
"""

import argparse
import multiprocessing
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import torch
from rich.console import Console

from data_pipeline.cache.cache import CachedShards, CacheSettings
from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.loader import LoaderSettings, StepLoader, TaskStream
from data_pipeline.order.order import Order
from data_pipeline.reading.reader import SampleReader
from data_pipeline.samples.captions import CaptionDataSettings, CaptionProcessor
from data_pipeline.samples.tokenizer import train_byte_level_bpe
from data_pipeline.shards.shard_set import ShardSet
from tools.benchmark.data import BATCH, CAPTION, WORKERS, pack, photographs
from tools.support.measure import interleaved, say
from tools.support.range_server import RangeServer

LOCAL, DIRECT, CACHED = "local shards", "server", "server, cache with read-ahead"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see `tools.benchmark` for the form of the result."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as name, Console(stderr=True).status("packing") as status:
        folder = Path(name)
        say(f"packing {args.samples:,} photographs")
        shards = pack(photographs(args.images), folder / "shards", args.samples)
        with _Server(folder / "shards", args.delay_s) as url:
            bench = RemoteBench(args, shards, ShardSet.open(url), folder / "cache")
            cases = {case: partial(bench.train, case) for case in (LOCAL, DIRECT, CACHED)}
            interleaved(cases, args.repeats, status.update)
    return bench.report()


class RemoteBench:
    """The cases; `train` does one repetition."""

    def __init__(
        self, args: argparse.Namespace, local: ShardSet, remote: ShardSet, cache: Path
    ) -> None:
        self.args, self.shards = args, {LOCAL: local, DIRECT: remote, CACHED: remote}
        size = sum(shard.bytes for shard in local.shards)
        self.cache = CacheSettings(folder=str(cache), max_gib=0.7 * size / 2**30)
        data = CaptionDataSettings(shards=["unused"], image=ImageSettings())
        self.fields = CaptionProcessor(
            data, train_byte_level_bpe([CAPTION.decode()] * 2, 300), train=True
        )
        self.waits: dict[str, list[list[float]]] = {case: [] for case in self.shards}
        self.bytes: dict[str, list[int]] = {case: [] for case in self.shards}

    def train(self, case: str) -> float:
        """Take all batches, with a pause after each."""
        shutil.rmtree(self.cache.folder, ignore_errors=True)
        shards, cache = self.shards[case], self.cache if case == CACHED else None
        reader = SampleReader(shards, source=CachedShards(shards, cache) if cache else None)
        order = Order.plan(len(shards), 0, BATCH)
        stream = TaskStream("bench", reader, order, self.fields, 0, BATCH, BATCH)
        loader = StepLoader(
            {"bench": stream},
            lambda step: ("bench", step),
            LoaderSettings(workers=WORKERS, cache=cache),
            0,
            1,
            0,
            self.args.steps,
        )
        waits = []
        for window in loader:
            waits.append(window.seconds["wait"])
            time.sleep(self.args.step_s)
        self.waits[case].append(waits)
        self.bytes[case].append(loader.counters("bench")["bytes_read"])
        return len(waits)

    def report(self) -> dict[str, Any]:
        """Table and bars; the first repetition was the warm-up."""
        rows = []
        for case, repetitions in self.waits.items():
            measured = repetitions[1:] or repetitions
            later = [waits[1:] for waits in measured]
            shares = [sum(w) / (sum(w) + len(w) * self.args.step_s) for w in later]
            rows.append(
                {
                    "case": case,
                    "first batch, s": median(waits[0] for waits in measured),
                    "median later wait, ms": 1e3
                    * median(wait for waits in later for wait in waits),
                    "longest later wait, ms": 1e3 * median(max(waits) for waits in later),
                    "waiting, share of the time": median(shares),
                    "MiB read": median(self.bytes[case][-len(measured) :]) / 2**20,
                }
            )
        cached = rows[-1]["waiting, share of the time"]
        return {
            "title": f"{self.args.steps} steps of {BATCH} images and {self.args.step_s:g} s, "
            f"{1e3 * self.args.delay_s:g} ms to each answer",
            "rows": rows,
            "bars": [
                {
                    "what": f"{CACHED}: waiting after the first batch, share of the time",
                    "measured": cached,
                    "bar": 0.02,
                    "at_least": False,
                }
            ],
            "notes": [f"{WORKERS} workers; the cache holds 70 % of the data set and begins empty"],
        }


class _Server:
    """`tools.support.range_server` in a process of its own, so that it does not share the trainer's
    interpreter.
    """

    def __init__(self, folder: Path, delay_s: float) -> None:
        self._mine, its = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(str(folder), delay_s, its), daemon=True
        )

    def __enter__(self) -> str:
        self._process.start()
        return self._mine.recv()

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.join()


def _serve(folder: str, delay_s: float, answer) -> None:
    server = RangeServer(folder, delay_s=delay_s)
    answer.send(server.url)
    server.serve_forever()
