"""Counts damaged samples, names each, and ends a run whose data is rotten.

Every fault is counted and stands in the fault file of its rank. The log names the first ones of a
minute and the number of the others: a rotten shard would otherwise write a million lines.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from data_pipeline.files import naming
from data_pipeline.loader.stream import DataError, Fault

logger = logging.getLogger("omnipretrain.data")

# A fraction of fewer samples says nothing about a data set.
LEAST_FAULTS = 50

OnBadSample = Literal["substitute", "stop"]


class FaultLimits(NamedTuple):
    """When bad samples end a run; see `LoaderSettings`."""

    max_bad_fraction: float = 0.01
    max_bad_run: int = 20
    on_bad_sample: OnBadSample = "substitute"


@dataclass
class FaultCount:
    """What one rank has met in one task since it started."""

    samples: int = 0
    """Positions loaded."""
    replaced: int = 0
    """Positions whose own sample was bad (in evaluation: left out)."""
    run: int = 0
    """Of these, how many in a row at the end."""
    last: Fault | None = None


class FaultFile:
    """All faults of one rank, a JSON object a line, as a context manager.

    {"step": 12, "task": "caption", "position": 88, "attempt": 0, "row": 17, "shard": ..., "key":
    ..., "reason": ..., "action": "replaced"}; `step` counts completed steps, as in the metrics.
    """

    def __init__(self, path: Path, may_write: Callable[[], bool] = lambda: True) -> None:
        """Append to `path`, whose folder is made if it is missing; nothing once `may_write` says
        no, which is asked at each flush."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.step = 0
        """Step that the next faults belong to."""
        self._path, self._may_write = path, may_write
        self._file = path.open("a", encoding="utf-8")
        self._lines: list[str] = []

    def write(self, fault: Fault, action: str) -> None:
        """Note a fault; `flush` brings it to the file."""
        line = {"step": self.step, **fault._asdict(), "action": action}
        self._lines.append(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Hand all lines to the operating system. OSErrors name the file."""
        lines, self._lines = self._lines, []
        if lines and self._may_write():
            with naming(self._path):
                self._file.writelines(lines)
                self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


class FaultPolicy:
    """Takes note of every batch that arrives.

    Args:
        limits: what ends the run.
        rank: of this process, for messages.
        file: where all faults are written to; None = nowhere.
    """

    def __init__(self, limits: FaultLimits, rank: int, file: FaultFile | None = None) -> None:
        self.limits, self.rank, self.file = limits, rank, file
        self.counts: dict[str, FaultCount] = {}
        self._log = _ThriftyLog()
        self._rows: dict[tuple[str, int], Fault] = {}

    def record(self, task: str, batch: dict[str, Any]) -> None:
        """Take `faults` out of `batch`; log and count them.

        Raises:
            DataError: too many samples, or too many in a row, could not be used, or one that may
                not be replaced.
        """
        faults: list[Fault] = batch.pop("faults")
        count = self.counts.setdefault(task, FaultCount())
        loaded = [position for position in batch["position"].tolist() if position >= 0]
        bad = {fault.position for fault in faults}
        left_out = bad.difference(loaded)
        for fault in faults:
            self._note(fault, "left out" if fault.position in left_out else "replaced")
            count.last = fault
        if faults and self.file is not None:
            self.file.flush()
        count.samples += len(loaded) + len(left_out)
        count.replaced += len(bad)
        if faults and self.limits.on_bad_sample == "stop":
            self._stop(task, count, "a sample (loader.on_bad_sample is stop)")
        for position in loaded:
            count.run = count.run + 1 if position in bad else 0
            self._check_run(task, count)
        count.run += len(left_out)
        self._check_run(task, count)
        self._check_fraction(task, count)

    def take_rows(self) -> list[Fault]:
        """One fault of each row that was bad since the last call, by task and row."""
        rows, self._rows = self._rows, {}
        return [rows[key] for key in sorted(rows)]

    def _note(self, fault: Fault, action: str) -> None:
        if fault.row >= 0:  # a sample of a stream has no row to be remembered by
            self._rows.setdefault((fault.task, fault.row), fault)
        if self.file is not None:
            self.file.write(fault, action)
        self._log.warning(
            "rank %d, task %s, position %d: bad sample %s (attempt %d): %s, key %r, row %d: %s",
            *(self.rank, fault.task, fault.position, action, fault.attempt),
            *(fault.shard, fault.key, fault.row, fault.reason),
        )

    def _check_run(self, task: str, count: FaultCount) -> None:
        if count.run >= self.limits.max_bad_run:
            self._stop(task, count, f"{count.run} samples in a row (loader.max_bad_run)")

    def _check_fraction(self, task: str, count: FaultCount) -> None:
        most = self.limits.max_bad_fraction
        enough = count.replaced >= LEAST_FAULTS or (count.replaced and not most)
        if enough and count.replaced > most * count.samples:
            share = count.replaced / count.samples
            self._stop(
                task,
                count,
                f"{count.replaced} of {count.samples} samples ({share:.1%}; "
                f"loader.max_bad_fraction is {most:.1%})",
            )

    def _stop(self, task: str, count: FaultCount, what: str) -> None:
        last = count.last
        raise DataError(
            f"rank {self.rank}, task {task}: {what} could not be used; last: {last.shard}, key "
            f"{last.key!r}: {last.reason}. Check the shards with `python -m tools.shards verify`"
        )


class _ThriftyLog:
    """Passes on the first messages of each minute; of the others only how many there were."""

    MESSAGES, SECONDS = 20, 60.0

    def __init__(self) -> None:
        self._since = 0.0
        self._count = self._hidden = 0

    def warning(self, text: str, *values: object) -> None:
        now = time.monotonic()
        if now - self._since >= self.SECONDS:
            if self._hidden:
                logger.warning(
                    "%d more bad samples in %.0f s that were not named here; the run's `faults/` "
                    "names all",
                    *(self._hidden, now - self._since),
                )
            self._since, self._count, self._hidden = now, 0, 0
        self._count += 1
        if self._count <= self.MESSAGES:
            logger.warning(text, *values)
            return
        if not self._hidden:
            logger.warning("many bad samples: no more are named within a minute")
        self._hidden += 1
