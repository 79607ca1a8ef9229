"""What is asked of SLURM's commands, in one place; without SLURM each answer is empty."""

import getpass
import re
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path

from slurm.run_files import read_json

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD")


class SlurmError(RuntimeError):
    """SLURM refused something; the message is its own."""


def available() -> bool:
    """Whether this machine has SLURM's commands."""
    return shutil.which("sbatch") is not None


def ask(*command: str, check: bool = False) -> str:
    """Standard output of a command, "" where it fails or does not exist.

    Raises:
        SlurmError: with `check`, what the command said when it failed.
    """
    if shutil.which(command[0]) is None:
        if check:
            raise SlurmError(f"there is no {command[0]} here: is this a login node of the cluster?")
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and check:
        raise SlurmError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip() if done.returncode == 0 else ""


def version() -> str:
    """`slurm 22.05.8`."""
    return ask("sinfo", "--version")


def job_name(run: Path) -> str:
    """The same for all jobs of a run directory, and for no other's."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "-", run.name)
    return f"pretrain-{readable}-{zlib.crc32(str(run).encode()):08x}"


def jobs_of(run: Path) -> list[dict[str, str]]:
    """Jobs of a run that are not over: job, state, reason, nodes, left (time).

    A run of a sweep is an element of the sweep's array; RUN/submit/job.json says which.
    """
    said = read_json(run / "submit" / "job.json")
    keys = ("job", "state", "reason", "nodes", "left")
    text = ask("squeue", "--noheader", "--array", f"--user={getpass.getuser()}",
               f"--name={said.get('name', job_name(run))}", "--format=%i|%T|%r|%N|%L")
    jobs = [dict(zip(keys, line.split("|"), strict=False)) for line in text.splitlines() if line]
    element = said.get("element")
    return [job for job in jobs if element is None or job["job"].endswith(f"_{element}")]


def preemption_warning() -> str:
    """What the cluster lacks for a preempted run to save first; "" if nothing."""
    config = ask("scontrol", "show", "config")
    mode = re.search(r"^PreemptMode\s*= (.*)$", config, re.MULTILINE)
    if not mode or mode[1].startswith("OFF") or "preempt_send_user_signal" in config:
        return ""
    return ("this cluster preempts jobs, and SlurmctldParameters lacks preempt_send_user_signal: a "
            "preempted run has only KillWait and GraceTime for its save; save often")


def longest_time(partition: str | None) -> str | None:
    """The partition's longest job, as --time takes it; None if it has no limit or is unknown."""
    listed = ask("sinfo", "--noheader", "--format=%P|%l",
                 *([f"--partition={partition}"] if partition else []))
    for line in listed.splitlines():
        name, _, limit = line.partition("|")
        if partition or name.endswith("*"):
            return None if limit == "infinite" else limit
    return None


def test_only(script: str) -> str:
    """What `sbatch --test-only` answers: when and where the job would start.

    Raises:
        SlurmError: the job is refused.
    """
    done = subprocess.run(["sbatch", "--test-only", script], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise SlurmError(f"sbatch refuses the job: {done.stderr.strip()}")
    return done.stderr.strip()


def submit(script: str, options: Sequence[str] = ()) -> str:
    """Submit a batch script; returns the job's number.

    Raises:
        SlurmError: it is refused.
    """
    return ask("sbatch", "--parsable", *options, script, check=True).partition(";")[0]
