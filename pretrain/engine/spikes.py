"""Losses that jump: told, or the end of the run, as the recipe says."""

import math
import statistics
from collections import deque
from typing import Literal

from pydantic import Field

from data_pipeline.settings import Settings


class SpikeSettings(Settings):
    """When a loss counts as a spike, and what is done about it."""

    factor: float = Field(3.0, gt=1)
    """A logged loss above so many times the median of its task's losses logged before."""
    window: int = Field(50, ge=5)
    """So many logged losses of the task make the median; before there are as many, nothing is a
    spike."""
    action: Literal["warn", "stop"] = "warn"
    """warn: a line in the log. stop: the run ends, with its last checkpoint from before."""


class SpikeWatch:
    """Compares each logged loss with those of its task before.

    Logged losses are the same on all ranks, and so is what is found.
    """

    def __init__(self, settings: SpikeSettings) -> None:
        self.settings = settings
        self._losses: dict[str, deque[float]] = {}

    def observe(self, task: str, step: int, loss: float | None) -> str | None:
        """What to say if the loss after `step` steps is a spike; None (no loss) never is one."""
        if loss is None or not math.isfinite(loss):  # the rule of skipped steps is for these
            return None
        before = self._losses.setdefault(task, deque(maxlen=self.settings.window))
        known = len(before) == before.maxlen
        median = statistics.median(before) if known else math.inf
        before.append(loss)
        if median <= 0 or loss <= self.settings.factor * median:
            return None
        return (
            f"step {step}, {task}: the loss jumped to {loss:.4g}, {loss / median:.1f} times the "
            f"median of the {self.settings.window} logged before, {median:.4g} "
            f"(failure.spike.factor={self.settings.factor:g})"
        )
