"""Progress of a run for the person who watches: a live bar, or a line now and then."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressReport:
    """A rich progress bar on a terminal; elsewhere a plain line at most every `plain_seconds`.

    Args:
        console: where to print.
        done_steps: steps that are complete already (a resume).
        total_steps: length of the run.
        plain_seconds: pause between lines where no terminal is; the last step always prints.
    """

    def __init__(
        self, console: Console, done_steps: int, total_steps: int, plain_seconds: float
    ) -> None:
        self._console = console
        self._first = done_steps
        self._total = total_steps
        self._pause = plain_seconds
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=console,
            )
            self._task = self._bar.add_task(
                "steps", total=total_steps, completed=done_steps, status=""
            )
            self._bar.start()

    def update(self, step: int, status: str) -> None:
        """`step` steps are complete; `status` is a short text such as the loss."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
            return
        now = time.monotonic()
        if now - self._last_line < self._pause and step < self._total:
            return
        self._last_line = now
        line = f"step {step}/{self._total}"
        if step > self._first:
            seconds_per_step = (now - self._started) / (step - self._first)
            line += f", {_clock(seconds_per_step * (self._total - step))} left"
        text = f"{line}  {status}".rstrip()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
