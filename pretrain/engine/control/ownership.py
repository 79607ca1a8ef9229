"""Who may write into a run directory: the job that took it last, and nobody else.

    <run>/control/owner.json    token, host, pid, job, ...; `left` once the owner has ended

Rank 0 claims the directory before the process group starts. A second start is refused while the
owner gives signs of life. One that is let through all the same (the owner was silent, or somebody
insists) has a new token, and whoever held the old one finds out at its next heartbeat: every rank
asks before it writes anything that others read, so that a job which slept through all this cannot
mark the new owner's run as failed, or cut its metrics.

Nothing here needs torch: it is asked in the first moment of a start.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from data_pipeline.files import exclusive, write_atomically
from pretrain.engine.launch.processes import start_ticks, this_machine

OWNER_FILE = "owner.json"
HEARTBEAT_FILE = "heartbeat"
SILENT_S = 60.0
"""An owner that has given no sign of life for so long may be succeeded."""
RANK_0_CLAIMS_S = 10.0
"""Rank 0 has claimed the run so long after another rank has looked, if it is let in."""
_READ_ATTEMPTS, _READ_PAUSE_S = 5, 0.2
_RUN_ID = "TORCHELASTIC_RUN_ID"
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID")


class OwnershipLost(RuntimeError):
    """Another job has taken the run directory; this one may not write there any more."""


class OccupiedError(RuntimeError):
    """Another job is at work in the run directory; the message names it and what to do."""


class Ownership:
    """What a rank knows of its job's claim on a run directory; equal on all ranks of the job."""

    def __init__(self, run_dir: Path, token: str) -> None:
        self.path = Path(run_dir) / "control" / OWNER_FILE
        self.token = token
        self.claimed_at = 0.0
        """When rank 0 claimed it, by the file server's clock; known there alone."""
        self._lost: str | None = None

    @property
    def lost(self) -> bool:
        """Whether this process has noticed that the directory is another job's; looks nowhere."""
        return self._lost is not None

    def holds(self) -> bool:
        """Whether this job still owns the directory; once it does not, never again."""
        if self._lost is None:
            self._lost = self._look()
        return self._lost is None

    def require(self) -> None:
        """Raise OwnershipLost if this job does not own the directory any more."""
        if not self.holds():
            raise OwnershipLost(self._lost)

    def leave(self) -> None:
        """Say that this job is done, so that the next start need not wait for its silence."""
        if self.holds():
            owner = _read(self.path) | {"left": _now()}
            write_atomically(self.path, [json.dumps(owner).encode()])

    def _look(self) -> str | None:
        """Why this job is no longer the owner, or None. A file server may fail for a moment."""
        for attempt in range(_READ_ATTEMPTS):
            try:
                owner = _read(self.path)
            except (OSError, ValueError) as error:
                if attempt + 1 == _READ_ATTEMPTS:
                    return f"cannot read {self.path}: {error}; this process stops without writing"
                time.sleep(_READ_PAUSE_S)
            else:
                break
        if owner.get("token") == self.token:
            return None
        return (
            f"process {owner.get('pid')} on {owner.get('host')} has taken over this run since "
            f"{owner.get('since')}; this process stops without writing"
        )


def claim(run_dir: Path, environment: Mapping[str, str], take_over: bool = False) -> Ownership:
    """Take the run directory for this job; for rank 0.

    Args:
        run_dir: made if missing.
        environment: of the process, in which schedulers and launchers name themselves.
        take_over: take it whoever has it.

    Raises:
        OccupiedError: somebody else is at work there.
        OSError: the directory cannot be written.
    """
    folder = Path(run_dir) / "control"
    folder.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(16)
    owner = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": job_of(environment),
        "launch": launch_of(environment),
        "machine": this_machine(),
        "started": start_ticks(os.getpid()),
        "since": _now(),
    }
    with exclusive(folder / OWNER_FILE):  # of two starts at the same moment one is refused
        if not take_over:
            _refuse_if_occupied(folder, environment)
        write_atomically(folder / OWNER_FILE, [json.dumps(owner).encode()])
    ownership = Ownership(run_dir, token)
    ownership.claimed_at = ownership.path.stat().st_mtime
    return ownership


def refuse_if_occupied(
    run_dir: Path, environment: Mapping[str, str], patience_s: float = RANK_0_CLAIMS_S
) -> None:
    """For ranks that do not claim: end as rank 0 does, instead of waiting for it.

    It is rank 0 that decides, and it may know more: whether a process of its own node is dead.

    Args:
        patience_s: for its claim.

    Raises:
        OccupiedError: somebody else is at work in the run directory.
    """
    until = time.monotonic() + patience_s
    while owned_by_launch(run_dir, environment) is None:  # else rank 0 was let in
        try:
            return _refuse_if_occupied(Path(run_dir) / "control", environment)
        except OccupiedError:
            if time.monotonic() >= until:
                raise
        time.sleep(_READ_PAUSE_S)


def _refuse_if_occupied(folder: Path, environment: Mapping[str, str]) -> None:
    try:
        owner = _read(folder / OWNER_FILE)
    except (OSError, ValueError):
        return
    if "left" in owner or _same_job(owner, environment) or _is_dead(owner):
        return
    silent_s = _silence(folder)
    if silent_s < SILENT_S:
        raise OccupiedError(
            f"{folder.parent} is in use: process {owner.get('pid')} on {owner.get('host')}"
            f" (job {owner.get('job') or 'none'}, since {owner.get('since')}) gave its last sign of"
            f" life {max(0.0, silent_s):.0f} s ago. Stop it (touch {folder / 'stop'}), or wait "
            f"until it has been silent for {SILENT_S:.0f} s, or take the run from it with "
            "--take-over, after which it may write no more"
        )


def owned_by_launch(run_dir: Path, environment: Mapping[str, str]) -> Ownership | None:
    """The claim of rank 0 of this very launch, for a rank that was not told of it yet."""
    with contextlib.suppress(OSError, ValueError):
        owner = _read(Path(run_dir) / "control" / OWNER_FILE)
        if owner.get("launch") == launch_of(environment):
            return Ownership(run_dir, owner["token"])
    return None


def claimed_by_this_launch(run_dir: Path, environment: Mapping[str, str], age_s: float) -> bool:
    """Whether a launcher or scheduler has started this process anew after a start of the same
    command that the run directory was given to. So it is that run, and no other, which goes on.

    Args:
        age_s: seconds since the launcher began; names of torchrun runs are used again.
    """
    try:
        owner = _read(Path(run_dir) / "control" / OWNER_FILE)
        since = datetime.fromisoformat(owner["since"]).timestamp()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    job = job_of(environment)
    if owner.get("job") != job:
        return False
    if job is not None and int(environment.get("SLURM_RESTART_COUNT") or 0) > 0:
        return True
    restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0)
    if restarts == 0 or since + 1 < time.time() - age_s:
        return False
    mine, theirs = (
        text.rpartition(" ")[0] for text in (launch_of(environment), str(owner.get("launch")))
    )
    return job is not None or mine == theirs  # but for the number of restarts


def job_of(environment: Mapping[str, str]) -> str | None:
    """What the scheduler, or else torchrun, calls this job."""
    for name in (*_JOB_VARIABLES, _RUN_ID):
        if environment.get(name, "none") != "none":  # which torchrun calls a run without a name
            return f"{name}={environment[name]}"
    return None


def launch_of(environment: Mapping[str, str]) -> str:
    """The same on all ranks of one start, and for another start another one."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    if "MASTER_PORT" in environment:
        return " ".join([job_of(environment) or "", *(environment.get(n, "") for n in names)])
    return f"{this_machine()} {os.getpid()} {start_ticks(os.getpid())}"


def _same_job(owner: Mapping[str, object], environment: Mapping[str, str]) -> bool:
    """True if the scheduler, or torchrun's agents, have ended the owner to start this process."""
    job = job_of(environment)
    if job is None or owner.get("job") != job:
        return False
    # People use the name of a torchrun run again; a restart by its agents is told by the count.
    by_agents = job.startswith(_RUN_ID)
    return not by_agents or int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


# ---- processes and clocks ----------------------------------------------------------------------


def _is_dead(owner: Mapping[str, object]) -> bool:
    """True if the owner ran on this machine, and runs no more."""
    if owner.get("machine") is None or owner["machine"] != this_machine():
        return False
    return start_ticks(int(owner["pid"])) != owner["started"]


def _silence(folder: Path) -> float:
    """Seconds since the owner's last sign of life, by the clock of the file system."""
    seen = []
    for name in (OWNER_FILE, HEARTBEAT_FILE):
        with contextlib.suppress(OSError):
            seen.append((folder / name).stat().st_mtime)
    probe = folder / f".clock-{secrets.token_hex(4)}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
    except OSError:
        now = time.time()
    finally:
        probe.unlink(missing_ok=True)
    return now - max(seen, default=0.0)


def _read(path: Path) -> dict:
    owner = json.loads(path.read_bytes())
    if not isinstance(owner, dict):
        raise ValueError("it holds no JSON object")
    return owner


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
