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
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slurm import launch
from slurm.attempts import fruitless, note_attempt, read_attempts
from slurm.decide import LOST, REFUSED, Decision, Outcome, decide
from slurm.processes import adopt_orphans, die_with_parent, end_descendants
from slurm.run_files import age, control, last_checkpoint, other_owner, status, write_json

LEAVE_S = 40.0
"""Ranks without a launcher save and leave within 30 s by themselves."""
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
        self.leaving = ""  # why this job has to end
        self.child: subprocess.Popen | None = None
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

    def _try(self) -> Decision:
        attempts = read_attempts(self.run)
        number, started, before = len(attempts) + 1, time.time(), last_checkpoint(self.run)
        command, environment = self._command(number)
        self._say(f"try {number} from step {before}: {' '.join(command)}")
        self.child = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=die_with_parent
        )
        write_json(control(self.run, "supervisor.json"), {
            "pid": os.getpid(), "host": os.uname().nodename, "job": self.job, "try": number,
        })
        hung = self._watch(started)
        killed = end_descendants(LEAVE_S)
        launch.end_steps(self.job)
        code = self.child.returncode
        if other_owner(self.run, self.trainer_job):
            code = LOST  # srun says 143 for it
        said = status(self.run)
        fresh = age(control(self.run, "status.json"))
        if fresh is None or fresh > time.time() - started + 1:
            said = {"state": "", "reason": "it wrote no status: see the log"}
        outcome = Outcome(
            state=said.get("state", ""), reason=hung or said.get("reason", ""),
            code=code, steps=(before, last_checkpoint(self.run)),
            fruitless=fruitless(attempts), stop_asked=control(self.run, "stop").exists(),
            leaving=self.leaving,
            restarts_left=self.options.max_restarts - self._restarts(attempts),
            most_fruitless=self.options.max_fruitless,
        )
        decision = decide(outcome)
        note_attempt(
            self.run, job=self.job, nodes=self.nodes, started=round(started, 1),
            seconds=round(time.time() - started, 1), steps=list(outcome.steps), state=outcome.state,
            reason=outcome.reason, code=outcome.code, leaving=self.leaving, killed=len(killed),
            decision=decision.action, why=decision.why,
        )
        self._say(f"try {number} ended at step {outcome.steps[1]}: {decision.action}, "
                  f"{decision.why}")
        return decision

    def _restarts(self, attempts: list[dict]) -> int:
        """Restarts in this job since a new step was made."""
        count = 0
        for attempt in reversed(attempts):
            if attempt.get("job") != self.job or attempt.get("decision") != "restart":
                break
            before, after = attempt.get("steps", (0, 0))
            count = 0 if after > before else count + 1
        return count

    def _command(self, number: int) -> tuple[list[str], dict[str, str]]:
        if self.options.launcher is None:
            return self.options.command, dict(os.environ)
        job = int(os.environ["SLURM_JOB_ID"])
        return launch.command(
            self.options.launcher, self.options.command, self.run, self.nodes,
            self.options.per_node, launch.port_of(job, number), number, sys.executable,
        ), launch.environment_of(job, number, self.nodes)

    def _watch(self, started: float) -> str:
        """Wait for the launcher; ends it where the run shows no sign of life. Why, or ""."""
        limit = self.options.silent_minutes * 60
        while self.child.poll() is None:
            time.sleep(0.5)
            silent = min(age(control(self.run, "heartbeat")) or 0.0, time.time() - started)
            if control(self.run, "heartbeat").exists() and silent > limit:
                return self._end_child(f"no sign of life for {silent:.0f} s")
        return ""

    def _end_child(self, why: str) -> str:
        self._say(f"{why}: the launcher is ended")
        for number, patience_s in ((signal.SIGTERM, 30), (signal.SIGKILL, None)):
            os.killpg(self.child.pid, number)
            try:
                self.child.wait(patience_s)
                break
            except subprocess.TimeoutExpired:
                continue
        return why

    def _end(self, decision: Decision) -> int:
        """What is left to do for this job, and its exit code."""
        control(self.run, "supervisor.json").unlink(missing_ok=True)
        if decision.action == "give up" and self.options.chain:
            user = os.environ.get("USER") or str(os.getuid())
            self._slurm(
                "scancel", f"--user={user}", "--state=PENDING", f"--name={self.options.chain}"
            )
        if decision.action == "requeue" and self.options.requeue and self.job:
            # A requeue ends this process with SIGTERM, which is no preemption.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._slurm("scontrol", "requeue", self.job)
            time.sleep(120)
        self._say(f"{decision.action}: {decision.why} (exit code {decision.code})")
        return decision.code

    def _slurm(self, *command: str) -> None:
        if shutil.which(command[0]) is None:
            self._say(f"cannot run {command[0]}: there is no SLURM here")
            return
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self._say(f"{' '.join(command)}: {done.stderr.strip() or 'done'}")

    def _say(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} supervise {self.job}: {text}"
        print(line, file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what stands behind `--` is the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, command = words, []
    if "--" in words:
        own, command = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(prog="slurm.supervise", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--launcher", choices=launch.LAUNCHERS, help="in a SLURM job")
    parser.add_argument("--per-node", type=int, default=1, help="ranks on each node")
    parser.add_argument("--max-restarts", type=int, default=3,
                        help="restarts on the same nodes without a new step (default 3)")
    parser.add_argument("--max-fruitless", type=int, default=3,
                        help="tries without a new step that end the run (default 3)")
    parser.add_argument("--silent-minutes", type=float, default=45.0,
                        help="without a heartbeat so long the launcher is ended (default 45)")
    parser.add_argument("--requeue", action="store_true", help="put the job into the queue again")
    parser.add_argument("--chain", metavar="JOB_NAME", help="jobs of this name follow")
    options = parser.parse_args(own)
    options.command = command
    if not command:
        parser.error("say what to run behind `--`")
    if options.launcher and "SLURM_JOB_ID" not in os.environ:
        parser.error(f"--launcher {options.launcher} is for SLURM jobs; elsewhere give the "
                     "launcher's own command behind `--`")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code of the job."""
    options = parse(argv)
    return Supervisor(options.run.absolute(), options).supervise()


if __name__ == "__main__":
    sys.exit(main())
