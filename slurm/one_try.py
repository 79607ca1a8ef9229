"""One start of a run's launcher: the nodes looked at, the launcher watched, nothing left alive."""

import argparse
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slurm import cluster, health, launch
from slurm.decide import BAD_NODE
from slurm.guard import die_with_parent, end_descendants
from slurm.run_files import control, stamp

_HEALTH_S, _CHECK_S = 120.0, 420.0
_LOOK_S = 5.0


@dataclass
class OneTry:
    """A try of a run, and how it ended."""

    run: Path
    options: argparse.Namespace
    nodes: list[str]
    job: str
    number: int
    say: Callable[[str], None]
    leaving: Callable[[], str]
    """Why the job has to end, "" if it may go on."""
    first: bool = True
    """The first try of its job: the nodes have to compute and to reach each other too."""
    code: int = 1
    """Exit code of the launcher, or BAD_NODE."""
    reason: str = ""
    """Why it was ended from here; "" if it ended by itself."""
    last_words: str = ""
    """Of the first ranks, before the launcher's report."""
    unfit: list[str] = field(default_factory=list)
    """Nodes that failed the check."""
    started: float = field(default_factory=time.time)

    def go(self) -> None:
        """Until the launcher has ended, and all that it started on the nodes."""
        if self.options.launcher and not self._nodes_are_fit():
            return
        if self.leaving():  # while the nodes were looked at: the run would not hear of it
            self.reason = f"not started: {self.leaving()}"
            return
        command = self._command(self.options.command, f"launch-%j-{self.number}-%t.log")
        self.say(f"try {self.number}: {' '.join(command)}")
        here = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p)
        child = subprocess.Popen(
            [sys.executable, "-m", "slurm.guard", str(self.options.leave_s), *command],
            env=self._environment() | {"PYTHONPATH": path},
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self._watch(child)
        end_descendants(self.options.leave_s)  # the guard itself may have been killed
        cluster.end_steps(self.job)
        self.code = -signal.SIGKILL if child.returncode is None else child.returncode
        self.last_words, of_rank = launch.end_of_ranks(self._said())
        self.code = of_rank if self.code == 1 and of_rank is not None else self.code

    def _said(self) -> str:
        """The end of what the first task of the launcher, and its ranks, have written."""
        for path in self.run.glob(f"logs/launch-*-{self.number}-0.log"):
            with contextlib.suppress(OSError):
                return path.read_text("utf-8", "replace")[-8000:]
        return ""

    def _command(self, train: Sequence[str], log: str, check: bool = False) -> list[str]:
        if self.options.launcher is None:
            return self.options.command
        return launch.command(
            self.options.launcher,
            train,
            self.run,
            self.nodes,
            self.options.per_node,
            self._port(check),
            log,
            sys.executable,
        )

    def _environment(self, check: bool = False) -> dict[str, str]:
        if self.options.launcher is None:
            return dict(os.environ)
        return launch.environment_of(self._port(check), self.nodes)

    def _port(self, check: bool) -> int:
        return launch.port_of(int(os.environ["SLURM_JOB_ID"]), self.number, check)

    def _watch(self, child: subprocess.Popen) -> None:
        """Wait for the launcher; ends it where the run shows no sign of life.

        Only changes of the heartbeat count, by a clock that cannot be set: neither the file
        server's nor this node's may jump, or differ, at a run's cost.
        """
        limit_s, beat = self.options.silent_minutes * 60, control(self.run, "heartbeat")
        seen, since = stamp(beat), time.monotonic()
        looked = since
        while child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.2)
            if self.leaving():
                self._ask_to_stop()
            now = time.monotonic()
            if now - looked < min(_LOOK_S, limit_s / 10):
                continue  # a shared file system is not asked more often than need be
            looked = now
            if (changed := stamp(beat)) != seen:
                seen, since = changed, now
            elif now - since > limit_s:
                self.reason = f"no sign of life for {now - since:.0f} s"
                self.say(f"{self.reason}: the launcher is ended")
                return self._end(child)

    def _ask_to_stop(self) -> None:
        """By file, as often as it takes: a start drops requests from before, a disk may be full."""
        path = control(self.run, "stop.auto")
        with contextlib.suppress(OSError):
            if not path.exists():
                path.touch()

    def _end(self, child: subprocess.Popen) -> None:
        cluster.end_steps(self.job)  # srun waits for ever for a node that is gone
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(2 * self.options.leave_s + 10)
            return
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_LOOK_S)

    # ---- the nodes -----------------------------------------------------------------------------

    def _nodes_are_fit(self) -> bool:
        """Ask every node; notes those that are not."""
        token, number = secrets.token_hex(8), self.number
        with contextlib.suppress(OSError):  # then each node says that it cannot read it
            control(self.run, health.TOKEN_FILE).write_text(token, encoding="utf-8")
        ask = [
            "srun",
            f"--nodes={len(self.nodes)}",
            f"--ntasks={len(self.nodes)}",
            "--ntasks-per-node=1",
            "--kill-on-bad-exit=0",
            "--wait=60",
            "--overlap",
            f"--nodelist={','.join(self.nodes)}",
            f"--output={self.run / 'logs' / f'health-%j-{number}-%t.log'}",
            sys.executable,
            "-m",
            "slurm.health",
            str(self.run),
            "--token",
            token,
            "--gpus",
            str(self.options.gpus),
        ]
        bad = self._faults(ask, f"health-*-{number}-*.log", _HEALTH_S)
        if not bad and self.first and self.options.check:
            ask = self._command([self.options.check], f"check-%j-{number}-%t.log", check=True)
            bad = self._faults(ask, f"check-*-{number}-*.log", _CHECK_S)
        if not bad or self.leaving():
            return True
        self.reason = "; ".join(f"node {n}: {', '.join(faults)}" for n, faults in bad.items())
        self.code = BAD_NODE
        # All of them at once: the check itself, or what they share, is at fault.
        self.unfit = sorted(bad) if len(bad) < len(self.nodes) or len(bad) == 1 else []
        self.say(f"try {self.number} is not made: {self.reason}")
        return False

    def _faults(self, command: Sequence[str], answers: str, limit_s: float) -> dict[str, list[str]]:
        """Start a check on all nodes; the nodes that have faults, with them."""
        for old in self.run.glob(f"logs/{answers}"):
            old.unlink(missing_ok=True)
        try:
            subprocess.run(
                command,
                timeout=limit_s,
                check=False,
                preexec_fn=die_with_parent,
                start_new_session=True,
                env=self._environment(check=True),
            )
        except subprocess.TimeoutExpired:
            cluster.end_steps(self.job)
        found = health.reports(self.run / "logs" / answers, self.nodes, self.options.per_node)
        return {node: faults for node, faults in found.items() if faults}
