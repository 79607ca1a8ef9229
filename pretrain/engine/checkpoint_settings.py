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
