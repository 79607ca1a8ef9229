"""Memory of a loader over three epochs: all its processes together, also over 10**8 rows.

So many rows are simulated: the data set is a list of shards in which a few real ones stand again
and again. Of epochs longer than `--steps` only the first steps are loaded; what the order, the
shard list and the indices cost is that of the whole data set.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from data_pipeline.labels import LabelDataSettings, LabelFields
from data_pipeline.loader import LoaderSettings, StepLoader, TaskStream
from data_pipeline.order import Order
from data_pipeline.packer import ShardWriter
from data_pipeline.reader import SampleReader
from data_pipeline.shards import ShardSet
from data_pipeline.transforms import ImageSettings
from tools.bench_measure import in_fresh_process
from tools.digit_scenes import make_scene, scene_members

EPOCHS = 3
MOST_GROWTH = 0.02
SIDE, PICTURES = 32, 64
REAL_SHARDS, MOST_PER_SHARD = 4, 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--workers", type=int, default=8, help="processes (default %(default)s)")
    parser.add_argument(
        "--rows", type=int, default=10**8, help="samples of the data set (default %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=64, help="(default %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=600, help="of each epoch, at most (default %(default)s)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process that holds nothing else."""
    rows = in_fresh_process(
        measure, options.workers, options.rows, options.batch, options.steps, options.repeats
    )
    return {
        "title": f"memory of a loader with {options.workers} workers over {options.rows:,} rows",
        "rows": rows,
        "bars": [
            {
                "what": "growth of PSS from the first to the last epoch, %",
                "measured": 100 * growth(rows),
                "bar": 100 * MOST_GROWTH,
                "at_least": False,
            }
        ],
        "notes": [
            "PSS shares a page out among the processes that have it, so the sum is what they take; "
            "USS counts pages of one process only, and rises while forked pages are written to"
        ],
    }


def growth(rows: list[dict[str, Any]]) -> float:
    """Share by which the last epoch has more memory than the first one."""
    return rows[-1]["PSS MiB"] / rows[0]["PSS MiB"] - 1


def measure(
    workers: int, n_rows: int, batch: int, steps: int, readings: int
) -> list[dict[str, Any]]:
    """Load three epochs, or the first steps of each; a row of the table for each of them.

    Args:
        readings: memory is read after so many of the last steps of an epoch; medians count.
    """
    with tempfile.TemporaryDirectory() as folder:
        stream = _stream(Path(folder), n_rows, batch)
        per_epoch = n_rows // batch
        loaded = min(steps, per_epoch)
        loader = StepLoader(
            {"bench": stream},
            lambda step: ("bench", step // loaded * per_epoch + step % loaded),
            LoaderSettings(workers=workers),
            *(0, 1, 0, EPOCHS * loaded),
        )
        found: list[dict[str, Any]] = []
        last: list[tuple[float, float]] = []
        for window in loader:
            inside = window.step % loaded
            if inside >= loaded - readings:
                last.append(_memory())
            if inside == loaded - 1:
                pss, uss = (median(values) for values in zip(*last, strict=True))
                found.append({"epoch": len(found) + 1, "samples": loaded * batch,
                              "PSS MiB": pss, "USS MiB": uss})  # fmt: skip
                last = []
        return found


def _stream(folder: Path, n_rows: int, batch: int) -> TaskStream:
    per_shard = min(-(-n_rows // REAL_SHARDS), MOST_PER_SHARD)
    scenes = [scene_members(make_scene(i, size=SIDE)) for i in range(PICTURES)]
    samples = [{"jpg": scene["jpg"], "cls": b"%d" % (i % 10)} for i, scene in enumerate(scenes)]
    with ShardWriter(folder, "tiny", max_samples=per_shard) as writer:
        for number, members in zip(
            range(REAL_SHARDS * per_shard), itertools.cycle(samples), strict=False
        ):
            writer.write(f"{number:08d}", members)
    real = ShardSet.open(folder).shards
    shards = ShardSet(itertools.islice(itertools.cycle(real), -(-n_rows // per_shard)))
    settings = LabelDataSettings(
        shards=[str(folder)], classes=10, image=ImageSettings(size=SIDE, mode="center_crop")
    )
    return TaskStream(
        "bench", SampleReader(shards), Order.plan(len(shards), 0, batch),
        LabelFields(settings, train=True), 0, batch, batch,
    )  # fmt: skip


def _memory() -> tuple[float, float]:
    """(PSS, USS) in MiB of this process and its workers."""
    process = psutil.Process()
    found = [p.memory_full_info() for p in (process, *process.children(recursive=True))]
    return sum(info.pss for info in found) / 2**20, sum(info.uss for info in found) / 2**20
