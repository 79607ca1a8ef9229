"""What the outside tells a run and what the run tells the outside, through files and signals.

    <run>/control/
        stop, stop.auto    asked: save, then stop (a person; a job script that will requeue)
        save               asked: save and go on; deleted when done
        profile            asked: trace the next steps (`profiler`); deleted when done
        heartbeat          its time of change says when rank 0 was last at work: each step, each
                           batch of an evaluation, and within start-up and saves
        status.json        state (starting, running, stopped, finished, failed), phase (start,
                           restore, step, evaluate, save), step of the last checkpoint, reason;
                           slow_rank, if the others wait for one
        owner.json         which job may write: the last one that started (`ownership`)

A signal only sets a flag. Nothing here acts by itself: rank 0 reads the requests, the loop makes
all ranks agree on them at a step boundary, the evaluation between its batches.
"""

import contextlib
import json
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.files import write_atomically
from pretrain.engine.control.ownership import HEARTBEAT_FILE, OWNER_FILE, Ownership
from pretrain.engine.launch.launchers import age_of_start
from pretrain.engine.report.slow_rank import SlowRank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PROFILE_FILE = "profile"
REQUESTS = ("stop", "stop.auto", "save", PROFILE_FILE)
STATUS_FILE = "status.json"
log = logging.getLogger("omnipretrain.control")


class StopSignals:
    """Turns SIGTERM, SIGUSR1 and SIGINT into a flag; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


class ControlFolder:
    """The control files of a run directory, as rank 0 handles them.

    Nothing is written once `ownership` is lost.
    """

    def __init__(self, run_dir: Path, ownership: Ownership) -> None:
        self.path = Path(run_dir) / "control"
        self.ownership = ownership
        self.phase = "start"
        self.slow_rank: dict | None = None
        self._last_beat = 0.0

    def begin(self) -> None:
        """Say that a start, which has just claimed the run, has begun; drop requests from before.

        The step stays: it is that of the last checkpoint, whatever becomes of this start.
        """
        claimed = (self.path / OWNER_FILE).stat().st_mtime  # just now, by the file system's clock
        since = claimed - age_of_start()
        for name in REQUESTS:
            with contextlib.suppress(OSError):
                if (self.path / name).stat().st_mtime < since:
                    (self.path / name).unlink()
        self.status("starting", read_status(self.path.parent).get("step", 0))

    def stop_requested(self) -> str | None:
        """The stop file that is there, if any."""
        for name in ("stop", "stop.auto"):
            if (self.path / name).exists():
                return f"control/{name}"
        return None

    def save_requested(self) -> bool:
        """True if somebody asks for a checkpoint now."""
        return (self.path / "save").exists()

    def save_done(self) -> None:
        """Answer a request to save by deleting it."""
        if self.ownership.holds():
            (self.path / "save").unlink(missing_ok=True)

    def profile_requested(self) -> bool:
        """True if somebody asks for a trace of the next steps."""
        return (self.path / PROFILE_FILE).exists()

    def profile_done(self) -> None:
        """Answer a request to profile by deleting it."""
        if self.ownership.holds():
            (self.path / PROFILE_FILE).unlink(missing_ok=True)

    def beat(self) -> None:
        """Show that the run is alive, if it is still this job's; at most once a second."""
        now = time.monotonic()
        if now - self._last_beat >= 1.0:
            if self.ownership.holds():
                (self.path / HEARTBEAT_FILE).touch()
            self._last_beat = now

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Within, the status names this phase; behind it, the one before."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def name_slow(self, found: SlowRank | None) -> None:
        """Say which rank the others wait for, if that is another one than before."""
        before = self.slow_rank and self.slow_rank["rank"]
        self.slow_rank = None if found is None else found._asdict()
        if before != (found and found.rank):
            log.warning("%s", found or f"rank {before} is not slower than the others any more")
            self.enter(self.phase)

    def enter(self, phase: str) -> None:
        """Say in which phase the run is now."""
        self.phase = phase
        said = {"state": "starting", "step": 0, "reason": ""} | read_status(self.path.parent)
        self.status(said["state"], said["step"], said["reason"])

    def status(self, state: str, step: int, reason: str = "") -> None:
        """Say how the run stands; written after what it speaks of is on disk."""
        if not self.ownership.holds():
            return
        status = {
            "state": state,
            "phase": self.phase,
            "step": step,
            "reason": reason,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        if self.slow_rank is not None:
            status["slow_rank"] = self.slow_rank
        write_atomically(self.path / STATUS_FILE, [json.dumps(status).encode()])

    def failed(self, reason: str) -> None:
        """Say that the run failed, from any rank; the first one to say so names the cause.

        Ranks that fail later do so mostly because the first one left them alone.
        """
        status = {"state": "starting", "phase": "start", "step": 0} | read_status(self.path.parent)
        if status["state"] != "failed":
            self.phase, self.slow_rank = status["phase"], status.get("slow_rank")
            self.status("failed", status["step"], reason)


def read_status(run_dir: Path) -> dict:
    """What `control/status.json` says; empty if it is not there or cannot be read."""
    try:
        status = json.loads((Path(run_dir) / "control" / STATUS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}
