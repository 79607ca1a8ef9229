"""Counts damaged samples, names each in the log, and ends a run whose data is rotten."""

import logging
from dataclasses import dataclass
from typing import Any

from data_pipeline.stream import DataError, Fault

logger = logging.getLogger("omnipretrain.data")

# A fraction of fewer samples says nothing about a data set.
LEAST_FAULTS = 50


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


class FaultPolicy:
    """Takes note of every batch that arrives."""

    def __init__(self, max_bad_fraction: float, max_bad_run: int, rank: int) -> None:
        self.max_bad_fraction, self.max_bad_run, self.rank = max_bad_fraction, max_bad_run, rank
        self.counts: dict[str, FaultCount] = {}

    def record(self, task: str, batch: dict[str, Any]) -> None:
        """Take `faults` out of `batch`; log and count them.

        Raises:
            DataError: too many samples, or too many in a row, could not be used.
        """
        faults: list[Fault] = batch.pop("faults")
        count = self.counts.setdefault(task, FaultCount())
        bad = {fault.position for fault in faults}
        for fault in faults:
            action = "left out" if not batch["position"].eq(fault.position).any() else "replaced"
            logger.warning(
                "rank %d, task %s, position %d: bad sample %s (attempt %d): %s, key %r, row %d: %s",
                *(self.rank, task, fault.position, action, fault.attempt),
                *(fault.shard, fault.key, fault.row, fault.reason),
            )
            count.last = fault
        loaded = [position for position in batch["position"].tolist() if position >= 0]
        left_out = bad.difference(loaded)
        count.samples += len(loaded) + len(left_out)
        count.replaced += len(bad)
        for position in loaded:
            count.run = count.run + 1 if position in bad else 0
            self._check_run(task, count)
        count.run += len(left_out)
        self._check_run(task, count)
        self._check_fraction(task, count)

    def _check_run(self, task: str, count: FaultCount) -> None:
        if count.run >= self.max_bad_run:
            self._stop(task, count, f"{count.run} samples in a row (loader.max_bad_run)")

    def _check_fraction(self, task: str, count: FaultCount) -> None:
        enough = count.replaced >= LEAST_FAULTS or (count.replaced and not self.max_bad_fraction)
        if enough and count.replaced > self.max_bad_fraction * count.samples:
            share = count.replaced / count.samples
            self._stop(
                task,
                count,
                f"{count.replaced} of {count.samples} samples ({share:.1%}; "
                f"loader.max_bad_fraction is {self.max_bad_fraction:.1%})",
            )

    def _stop(self, task: str, count: FaultCount, what: str) -> None:
        last = count.last
        raise DataError(
            f"rank {self.rank}, task {task}: {what} could not be used; last: {last.shard}, key "
            f"{last.key!r}: {last.reason}. Check the shards with `python -m tools.shards verify`"
        )
