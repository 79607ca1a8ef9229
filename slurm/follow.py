"""What the end of a job does to the queue: requeue, a successor elsewhere, the end of a chain."""

import contextlib
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from slurm import cluster

_UNREACHABLE = re.compile(r"contact slurm controller|timed out|refused|no answer", re.IGNORECASE)
_TRIES, _PAUSE_S = 20, 30.0
"""A controller that is restarted, or moves to its backup, is away for minutes: a job that ended
then without a successor would be a run that is over without a word."""


def again(
    job: str,
    script: Path | None,
    nodes: Sequence[str],
    away: Sequence[str],
    say: Callable[[str], None],
    pause_s: float = _PAUSE_S,
) -> None:
    """A job once more, but not on the nodes `away`; SLURM may end this process.

    A running job cannot be kept from nodes: a successor takes its place if one of them is its own.
    An element of an array has no successor but itself.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue sends it, which is no preemption
    for left in reversed(range(_TRIES)):
        # What was cancelled must not come back, and what is preempted SLURM requeues by itself.
        state = cluster.ask("squeue", "--noheader", "--format=%T", f"--jobs={job}")
        if state not in ("", "RUNNING"):
            say(f"the job is {state}: it is not requeued from here")
            return
        if set(nodes) & set(away) and script and "_" not in job:
            options = ["--dependency=singleton", f"--exclude={_excluded(away, script)}"]
            if cluster.do(say, "sbatch", *options, str(script)).returncode == 0:
                return
        done = cluster.do(say, "scontrol", "requeue", job)
        if done.returncode == 0:
            time.sleep(4 * pause_s)  # until SLURM ends this process
            return
        if not left or not _UNREACHABLE.search(done.stderr):
            break
        time.sleep(pause_s)
    say("the job could not be requeued: submit the run again, and it goes on")


def keep_away(
    chain: str, script: Path | None, away: Sequence[str], say: Callable[[str], None]
) -> None:
    """Jobs of the chain that wait stay away from these nodes."""
    for job in cluster.waiting(chain) if away else ():
        cluster.do(
            say, "scontrol", "update", f"JobId={job}", f"ExcNodeList={_excluded(away, script)}"
        )


def end_chain(chain: str, say: Callable[[str], None]) -> None:
    """Cancel the jobs of the chain that wait."""
    if waiting := cluster.waiting(chain):
        cluster.do(say, "scancel", *waiting)


def _excluded(away: Sequence[str], script: Path | None) -> str:
    """These nodes and those of the script's header, which an option replaces."""
    text = ""
    with contextlib.suppress(OSError):
        text = script.read_text(encoding="utf-8") if script else ""
    return ",".join([*away, *re.findall(r"^#SBATCH --exclude=(\S+)$", text, re.MULTILINE)])
