"""What is asked of SLURM's commands, in one place; without SLURM each answer is empty."""

import getpass
import shutil
import subprocess
from collections.abc import Sequence

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


def jobs_named(name: str) -> list[dict[str, str]]:
    """Jobs of this user with this name that are not over: job, state, reason, nodes, left."""
    keys = ("job", "state", "reason", "nodes", "left")
    text = ask("squeue", "--noheader", f"--user={getpass.getuser()}", f"--name={name}",
               "--format=%i|%T|%r|%N|%L")
    return [dict(zip(keys, line.split("|"), strict=False)) for line in text.splitlines() if line]


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
