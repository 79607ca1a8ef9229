"""Settings of checkpoints, which need no torch."""

from __future__ import annotations

from pydantic import Field, field_validator

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
    copy_to: str | None = None
    """A URL (s3://bucket/runs/name, gs://..., file:///...) that each checkpoint is copied to in the
    background, with the same retention; of this run alone. `tools.fetch_checkpoint` brings one
    back. A copy that fails is tried again, and never fails the run."""
    copy_wait_minutes: float = Field(5.0, ge=0)
    """How long the end of a run, or a stop, waits for copies that are not there yet."""

    @field_validator("copy_to")
    @classmethod
    def _outlives_the_run(cls, url: str | None) -> str | None:
        if url is not None and "://" not in url:
            raise ValueError(f"{url!r} is no URL: of a folder, write file:///its/absolute/path")
        if url is not None and url.startswith("memory://"):
            raise ValueError(
                "memory:// is gone with the process that copies: take file:// or a store"
            )
        return url
