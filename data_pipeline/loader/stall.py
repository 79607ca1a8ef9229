"""Says what the trainer waits for, when it waits too long."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from data_pipeline.activity import Activity
from data_pipeline.loader.stream import TaskStream
from data_pipeline.order.step_sampler import MicroBatch

logger = logging.getLogger("omnipretrain.data")

_POSITIONS_SHOWN = 16


class StallWatch:
    """A thread that logs `describe()` once per wait longer than `seconds`.

    with StallWatch(120, describe) as watch:
        with watch.waiting():
            batch = next(batches)
    """

    def __init__(self, seconds: float, describe: Callable[[], str]) -> None:
        self.seconds, self.describe = seconds, describe
        self._since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)

    def __enter__(self) -> "StallWatch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._thread.join()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark a wait."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _watch(self) -> None:
        reported: float | None = None
        while not self._closed.wait(min(self.seconds / 4, 5.0)):
            since = self._since
            if since is None or since == reported or time.monotonic() - since < self.seconds:
                continue
            reported = since
            waited = time.monotonic() - since
            logger.warning("no batch for %.0f s\n%s", waited, self._text())

    def _text(self) -> str:
        try:
            return self.describe()
        except Exception as error:  # the watch must not die of the trouble it reports
            return f"(what is being processed cannot be told: {error})"


def describe_stall(
    streams: Mapping[str, TaskStream],
    waiting: Iterable[MicroBatch],
    activities: Iterable[Activity],
) -> str:
    """What every process does, and all requests that wait for an answer; a line each.

    Args:
        streams: task -> stream.
        waiting: requests without an answer, oldest first: the trainer waits for the first one.
        activities: of the processes, in their order.
    """
    requests = list(waiting)
    tasks = {(request.step, request.micro): request.task for request in requests}
    lines = [
        f"  worker {number} {_doing(activity, streams, tasks)}"
        for number, activity in enumerate(activities)
    ]
    return "\n".join([*lines, *(f"  waiting: {_request(r, streams[r.task])}" for r in requests)])


def _doing(
    activity: Activity, streams: Mapping[str, TaskStream], tasks: Mapping[tuple[int, int], str]
) -> str:
    if not activity.process:
        return "has not begun"
    task = tasks.get((activity.step, activity.micro))
    seconds = time.monotonic() - activity.since
    text = f"(process {activity.process}): {activity.stage} for {seconds:.1f} s"
    if activity.stage == "idle" or task is None:
        return text  # between two requests
    text += f", step {activity.step} micro {activity.micro} task {task}"
    if activity.position >= 0:
        text += f", position {activity.position} row {activity.row}"
        text += f" (substitute {activity.substitute})" if activity.substitute else ""
    if activity.shard >= 0:
        shard = streams[task].reader.shards.shards[activity.shard].label
        text += f", bytes {activity.begin} to {activity.end} of {shard}"
    if activity.failures:
        text += f", {activity.failures} attempts failed, the last: {activity.reason}"
    return text


def _request(request: MicroBatch, stream: TaskStream) -> str:
    positions = [p for p, valid in zip(request.positions, request.valid, strict=True) if valid]
    shown = positions[:_POSITIONS_SHOWN]
    more = f" and {len(positions) - len(shown)} more" if len(positions) > len(shown) else ""
    shards = sorted(set(stream.locate(np.array(shown, dtype=np.int64))))
    return (
        f"step {request.step} micro {request.micro} task {request.task} positions {shown}{more} "
        f"in {', '.join(shards)}"
    )
