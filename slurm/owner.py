"""Whether a run directory is free for this job, and what is done about an owner that is dead."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from slurm import cluster
from slurm.run_files import age, control, read_json, write_json

SILENT_S = 62.0
"""After so long the trainer takes a run directory over from a silent owner."""
_ASK_S, _GRACE_S = 5.0, 15.0


def wait(run: Path, job: str | None, leaving: Callable[[], str], say: Callable[[str], None]) -> str:
    """Why not to start, since another job is at work in the run directory; "" if none is.

    A job that was killed without a word has not left. Where SLURM says that it is over, it is
    succeeded at once; else, as the trainer does, when it has been silent for a minute.

    job: this one, see `other`. leaving: why it has to end itself, for which it stops waiting.
    """
    if (process := supervisor_here(run)) not in (0, os.getpid()):
        return f"process {process} supervises it: `python -m slurm stop {run}` ends that"
    until, asked = time.monotonic() + SILENT_S + _GRACE_S, -_ASK_S
    while (owner := other(run, job)) and not leaving():
        name, _, number = str(owner.get("job")).partition("=")
        if time.monotonic() - asked > _ASK_S and name == "SLURM_JOB_ID":
            asked = time.monotonic()
            if cluster.is_over(number):
                say(f"job {number}, which had the run, is over: it is taken over")
                sign_off(run, owner)
                return ""
        silent = silence(run)
        if silent is None or silent > SILENT_S:
            return ""
        if time.monotonic() > until:
            return f"the run is at work in {owner.get('job') or 'a job'} on {owner.get('host')}"
        time.sleep(1)
    return ""


def other(run: Path, job: str | None) -> dict:
    """Who is at work in the run directory, if that is not this job; empty if nobody is.

    job: as the trainer notes it ("SLURM_JOB_ID=123"); None outside a scheduler, where the trainer
    itself tells processes of this machine apart.
    """
    owner = read_json(control(run, "owner.json"))
    if not owner or "left" in owner or job is None or owner.get("job") == job:
        return {}
    return owner


def supervisor_here(run: Path) -> int:
    """Process number of the run's supervisor, if it lives on this machine; else 0."""
    said = read_json(control(run, "supervisor.json"))
    if said.get("host") != os.uname().nodename:
        return 0
    try:  # the number may be another process's by now
        command = Path(f"/proc/{said['pid']}/cmdline").read_bytes()
    except (OSError, KeyError):
        return 0
    return said["pid"] if b"supervise" in command else 0


def sign_off(run: Path, owner: dict) -> None:
    """Say for an owner that is dead that it has left, so that nobody waits for its silence."""
    path = control(run, "owner.json")
    if read_json(path) == owner:  # whoever has claimed the run meanwhile keeps it
        with contextlib.suppress(OSError):  # then its silence has to be waited for
            write_json(path, owner | {"left": time.strftime("%Y-%m-%dT%H:%M:%S%z")})


def silence(run: Path) -> float | None:
    """Seconds since the last heartbeat, by the clock of the file system; None: there was none."""
    probe = control(run, f".clock-{os.uname().nodename}-{os.getpid()}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        now = time.time()
    return age(control(run, "heartbeat"), now)
