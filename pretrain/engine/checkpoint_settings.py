"""Settings of checkpoints, which need no torch."""

from __future__ import annotations

from pydantic import Field

from data_pipeline.settings import Settings


class CheckpointSettings(Settings):
    """When checkpoints are written and which are kept."""

    every_steps: int = Field(1000, ge=1)
    """Write a checkpoint after every so many steps; the last step always writes one."""
    keep_last: int = Field(3, ge=1)
    """Keep this many of the newest checkpoints; and while steps are skipped (their gradients are
    not finite), the last one before that, and the last one from which a step could be taken."""
    keep_every_steps: int | None = Field(None, ge=1)
    """Besides, keep for good each checkpoint whose step is a multiple of this."""
    asynchronous: bool = False
    """Copy each checkpoint to the host's memory between two steps, and write it from there while
    training goes on: one process a rank, one checkpoint at a time (a second one waits). Takes as
    much memory of the host as the checkpoint has bytes, divided among the ranks."""
