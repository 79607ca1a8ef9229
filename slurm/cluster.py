"""What is asked of SLURM's commands, in one place; without SLURM each answer is empty."""

import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from slurm.run_files import read_json

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD")
_ENDED = (
    "PENDING",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)
_PATIENCE_S = 180.0


class SlurmError(RuntimeError):
    """SLURM refused something; the message is its own."""


def available() -> bool:
    """Whether this machine has SLURM's commands."""
    return shutil.which("sbatch") is not None


def call(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """A command of SLURM's, without this job's own variables; code 127 where there is none.

    text: its standard input.
    """
    if shutil.which(command[0]) is None:
        return subprocess.CompletedProcess(
            command, 127, "", f"there is no {command[0]} here: is this a node of the cluster?"
        )
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name in ("SLURM_CONF", "SLURM_CLUSTERS")
    }
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            input=text,
            env=environment,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(
            command, 124, "", f"{command[0]} gave no answer for {_PATIENCE_S:.0f} s"
        )


def ask(*command: str, check: bool = False, text: str | None = None) -> str:
    """Standard output of a command, "" where it fails or does not exist.

    Raises:
        SlurmError: with `check`, what the command said when it failed.
    """
    done = call(*command, text=text)
    if done.returncode and check:
        raise SlurmError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip() if done.returncode == 0 else ""


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
    text = ask(
        "squeue",
        "--noheader",
        "--array",
        f"--user={os.getuid()}",
        f"--name={said.get('name', job_name(run))}",
        "--format=%i|%T|%r|%N|%L",
    )
    jobs = [dict(zip(keys, line.split("|"), strict=False)) for line in text.splitlines() if line]
    element = said.get("element")
    return [job for job in jobs if element is None or job["job"].endswith(f"_{element}")]


def is_over(job: str) -> bool:
    """Whether SLURM says that a job runs no more; False where it says nothing."""
    done = call("squeue", "--noheader", "--format=%T", f"--jobs={job}")
    if done.returncode:
        return "Invalid job id" in done.stderr
    return all(state in _ENDED for state in done.stdout.split())


def lost(nodes: Sequence[str]) -> list[str]:
    """Those of these nodes that SLURM itself has lost."""
    listed = ask("sinfo", "--noheader", "--Node", "--format=%N %T", f"--nodes={','.join(nodes)}")
    bad = ("down", "drain", "fail", "not_resp")
    states = (line.split() for line in listed.splitlines())
    return sorted(
        {
            words[0]
            for words in states
            if len(words) == 2 and (words[1].startswith(bad) or "*" in words[1])
        }
    )


def preemption_warning() -> str:
    """What the cluster lacks for a preempted run to save first; "" if nothing."""
    config = ask("scontrol", "show", "config")
    mode = re.search(r"^PreemptMode\s*= (.*)$", config, re.MULTILINE)
    if not mode or mode[1].startswith("OFF") or "preempt_send_user_signal" in config:
        return ""
    return (
        "this cluster preempts jobs, and SlurmctldParameters lacks preempt_send_user_signal: a "
        "preempted run has only KillWait and GraceTime for its save; save often"
    )


def longest_time(partition: str | None) -> str | None:
    """The partition's longest job, as --time takes it; None if it has no limit or is unknown."""
    listed = ask(
        "sinfo",
        "--noheader",
        "--format=%P|%l",
        *([f"--partition={partition}"] if partition else []),
    )
    for line in listed.splitlines():
        name, _, limit = line.partition("|")
        if partition or name.endswith("*"):
            return None if limit == "infinite" else limit
    return None


def test_only(script: str) -> str:
    """What `sbatch --test-only` answers to a script's text: when and where the job would start.

    Raises:
        SlurmError: the job is refused.
    """
    done = call("sbatch", "--test-only", text=script)
    if done.returncode:
        raise SlurmError(f"sbatch refuses the job: {done.stderr.strip()}")
    return done.stderr.strip()


def end_steps(job: str) -> None:
    """End what is left of a job's steps on its nodes, but not its batch script."""
    listed = ask("squeue", "--steps", "--noheader", "--format=%i", f"--jobs={job}") if job else ""
    for step in listed.split():
        if step.rpartition(".")[2].isdigit():
            ask("scancel", "--signal=KILL", step)


def waiting(name: str) -> list[str]:
    """This user's jobs of a name that have not started."""
    return ask(
        "squeue",
        "--noheader",
        "--states=PENDING",
        f"--name={name}",
        "--format=%i",
        f"--user={os.getuid()}",
    ).split()


def do(say: Callable[[str], None], *command: str) -> subprocess.CompletedProcess[str]:
    """A command that changes something, with its answer said."""
    done = call(*command)
    say(f"{' '.join(command)}: {(done.stdout + done.stderr).strip() or 'done'}")
    return done
