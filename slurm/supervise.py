"""Keep a run going until it is finished: start its launcher, watch it, decide what follows.

    python -m slurm.supervise RUN [options] -- LAUNCHER COMMAND ...       around any launcher
    python -m slurm.supervise RUN --launcher srun --per-node 8 -- pretrain.train RECIPE ...

The second form runs in a SLURM job, as the batch script that `slurm.submit` writes ends with it.
SIGUSR1 (before the time limit) and SIGTERM (preemption, scancel) become `control/stop.auto`, which
the run reads; nobody is signalled. When the launcher ends, so does the last process of the run on
this machine. What follows is `decide`'s; each try is a line of RUN/attempts.jsonl.

Standard library only: a job starts it with whatever Python there is.
"""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slurm import launch
from slurm.attempts import fruitless, note_attempt, read_attempts, suspects
from slurm.decide import LOST, REFUSED, Decision, Outcome, decide
from slurm.follow import Queue
from slurm.one_try import OneTry
from slurm.processes import adopt_orphans
from slurm.run_files import (
    age,
    control,
    last_checkpoint,
    other_owner,
    read_json,
    status,
    write_json,
)

OWNER_SILENT_S = 62.0
"""After so long the trainer takes a run directory over from a silent owner."""


class Supervisor:
    """The tries of a run within one job, or on one machine."""

    def __init__(self, run: Path, options: argparse.Namespace) -> None:
        self.run, self.options = run, options
        self.job = launch.job_id(os.environ)
        raw = os.environ.get("SLURM_JOB_ID")
        self.trainer_job = f"SLURM_JOB_ID={raw}" if raw else None
        self.nodes = launch.hosts(os.environ.get("SLURM_JOB_NODELIST", "")) or [os.uname().nodename]
        self.queue = Queue(self.job, options.script, self._say)
        self.leaving = ""  # why this job has to end
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked)

    def _asked(self, number: int, _frame) -> None:
        """A signal to this process: the run is asked to save and stop, by file."""
        name = signal.Signals(number).name
        self.leaving = {"SIGUSR1": "the time limit is near (SIGUSR1)"}.get(
            name, f"preempted, cancelled or stopped ({name})"
        )
        control(self.run, "stop" if name == "SIGINT" else "stop.auto").touch()

    def supervise(self) -> int:
        """Try until something else than a restart follows; returns the exit code of the job."""
        control(self.run, "stop").parent.mkdir(parents=True, exist_ok=True)
        (self.run / "logs").mkdir(exist_ok=True)
        adopt_orphans()
        while True:
            if status(self.run).get("state") == "finished":
                return self._end(Decision("done", 0, "the run is finished"))
            if control(self.run, "stop").exists():
                return self._end(Decision("stop", 0, "control/stop is there: it is not started"))
            if not self.leaving:
                control(self.run, "stop.auto").unlink(missing_ok=True)
            if refused := self._wait_for_owner():
                return self._end(Decision("leave", REFUSED, refused))
            self._note_broken_try()
            decision = self._try()
            if decision.action != "restart":
                return self._end(decision)

    def _wait_for_owner(self) -> str:
        """The job before this one may have been killed without a word: the trainer would refuse to
        start until it has been silent for a minute. Why not to start, or ""."""
        until = time.monotonic() + OWNER_SILENT_S + 15
        while owner := other_owner(self.run, self.trainer_job):
            silent = age(control(self.run, "heartbeat"))
            if silent is None or silent > OWNER_SILENT_S:
                return ""
            if time.monotonic() > until or self.leaving:
                return (f"the run is at work in {owner.get('job') or 'another job'} on "
                        f"{owner.get('host')}")
            time.sleep(1)
        return ""

    def _note_broken_try(self) -> None:
        """Enter a try whose supervisor was killed before it could: its node was lost, say."""
        left = read_json(control(self.run, "supervisor.json"))
        if left.get("try", 0) <= len(read_attempts(self.run)):
            return
        said, seen = status(self.run), age(control(self.run, "heartbeat"))
        until = time.time() - seen if seen is not None else left["started"]
        note_attempt(
            self.run, job=left["job"], nodes=left["nodes"], started=left["started"],
            seconds=round(max(until - left["started"], 0.0), 1),
            steps=[left["before"], last_checkpoint(self.run)], state=said.get("state", ""),
            reason=f"its supervisor on {left['host']} was killed", decision="none",
            suspects=self.queue.down(left["nodes"]), unfit=[],
        )

    def _try(self) -> Decision:
        attempts, before = read_attempts(self.run), last_checkpoint(self.run)
        this = OneTry(self.run, self.options, self.nodes, self.job, len(attempts) + 1, self._say)
        write_json(control(self.run, "supervisor.json"), {
            "pid": os.getpid(), "host": os.uname().nodename, "job": self.job, "nodes": self.nodes,
            "try": this.number, "started": round(this.started, 1), "before": before,
        })
        this.go()
        if other_owner(self.run, self.trainer_job):
            this.code = LOST  # srun says 143 for it
        said, fresh = status(self.run), age(control(self.run, "status.json"))
        if fresh is None or fresh > time.time() - this.started + 1:
            said = {"state": "", "reason": "it wrote no status: see the log"}
        outcome = Outcome(
            state=said.get("state", ""), reason=this.reason or said.get("reason", ""),
            code=this.code, steps=(before, last_checkpoint(self.run)),
            fruitless=fruitless(attempts), stop_asked=control(self.run, "stop").exists(),
            leaving=self.leaving,
            restarts_left=self.options.max_restarts - self._restarts(attempts),
            most_fruitless=self.options.max_fruitless,
        )
        decision = decide(outcome)
        note_attempt(
            self.run, job=self.job, nodes=self.nodes, started=round(this.started, 1),
            seconds=round(time.time() - this.started, 1), steps=list(outcome.steps),
            state=outcome.state, reason=outcome.reason, code=this.code, leaving=self.leaving,
            decision=decision.action, why=decision.why, unfit=this.unfit,
            suspects=[] if self.leaving else self._suspects(outcome),
        )
        self._say(f"try {this.number} ended at step {outcome.steps[1]}: {decision.action}, "
                  f"{decision.why}")
        return decision

    def _suspects(self, outcome: Outcome) -> list[str]:
        """Nodes that a try that failed names: lost to SLURM, or of the rank in the reason."""
        found = set(self.queue.down(self.nodes))
        named = re.search(r"\brank (\d+)\b", outcome.reason)
        if outcome.state == "failed" and named:
            found |= set(self.nodes[int(named[1]) // self.options.per_node :][:1])
        return sorted(found)

    def _restarts(self, attempts: list[dict]) -> int:
        """Restarts in this job since a new step was made."""
        count = 0
        for attempt in reversed(attempts):
            before, after = attempt.get("steps", (0, 0))
            if (attempt.get("job"), attempt.get("decision")) != (self.job, "restart"):
                break
            if after > before:
                break
            count += 1
        return count

    def _end(self, decision: Decision) -> int:
        """What is left to do for this job, and its exit code."""
        control(self.run, "supervisor.json").unlink(missing_ok=True)
        away = suspects(read_attempts(self.run))
        if decision.action == "give up" and self.options.chain:
            self.queue.end_chain(self.options.chain)
        if decision.action == "requeue" and self.options.chain:
            self.queue.keep_away(self.options.chain, away)
        self._say(f"{decision.action}: {decision.why} (exit code {decision.code})")
        if decision.action == "requeue" and self.options.requeue and self.job:
            self.queue.again(self.nodes, away)
        return decision.code

    def _say(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} supervise {self.job}: {text}"
        print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code of the job."""
    from slurm.supervise_options import parse

    options = parse(argv)
    return Supervisor(options.run.absolute(), options).supervise()


if __name__ == "__main__":
    sys.exit(main())
