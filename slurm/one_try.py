"""One start of a run's launcher: the nodes looked at, the launcher watched, nothing left alive."""

import argparse
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from slurm import health, launch
from slurm.decide import BAD_NODE
from slurm.processes import die_with_parent, end_descendants
from slurm.run_files import age, control

_HEALTH_S = 120.0


@dataclass
class OneTry:
    """A try of a run, and how it ended."""

    run: Path
    options: argparse.Namespace
    nodes: list[str]
    job: str
    number: int
    say: Callable[[str], None]
    code: int = 1
    """Exit code of the launcher, or BAD_NODE."""
    reason: str = ""
    """Why it was ended from here; "" if it ended by itself."""
    unfit: list[str] = field(default_factory=list)
    """Nodes that failed the check."""
    started: float = field(default_factory=time.time)

    def go(self) -> None:
        """Until the launcher has ended, and all that it started on the nodes."""
        if self.options.launcher and not self._nodes_are_fit():
            return
        self.say(f"try {self.number}: {' '.join(self._command())}")
        guard = [sys.executable, "-m", "slurm.guard", str(self.options.leave_s)]
        here = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p)
        child = subprocess.Popen(
            [*guard, *self._command()], env=self._environment() | {"PYTHONPATH": path},
            start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        self._watch(child)
        end_descendants(self.options.leave_s)  # the guard itself may have been killed
        launch.end_steps(self.job)
        self.code = child.returncode

    def _command(self) -> list[str]:
        if self.options.launcher is None:
            return self.options.command
        return launch.command(
            self.options.launcher, self.options.command, self.run, self.nodes,
            self.options.per_node, self._port(), self.number, sys.executable,
        )

    def _environment(self) -> dict[str, str]:
        if self.options.launcher is None:
            return dict(os.environ)
        return launch.environment_of(int(os.environ["SLURM_JOB_ID"]), self.number, self.nodes)

    def _port(self) -> int:
        return launch.port_of(int(os.environ["SLURM_JOB_ID"]), self.number)

    def _watch(self, child: subprocess.Popen) -> None:
        """Wait for the launcher; ends it where the run shows no sign of life."""
        limit_s, beat = self.options.silent_minutes * 60, control(self.run, "heartbeat")
        while child.poll() is None:
            time.sleep(0.2)
            seen = age(beat)  # None: not even one rank came up
            silent_s = time.time() - self.started
            silent_s = silent_s if seen is None else min(seen, silent_s)
            if silent_s > limit_s:
                self.reason = f"no sign of life for {silent_s:.0f} s"
                self.say(f"{self.reason}: the launcher is ended")
                launch.end_steps(self.job)  # srun waits for ever for a node that is gone
                child.send_signal(signal.SIGTERM)
                try:
                    child.wait(2 * self.options.leave_s + 10)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()

    def _nodes_are_fit(self) -> bool:
        """Ask every node; notes those that are not."""
        token, logs = secrets.token_hex(8), self.run / "logs"
        control(self.run, health.TOKEN_FILE).write_text(token, encoding="utf-8")
        name = f"health-{os.environ['SLURM_JOB_ID']}-{self.number}"
        for old in logs.glob(f"{name}-*.log"):
            old.unlink()
        step = [
            "srun", f"--nodes={len(self.nodes)}", f"--ntasks={len(self.nodes)}",
            "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=60", "--overlap",
            "--gpu-bind=none",
            f"--nodelist={','.join(self.nodes)}", f"--output={logs / f'{name}-%t.log'}",
            sys.executable, "-m", "slurm.health", str(self.run), "--token", token,
            "--gpus", str(self.options.gpus),
        ]  # fmt: skip
        try:
            subprocess.run(step, timeout=_HEALTH_S, check=False, preexec_fn=die_with_parent,
                           start_new_session=True)
        except subprocess.TimeoutExpired:
            launch.end_steps(self.job)
        found = health.reports(logs / f"{name}-*.log", self.nodes)
        bad = {node: faults for node, faults in found.items() if faults}
        if not bad:
            return True
        self.reason = "; ".join(f"node {n}: {', '.join(faults)}" for n, faults in bad.items())
        self.code = BAD_NODE
        # All of them at once: the check itself, or what they share, is at fault.
        self.unfit = sorted(bad) if len(bad) < len(self.nodes) or len(bad) == 1 else []
        self.say(f"try {self.number} is not made: {self.reason}")
        return False
