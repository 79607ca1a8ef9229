"""What a run says: numbers to `metrics.jsonl` and TensorBoard, text to log files and the console.

    <run_dir>/metrics.jsonl            one JSON object per logged step and task, in step order
    <run_dir>/tensorboard/events...    the same numbers, sample images with captions, the recipe
    <run_dir>/logs/rank_00003.log      every rank's log messages, appended over restarts; older
                                       ones in .log.1 to .log.4, 32 MiB each

Steps are counted as completed optimizer steps: the line of step 5 was written after the fifth. A
resume from step s removes the lines of later steps, so that `metrics.jsonl` is what an
uninterrupted run would have written (but for times), and tells TensorBoard to hide them too.

A metric of which a step counted nothing (no labelled image, no text) is `null`: its curve in
TensorBoard has no point there. JSON has no NaN: a value that is not finite is `null`, too, and
stands as text under `non_finite`, as in `{"step": 5, ..., "loss": null, "non_finite": {"loss":
"nan"}}`; TensorBoard gets the value itself.

TensorBoard shows groups of curves by their names, so that the group `at_a_glance` comes first: the
loss, learning rate and samples/s of training, what an evaluation names first, and the pictures. All
other curves are in `detail`.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
import yaml
from pydantic import Field
from rich.console import Console

from data_pipeline.files import naming
from data_pipeline.settings import Settings
from pretrain.engine.report.progress import ProgressReport
from pretrain.engine.report.trackers import FINISH_FAILED_S, FINISH_S, TrackerName, Trackers

METRICS_FILE = "metrics.jsonl"
_LOGGER = "omnipretrain"
_TOP, _REST = "at_a_glance", "detail"
_TOP_OF_TRAINING = ("loss", "learning_rate", "samples_per_second")
_TOP_OF_EVALUATION = 2  # so many of its first metrics
LOG_BYTES, LOG_FILES = 2**25, 4  # of a rank: a warning in each step fills no disk in three months
_PLAIN_PROGRESS_S = 15.0  # between two lines of progress where no terminal is
_RESERVED = frozenset({"step", "task", "kind", "time", "non_finite"})
log = logging.getLogger("omnipretrain.metrics")


class LoggingSettings(Settings):
    every_steps: int = Field(default=10, ge=1)
    """Write metrics after every so many steps, and after the last one."""

    tensorboard: bool = True
    """Also write TensorBoard event files, into the folder `tensorboard` of the run."""

    trackers: list[TrackerName] = Field(default_factory=list)
    """Trackers that get the numbers too, such as [wandb, mlflow]; `pip install` theirs. Rank 0
    sends; what fails there is a warning and no more. Files, all of them without a network, are in
    the folder `trackers` of the run."""

    images: int = Field(default=8, ge=0)
    """Images with captions that TensorBoard shows for each evaluation; 0 = none."""

    peak_tflops_per_device: float | None = Field(default=None, gt=0.0)
    """Dense peak TFLOP/s of one device in the precision of the run, for model FLOP utilisation;
    null = that of common GPUs by their name (the log says which), and for others FLOP/s without
    utilisation."""


class MetricsLog:
    """All output of one rank, as a context manager. Other ranks than 0 only write their log file.

    Args:
        run_dir: folder of the run; made if missing.
        rank: rank of this process.
        resume_step: completed steps of the checkpoint that the run continues from; lines of later
            steps are removed. 0 = nothing was completed: all old lines are removed.
        total_steps: length of the run.
        settings: what to write and how often.
        console: where rank 0 prints; the standard error stream if None.
        may_write: asked before every write that others read; once it says no, nothing is written
            but the rank's log file.
        recipe: of the run, as YAML for TensorBoard and trackers; none if empty.
    """

    def __init__(
        self,
        run_dir: str | Path,
        rank: int,
        resume_step: int,
        total_steps: int,
        settings: LoggingSettings,
        console: Console | None = None,
        may_write: Callable[[], bool] = lambda: True,
        recipe: str = "",
    ) -> None:
        self.run_dir = Path(run_dir)
        self._may_write = may_write
        self.settings = settings
        self._console = console or Console(file=sys.stderr)
        self._file: TextIO | None = None
        self._board: Any = None
        self._trackers: Trackers | None = None
        self._progress: ProgressReport | None = None
        self._handlers = _open_handlers(self.run_dir, rank, self._console)
        if rank != 0 or not may_write():
            return
        path = self.run_dir / METRICS_FILE
        drop_later_steps(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = resume_step + 1 if resume_step > 0 else 0
            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge_step)
            if recipe:
                text = f"```yaml\n{recipe}\n```"
                self._board.add_text("recipe", text, global_step=resume_step)
        if settings.trackers:
            self._trackers = Trackers(
                settings.trackers, self.run_dir, yaml.safe_load(recipe) if recipe else {}
            )
        self._progress = ProgressReport(self._console, resume_step, total_steps, _PLAIN_PROGRESS_S)

    def due(self, step: int, total_steps: int) -> bool:
        """True if the metrics of completed step `step` are to be logged."""
        return step % self.settings.every_steps == 0 or step == total_steps

    def log(self, step: int, task: str, values: Mapping[str, Any], kind: str = "train") -> None:
        """Write one line of metrics.

        Args:
            step: completed steps.
            task: name of the task that ran.
            values: name -> number (Python, numpy, or a tensor of one element); None where nothing
                was counted. Those of an evaluation come in the order that matters.
            kind: `train` or `evaluation`.

        Raises:
            ValueError: a name that the line itself uses (step, task, kind, time, non_finite).
        """
        if self._file is None or not self._may_write():
            return
        if clash := _RESERVED.intersection(values):
            raise ValueError(f"metric names {sorted(clash)} are taken by the line itself")
        line: dict[str, Any] = {"step": step, "task": task, "kind": kind, "time": time.time()}
        non_finite: dict[str, str] = {}
        tracked: dict[str, int | float] = {}
        top = _TOP_OF_TRAINING if kind == "train" else list(values)[:_TOP_OF_EVALUATION]
        for name, value in values.items():
            if value is None:
                line[name] = None
                continue
            number = _number(value)
            if not math.isfinite(number):
                non_finite[name] = str(float(number))
            line[name] = None if name in non_finite else number
            tracked[f"{kind}/{task}/{name}"] = number
            if self._board is not None:
                group = _TOP if name in top else _REST
                self._board.add_scalar(f"{group}/{kind}/{task}/{name}", number, global_step=step)
        if non_finite:
            line["non_finite"] = non_finite
        with naming(self.run_dir / METRICS_FILE):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if self._trackers is not None:
            self._trackers.log(tracked, step)

    def images(
        self, step: int, task: str, images: Sequence[np.ndarray], captions: Sequence[str]
    ) -> None:
        """Show the first `settings.images` images, each with its caption drawn below it.

        Args:
            step: completed steps.
            task: name of the task.
            images: uint8 arrays (H, W, 3), sizes may differ.
            captions: one text per image; may hold several lines (prediction, references).
        """
        if self._board is None or not self.settings.images or not len(images):
            return
        if not self._may_write():
            return
        from pretrain.engine.report.captioned_images import contact_strip

        shown = self.settings.images
        strip = contact_strip(list(images[:shown]), list(captions[:shown]))
        tag = f"{_TOP}/examples/{task}"
        self._board.add_image(tag, strip, global_step=step, dataformats="HWC")
        # The picture's font knows Latin letters only; the text page shows every script.
        listing = "\n\n".join(f"{i}. {text}" for i, text in enumerate(captions[:shown], start=1))
        self._board.add_text(tag, listing, global_step=step)

    def progress(self, step: int, status: str = "") -> None:
        """Move the progress bar to `step` completed steps; cheap enough for every step."""
        if self._progress is not None:
            self._progress.update(step, status)

    def close(self, failed: bool = False) -> None:
        """Flush and close everything; a second call does nothing.

        failed: the run ends with an error, and its peers wait: trackers get little time.
        """
        if self._progress is not None:
            self._progress.close()
        if self._board is not None and self._may_write():
            self._board.close()  # else what it still holds stays unwritten
            self._board = None
        if self._trackers is not None:
            self._trackers.close(FINISH_FAILED_S if failed else FINISH_S)
            self._trackers = None
        if self._file is not None:
            self._file.close()
        self._progress = self._file = None
        _close_handlers(self._handlers)
        self._handlers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failed = kind is not None and issubclass(kind, Exception)
        if failed and self._handlers and self._may_write():
            # Python prints the traceback to the console itself; the rank's file must have it too.
            record = log.makeRecord(
                log.name, logging.ERROR, __file__, 0, "the run ends here", (), (kind, error, trace)
            )
            self._handlers[0].handle(record)
        self.close(failed)


def shown(value: float | None, digits: str = ".4g") -> str:
    """A metric for people."""
    return "nothing counted" if value is None else format(value, digits)


def drop_later_steps(path: Path, resume_step: int) -> None:
    """Remove the lines of steps after `resume_step` from a JSON lines file (all for step 0).

    A last line that a crash cut short is removed too. The file is replaced in one rename, so that
    a second crash leaves either the old or the new one. A missing file is left missing.
    """
    if not path.exists():
        return
    kept: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                log.warning("%s:%d: not a line of JSON with a step, removed", path, number)
                continue
            if resume_step > 0 and step <= resume_step and line.endswith("\n"):
                kept.append(line)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with naming(path), temporary.open("w", encoding="utf-8") as out:
        out.writelines(kept)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def evaluated_tasks(path: Path, step: int) -> set[str]:
    """Tasks whose evaluation after `step` steps stands in a JSON lines file of metrics."""
    if not path.exists():
        return set()
    with path.open(encoding="utf-8") as lines:
        found = [line for line in map(json.loads, lines) if line["step"] == step]
    return {line["task"] for line in found if line["kind"] == "evaluation"}


def _number(value: Any) -> int | float:
    """A plain number; bool counts as 0 or 1."""
    if isinstance(value, int | float):
        return value + 0 if isinstance(value, bool) else value
    return value.item()


# ------------------------------------------------------------------------------------------- text


class _ConsoleHandler(logging.Handler):
    """Prints above the progress bar, in one piece, without wrapping or colouring paths."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


def _open_handlers(run_dir: Path, rank: int, console: Console) -> list[logging.Handler]:
    """Attach the rank's file (first in the list) and, on rank 0, the console."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    to_file = RotatingFileHandler(
        folder / f"rank_{rank:05d}.log", encoding="utf-8", maxBytes=LOG_BYTES, backupCount=LOG_FILES
    )
    to_file.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s")
    )
    handlers: list[logging.Handler] = [to_file]
    if rank == 0:
        to_console = _ConsoleHandler(console)
        to_console.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        handlers.append(to_console)
    logger = logging.getLogger(_LOGGER)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library that configures the root logger must not double our lines
    for handler in handlers:
        logger.addHandler(handler)
    return handlers


def _close_handlers(handlers: list[logging.Handler]) -> None:
    logger = logging.getLogger(_LOGGER)
    for handler in handlers:
        logger.removeHandler(handler)
        handler.close()
    if handlers:
        logger.propagate = True
