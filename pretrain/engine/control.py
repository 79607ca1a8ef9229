"""What the outside tells a run and what the run tells the outside, through files and signals.

    <run>/control/
        stop, stop.auto    asked: save, then stop (a person; a job script that will requeue)
        save               asked: save and go on; deleted when done
        heartbeat          its time of change says when rank 0 last finished a step
        status.json        state (running, stopped, finished, failed), step, reason
        owner.json         which job may commit checkpoints: the last one that started

A signal only sets a flag. Nothing here acts by itself: rank 0 reads the requests, the loop makes
all ranks agree on them at a step boundary.
"""

import json
import os
import secrets
import signal
import socket
import time
from pathlib import Path

from pretrain.engine.checkpoint_files import write_durable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class OwnershipLost(RuntimeError):
    """Another job has started on the same run directory; this one must not commit anything."""


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
    """The control files of a run directory, as rank 0 handles them."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "control"
        self._token = secrets.token_hex(16)
        self._last_beat = 0.0

    def take_ownership(self) -> None:
        """Claim the run directory for this job; requests left by an earlier one are dropped."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("stop", "stop.auto", "save"):
            (self.path / name).unlink(missing_ok=True)
        owner = {"token": self._token, "host": socket.gethostname(), "pid": os.getpid(),
                 "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_durable(self.path / "owner.json", json.dumps(owner).encode())

    def check_ownership(self) -> None:
        """Raise OwnershipLost if another job has claimed the run directory since."""
        try:
            owner = json.loads((self.path / "owner.json").read_bytes())
        except (OSError, ValueError) as error:
            raise OwnershipLost(f"cannot read {self.path / 'owner.json'}: {error}") from None
        if owner.get("token") != self._token:
            raise OwnershipLost(
                f"process {owner.get('pid')} on {owner.get('host')} has taken over this run since "
                f"{owner.get('since')}; this process stops without writing"
            )

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
        (self.path / "save").unlink(missing_ok=True)

    def beat(self) -> None:
        """Show that the run is alive; at most one file operation a second."""
        now = time.monotonic()
        if now - self._last_beat >= 1.0:
            (self.path / "heartbeat").touch()
            self._last_beat = now

    def status(self, state: str, step: int, reason: str = "") -> None:
        """Say how the run stands; written after what it speaks of is on disk."""
        status = {"state": state, "step": step, "reason": reason,
                  "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_durable(self.path / "status.json", json.dumps(status).encode())

    def failed(self, reason: str) -> None:
        """Say that the run failed, from any rank; the first one to say so names the cause.

        Ranks that fail later do so mostly because the first one left them alone.
        """
        try:
            status = json.loads((self.path / "status.json").read_bytes())
        except (OSError, ValueError):
            status = {"state": "starting", "step": 0}
        if status["state"] != "failed":
            self.status("failed", status["step"], reason)
