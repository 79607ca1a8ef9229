"""What the end of a job does to the queue: requeue, a successor elsewhere, the end of a chain."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path


class Queue:
    """SLURM's queue as the supervisor of a job uses it; says what it did."""

    def __init__(self, job: str, script: Path | None, say: Callable[[str], None]) -> None:
        self.job, self.script, self._say = job, script, say

    def again(self, nodes: Sequence[str], away: Sequence[str]) -> None:
        """This job once more, but not on the nodes `away`; may end this process.

        A running job cannot be kept from nodes: a successor takes its place if one of them is its
        own. An element of an array has no successor but itself.
        """
        # What was cancelled must not come back, and what is preempted SLURM requeues by itself.
        shown = _run("squeue", "--noheader", "--format=%T", f"--jobs={self.job}")
        if shown and shown.stdout.strip() not in ("", "RUNNING"):
            self._say(f"the job is {shown.stdout.strip()}: it is not requeued from here")
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue sends it, which is no preemption
        if set(nodes) & set(away) and self.script and "_" not in self.job:
            options = ["--dependency=singleton", f"--exclude={self._excluded(away)}"]
            if self._do("sbatch", *options, str(self.script)):
                return
        if self._do("scontrol", "requeue", self.job):
            time.sleep(120)  # until SLURM ends this process

    def keep_away(self, chain: str, away: Sequence[str]) -> None:
        """Jobs of the chain that wait stay away from these nodes."""
        for job in self._waiting(chain) if away else ():
            self._do("scontrol", "update", f"JobId={job}", f"ExcNodeList={self._excluded(away)}")

    def end_chain(self, chain: str) -> None:
        """Cancel the jobs of the chain that wait."""
        if waiting := self._waiting(chain):
            self._do("scancel", *waiting)

    def down(self, nodes: Sequence[str]) -> list[str]:
        """Those of these nodes that SLURM itself has lost."""
        listed = _run("sinfo", "--noheader", "--Node", "--format=%N %T",
                      f"--nodes={','.join(nodes)}") if self.job else None
        if listed is None or listed.returncode:
            return []
        bad = ("down", "drain", "fail", "not_resp")
        states = (line.split() for line in listed.stdout.splitlines())
        return sorted({words[0] for words in states
                       if len(words) == 2 and (words[1].startswith(bad) or "*" in words[1])})

    def _excluded(self, away: Sequence[str]) -> str:
        """These nodes and those of the script's header, which an option replaces."""
        text = self.script.read_text(encoding="utf-8") if self.script else ""
        return ",".join([*away, *re.findall(r"^#SBATCH --exclude=(\S+)$", text, re.MULTILINE)])

    def _waiting(self, name: str) -> list[str]:
        listed = _run("squeue", "--noheader", "--states=PENDING", f"--name={name}", "--format=%i",
                      f"--user={os.getuid()}")
        return listed.stdout.split() if listed and not listed.returncode else []

    def _do(self, *command: str) -> bool:
        done = _run(*command)
        self._say(f"{' '.join(command)}: " + (
            "there is no SLURM here" if done is None
            else (done.stdout + done.stderr).strip() or "done"
        ))
        return done is not None and done.returncode == 0


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    """A command of SLURM's, without this job's own variables; None where there is none."""
    if shutil.which(command[0]) is None:
        return None
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
