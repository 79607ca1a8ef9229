"""One loader for all tasks of a run: a DataLoader whose sampler knows the schedule."""

from typing import Literal

from pydantic import Field

from data_pipeline.settings import Settings


class LoaderSettings(Settings):
    """Worker processes, and when damaged data ends the run."""

    workers: int = Field(default=2, ge=0)
    """Worker processes per rank; 0 loads in the trainer's own process."""
    prefetch_batches: int = Field(default=2, ge=1)
    """Micro-batches that each worker prepares ahead."""
    start_method: Literal["fork", "forkserver", "spawn"] = "fork"
    """How workers start; choose forkserver or spawn where forking a process with threads hangs."""
    max_bad_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of a task's samples that may be replaced before the run ends (from 100 faults on)."""
    max_bad_run: int = Field(default=20, ge=1)
    """Bad samples in a row, in one task on one rank, that end the run."""
    stall_seconds: float = Field(default=120.0, gt=0.0)
    """Waiting longer than this for a batch logs which positions are being processed."""
