"""Generated scripts on a real SLURM with four emulated nodes; a toy run is the payload."""

import itertools
import json
import sys
from pathlib import Path

import psutil
import pytest

from slurm.cluster import job_name
from slurm.script import Job, render
from slurm.site import Site
from tests.slurm.conftest import ROOT, attempts, kill_rank, rank, steps, wait_for

pytestmark = pytest.mark.slurm
SITE = Site(gpus_per_node=0, ranks_per_node=2, signal_lead_s=60, python=sys.executable,
            memory=None, silent_minutes=0.15)  # fmt: skip


def write_script(run: Path, *toy: str, site: Site = SITE, **changes) -> str:
    """The script that a run gets, with the toy in place of the trainer."""
    (run / "logs").mkdir(parents=True)
    (run / "submit").mkdir()
    fields = {"name": job_name(run), "run": run, "nodes": "2", "time": "10", "launcher": "srun",
              "train": ["tests.slurm.toy_trainer", str(run), *toy], "requeue": True,
              "chain": False, "code": ROOT}  # fmt: skip
    path = run / "submit/001.sbatch"
    path.write_text(render(Job(**fields | changes), site, (22, 5)), encoding="utf-8")
    return str(path)


def submit(emulated, script: str, *options: str) -> str:
    return emulated.ask("sbatch", "--parsable", *options, script)


def make_steps(run: Path, count: int = 3, seconds: float = 90) -> None:
    """Wait until so many more steps are made."""
    before = len(steps(run))
    wait_for(lambda: len(steps(run)) >= before + count, seconds, lambda: story(run))


def story(run: Path) -> str:
    """What a run says, for a test that fails."""
    logs = "\n".join(p.read_text(errors="replace")[-3000:] for p in sorted(run.glob("logs/*")))
    return f"{attempts(run)}\n{logs}"


def steps_are_whole(run: Path) -> None:
    """No step is missing, and those done twice came after the last checkpoint."""
    made = steps(run)
    assert sorted(set(made)) == list(range(1, max(made) + 1))
    assert all(after <= before + 1 for before, after in itertools.pairwise(made))


def test_a_life(emulated, tmp_path):
    """Rank killed, node lost, preempted, time limit, stopped by a person: no step is lost."""
    run = tmp_path / "run"
    job = submit(emulated, write_script(run, "--steps", "100000"))
    make_steps(run)
    kill_rank(run, 3)
    wait_for(lambda: attempts(run), why=lambda: story(run))
    make_steps(run)
    assert attempts(run)[0]["decision"] == "restart"  # on the same nodes, in the same job
    assert emulated.ask("squeue", "-h", "-o", "%i %T") == f"{job} RUNNING"

    lost = rank(run, 2)["host"]
    emulated.do("fail-node", lost)
    wait_for(lambda: rank(run, 2)["host"] != lost, 60, lambda: story(run))
    make_steps(run)
    emulated.do("start-node", lost)

    first = emulated.ask("sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "--wrap",
                         "sleep 1", "-o", "/dev/null")  # fmt: skip
    emulated.wait_state(first, "COMPLETED")
    make_steps(run)
    emulated.ask("scancel", "--batch", "--signal=USR1", job)  # what the time limit's lead sends
    emulated.wait_state(job, "PENDING")
    make_steps(run)

    emulated.ask(sys.executable, "-m", "slurm", "stop", str(run))
    emulated.wait_state(job, "COMPLETED")
    steps_are_whole(run)
    assert attempts(run)[-1]["decision"] == "stop"
    assert "SIGUSR1" in attempts(run)[-2]["leaving"] and attempts(run)[-2]["state"] == "stopped"
    assert len(attempts(run)) == 5, story(run)  # that of the lost node too
    assert json.loads((run / "control/status.json").read_text())["state"] == "stopped"
    for number in range(4):
        assert not psutil.pid_exists(rank(run, number)["pid"])
