"""Settings of the loader, which need no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_pipeline.cache.cache import CacheSettings
from data_pipeline.loader.faults import FaultLimits, OnBadSample
from data_pipeline.settings import Settings
from data_pipeline.storage.remote import RemoteSettings


class LoaderSettings(Settings):
    """Worker processes, and when damaged data ends the run."""

    workers: int = Field(default=2, ge=0)
    """Worker processes per rank; 0 loads in the trainer's own process."""
    prefetch_batches: int = Field(default=2, ge=1)
    """Micro-batches that each worker prepares ahead."""
    start_method: Literal["fork", "forkserver", "spawn"] = "fork"
    """How workers start; choose forkserver or spawn where forking a process with threads hangs."""
    on_bad_sample: OnBadSample = "substitute"
    """What a sample that cannot be used leads to: another one in its place, or the end of the
    run."""
    max_bad_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of a task's samples on one rank that may be replaced before the run ends (judged from
    50 bad samples on; 0: none may)."""
    max_bad_run: int = Field(default=20, ge=1)
    """Bad samples in a row, in one task on one rank, that end the run."""
    quarantine: bool = True
    """Whether bad samples that were met take no part from the next epoch of their data set on."""
    stall_seconds: float = Field(default=120.0, gt=0.0)
    """Waiting longer than this for a batch logs what each worker is doing, and where."""
    remote: RemoteSettings = RemoteSettings()
    """How shards are read whose names are URLs."""
    cache: CacheSettings | None = None
    """Copies of shards on each node's own disk, fetched ahead of the run. null: none."""

    def fault_limits(self) -> FaultLimits:
        """When bad samples end the run."""
        return FaultLimits(self.max_bad_fraction, self.max_bad_run, self.on_bad_sample)
