"""Memory of a loader over three epochs: all its processes together, also over 10**8 rows.

So many rows are simulated: the data set is a list of shards in which a few real ones stand again
and again. Of epochs longer than `--steps` only the first steps are loaded; what the order, the
shard list and the indices cost is that of the whole data set.

A process keeps the indices of up to 4,096 shards open. Before the first epoch that counts, the
beginnings of so many earlier ones are loaded that it has them all.

What counts is anonymous and shared memory. Pages of files (program code, mapped indices) are not:
the system takes them back when it needs them, and programs that come and go share them, so that
their number says nothing about a leak.
"""

import argparse
import itertools
import math
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.loader import LoaderSettings, StepLoader, TaskStream
from data_pipeline.order.order import Order
from data_pipeline.reading.reader import SampleReader
from data_pipeline.samples.labels import LabelDataSettings, LabelProcessor
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet
from tools.make_shards.scenes import make_scene, scene_members
from tools.support.measure import in_fresh_process, say, seconds_left, shorten
from tools.support.process_memory import proportional

EPOCHS, WARM_UPS = 3, 8
MOST_GROWTH = 0.02
SIDE, PICTURES = 32, 64
_TRIED = 60
REAL_SHARDS, MOST_PER_SHARD = 4, 1000


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process that holds nothing else."""
    rows = in_fresh_process(
        measure,
        options.workers,
        options.rows,
        options.batch,
        options.steps,
        options.repeats,
        seconds_left(),
    )
    taken = rows[0]["samples"] // options.batch
    if taken < min(options.steps, options.rows // options.batch):
        shorten(f"{taken} of {options.steps} steps of each epoch")
    return {
        "title": f"memory of a loader with {options.workers} workers over {options.rows:,} rows",
        "rows": rows,
        "bars": [
            {
                "what": "growth of memory from the first to the last epoch, %",
                "measured": 100 * growth(rows),
                "bar": 100 * MOST_GROWTH,
                "at_least": False,
            }
        ],
        "notes": ["a page that processes share is counted once in the sum over all of them"],
    }


def growth(rows: list[dict[str, Any]]) -> float:
    """Share by which the last epoch has more memory than the first one."""
    return rows[-1]["MiB"] / rows[0]["MiB"] - 1


def measure(
    workers: int, n_rows: int, batch: int, steps: int, readings: int, seconds: float = math.inf
) -> list[dict[str, Any]]:
    """Load three epochs, or the first steps of each; a row of the table for each of them.

    Args:
        readings: memory is read after so many of the last steps of an epoch; medians count.
        seconds: that it may take; fewer steps of each epoch are loaded where these take longer.
    """
    begin = time.perf_counter()
    say(f"writing the shards of {n_rows:,} rows")
    with tempfile.TemporaryDirectory() as folder:
        stream = _stream(Path(folder), n_rows, batch)
        per_epoch = n_rows // batch
        loaded = min(steps, per_epoch)
        if loaded < per_epoch and seconds < math.inf:
            rate = _steps_a_second(stream, workers)
            left = seconds - (time.perf_counter() - begin)
            # The epochs, and the beginnings of those before them.
            in_time = int(rate * left / (EPOCHS + WARM_UPS / 4))
            loaded = max(min(loaded, in_time), readings)
        warm = 0 if loaded == per_epoch else max(loaded // 4, 1)
        first = WARM_UPS * warm  # step

        def visit(step: int) -> int:
            if step < first:
                return step // warm * per_epoch + step % warm
            return (WARM_UPS + (step - first) // loaded) * per_epoch + (step - first) % loaded

        loader = StepLoader(
            {"bench": stream},
            lambda step: ("bench", visit(step)),
            LoaderSettings(workers=workers),
            rank=0,
            world=1,
            start_step=0,
            stop_step=first + EPOCHS * loaded,
        )
        say(f"{WARM_UPS} beginnings of {warm} steps, then {EPOCHS} epochs of {loaded}")
        found: list[dict[str, Any]] = []
        last: list[float] = []
        for window in loader:
            epoch, inside = divmod(window.step - first, loaded)
            if epoch >= 0 and inside >= loaded - readings:
                last.append(_memory_mib())
            if epoch >= 0 and inside == loaded - 1:
                found.append({"epoch": epoch + 1, "samples": loaded * batch, "MiB": median(last)})
                say(f"epoch {epoch + 1}: {median(last):,.1f} MiB")
                last = []
        return found


def _steps_a_second(stream: TaskStream, workers: int) -> float:
    """Of a loader that has started; `stream` can be loaded from its begin afterwards."""
    loader = StepLoader(
        {"bench": stream},
        lambda step: ("bench", step),
        LoaderSettings(workers=workers),
        rank=0,
        world=1,
        start_step=0,
        stop_step=_TRIED,
    )
    times = [time.perf_counter() for _ in loader]
    rate = (len(times) - 1) / (times[-1] - times[0])
    say(f"{rate:.1f} steps a second")
    return rate


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
        "bench",
        SampleReader(shards),
        Order.plan(len(shards), 0, batch),
        LabelProcessor(settings, train=True),
        0,
        batch,
        batch,
    )


def _memory_mib() -> float:
    """Anonymous and shared memory of this process and its workers, each page once."""
    process = psutil.Process()
    size = 0
    for one in (process, *process.children(recursive=True)):
        found = proportional(one.pid)  # nothing of a worker that has just ended
        size += found.get("Pss_Anon", 0) + found.get("Pss_Shmem", 0)
    return size / 2**20
