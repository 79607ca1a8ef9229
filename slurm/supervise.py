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

from slurm import cluster, follow, launch, owner
from slurm.decide import AGAIN, LOST, REFUSED, Decision, Outcome, decide
from slurm.guard import adopt_orphans
from slurm.one_try import OneTry
from slurm.run_files import (
    Ledger,
    control,
    fruitless,
    last_checkpoint,
    read_json,
    stamp,
    status,
    suspects,
    write_json,
)


class Supervisor:
    """The tries of a run within one job, or on one machine."""

    def __init__(self, run: Path, options: argparse.Namespace) -> None:
        self.run, self.options = run, options
        self.job = launch.job_id(os.environ)
        raw = os.environ.get("SLURM_JOB_ID")
        self.trainer_job = f"SLURM_JOB_ID={raw}" if raw else None
        self.nodes = launch.hosts(os.environ.get("SLURM_JOB_NODELIST", "")) or [os.uname().nodename]
        self.ledger, self.tries_here = Ledger(run), 0
        self.leaving = ""  # why this job has to end
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked)

    def _asked(self, number: int, _frame) -> None:
        """A signal to this process; `OneTry` asks the run to save and stop, by file."""
        name = signal.Signals(number).name
        self.leaving = {"SIGUSR1": "the time limit is near (SIGUSR1)"}.get(
            name, f"preempted, cancelled or stopped ({name})"
        )
        if name == "SIGINT":
            control(self.run, "stop").touch()

    def supervise(self) -> int:
        """Try until something else than a restart follows; returns the exit code of the job."""
        control(self.run, "stop").parent.mkdir(parents=True, exist_ok=True)
        (self.run / "logs").mkdir(exist_ok=True)
        adopt_orphans()
        while True:
            decision = self._before() or self._try()
            if decision.action != "restart":
                return self._end(decision)

    def _before(self) -> Decision | None:
        """What follows without a try, if none is due."""
        if status(self.run).get("state") == "finished":
            return Decision("done", 0, "the run is finished")
        if control(self.run, "stop").exists():
            return Decision(
                "stop",
                0,
                "control/stop is there: it is not started (submit the run "
                "again, or delete the file, to go on)",
            )
        if refused := owner.wait(self.run, self.trainer_job, lambda: self.leaving, self._say):
            return Decision("leave", REFUSED, refused)
        if self.leaving:
            return Decision("requeue", AGAIN, self.leaving)
        self._quietly(control(self.run, "stop.auto").unlink, missing_ok=True)
        self._note_broken_try()
        return None

    def _note_broken_try(self) -> None:
        """Enter a try whose supervisor was killed before it could: its node was lost, say."""
        left = read_json(control(self.run, "supervisor.json"))
        if left.get("try", 0) <= len(self.ledger.tries()):
            return
        seen = stamp(control(self.run, "heartbeat"))
        until = seen / 1e9 if seen is not None else left["started"]
        self._note(
            job=left["job"],
            nodes=left["nodes"],
            started=left["started"],
            seconds=round(max(until - left["started"], 0.0), 1),
            steps=[left["before"], last_checkpoint(self.run)],
            state=status(self.run).get("state", ""),
            reason=f"its supervisor on {left['host']} was killed",
            decision="none",
            suspects=cluster.lost(left["nodes"]) if self.job else [],
            unfit=[],
        )

    def _try(self) -> Decision:
        attempts, before = self.ledger.tries(), last_checkpoint(self.run)
        said_before, self.tries_here = stamp(control(self.run, "status.json")), self.tries_here + 1
        this = OneTry(
            self.run,
            self.options,
            self.nodes,
            self.job,
            len(attempts) + 1,
            self._say,
            lambda: self.leaving,
            first=self.tries_here == 1,
        )
        self._quietly(
            write_json,
            control(self.run, "supervisor.json"),
            {
                "pid": os.getpid(),
                "host": os.uname().nodename,
                "job": self.job,
                "nodes": self.nodes,
                "try": this.number,
                "started": round(this.started, 1),
                "before": before,
                "module": self.options.command[0],
            },
        )
        this.go()
        if owner.other(self.run, self.trainer_job):
            this.code = LOST  # srun says 143 for it
        said = status(self.run)
        if stamp(control(self.run, "status.json")) == said_before:
            said = {"reason": this.last_words or "it wrote no status: see the log"}
        outcome = Outcome(
            state=said.get("state", ""),
            reason=this.reason or said.get("reason", ""),
            code=this.code,
            steps=(before, last_checkpoint(self.run)),
            fruitless=fruitless(attempts),
            stop_asked=control(self.run, "stop").exists(),
            leaving=self.leaving,
            restarts_left=self.options.max_restarts - self._restarts(attempts),
            most_fruitless=self.options.max_fruitless,
        )
        decision = decide(outcome)
        self._note(
            job=self.job,
            nodes=self.nodes,
            started=round(this.started, 1),
            seconds=round(time.time() - this.started, 1),
            steps=list(outcome.steps),
            state=outcome.state,
            reason=outcome.reason,
            code=this.code,
            leaving=self.leaving,
            decision=decision.action,
            why=decision.why,
            unfit=this.unfit,
            suspects=[] if self.leaving else self._suspects(outcome),
        )
        self._say(
            f"try {this.number} ended at step {outcome.steps[1]}: {decision.action}, {decision.why}"
        )
        return decision

    def _suspects(self, outcome: Outcome) -> list[str]:
        """Nodes that a try that failed names: lost to SLURM, or of the rank in the reason."""
        found = set(cluster.lost(self.nodes) if self.job else ())
        named = re.search(r"\brank (\d+)\b", outcome.reason)
        if outcome.state == "failed" and named:
            found |= set(self.nodes[int(named[1]) // self.options.per_node :][:1])
        return sorted(found)

    def _restarts(self, attempts: list[dict]) -> int:
        """Restarts in this job since a new step was made."""
        here = [a for a in attempts if a.get("job") == self.job][-self.tries_here + 1 :]
        return fruitless(here) if self.tries_here > 1 else 0

    def _end(self, decision: Decision) -> int:
        """What is left to do for this job, and its exit code."""
        mine = read_json(control(self.run, "supervisor.json"))
        if (mine.get("pid"), mine.get("host")) == (os.getpid(), os.uname().nodename):
            self._quietly(control(self.run, "supervisor.json").unlink)
        away, options = suspects(self.ledger.tries()), self.options
        self._say(f"{decision.action}: {decision.why} (exit code {decision.code})")
        if decision.action == "give up" and options.chain:
            follow.end_chain(options.chain, self._say)
        if decision.action == "requeue" and options.chain:
            follow.keep_away(options.chain, options.script, away, self._say)
        if decision.action == "requeue" and options.requeue and self.job:
            follow.again(self.job, options.script, self.nodes, away, self._say)
        return decision.code

    def _note(self, **fields) -> None:
        self._quietly(self.ledger.note, **fields)

    def _quietly(self, write, *values, **fields) -> None:
        """Write; a file system that fails (a full disk) is said, and does not end the run."""
        try:
            write(*values, **fields)
        except OSError as error:
            self._say(f"warning: {error}")

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
