"""What a run says: numbers to `metrics.jsonl` and TensorBoard, text to log files and the console.

    <run_dir>/metrics.jsonl            one JSON object per logged step, in step order
    <run_dir>/tensorboard/events...    the same numbers, and sample images with captions
    <run_dir>/logs/rank_00003.log      every rank's log messages, appended over restarts

A resume from step s removes the lines of later steps, so that `metrics.jsonl` is what an
uninterrupted run would have written (but for times), and tells TensorBoard to do the same.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.settings import Settings

METRICS_FILE = "metrics.jsonl"
_LOGGER = "omnipretrain"


class LoggingSettings(Settings):
    every_steps: int = Field(default=10, ge=1)
    """Write metrics every so many steps, averaged over nothing: they are those of that step."""

    tensorboard: bool = True
    """Also write TensorBoard event files (rank 0, folder `tensorboard` of the run)."""

    images: int = Field(default=8, ge=0)
    """Images with captions shown in TensorBoard at each evaluation; 0 = none."""

    peak_tflops_per_device: float | None = Field(default=None, gt=0.0)
    """Peak TFLOP/s of one device in the run's precision, for model FLOP utilisation (A100 bf16:
    312, H100 SXM bf16: 989); null = FLOP/s are logged without MFU."""

    plain_seconds: float = Field(default=15.0, gt=0.0)
    """Without a terminal, print a line of progress at most every so many seconds."""


class MetricsLog:
    """All output of one rank; a context manager. Ranks other than 0 write their log file only.

    Args:
        run_dir: the run's folder; created if missing.
        rank: this process.
        resume_step: number of completed steps; metrics of steps >= resume_step are dropped,
            since the run will write them again. 0 starts `metrics.jsonl` afresh.
        total_steps: length of the run, for the progress bar.
        settings: LoggingSettings.
        console: where rank 0 prints; by default the standard error stream.
    """

    def __init__(
        self,
        run_dir: str | Path,
        rank: int,
        resume_step: int,
        total_steps: int,
        settings: LoggingSettings,
        console: Console | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self._settings = settings
        self._leads = rank == 0
        self._console = console or Console(file=sys.stderr)
        self._handlers = _attach_handlers(self.run_dir, rank, self._console)
        self._progress: _Progress | None = None
        self._file = None
        self._board = None
        if not self._leads:
            return
        path = self.run_dir / METRICS_FILE
        drop_later_steps(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(self.run_dir / "tensorboard"), purge_step=resume_step, flush_secs=30
            )
        self._progress = _Progress(
            self._console, resume_step, total_steps, settings.plain_seconds
        )
