"""What is drawn from a run's files, without SLURM."""

import json
import os
import time

import pytest

from pretrain.engine.control.control import ControlFolder
from pretrain.engine.control.ownership import Ownership
from pretrain.engine.report.slow_rank import SlowRank
from slurm import status as module
from slurm.goodput import seconds_of_kinds
from slurm.status import describe, line_of, main, runs_of, seconds_a_step


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of 50 steps of 2 s, 10 of them done twice, 200 s after it was submitted."""
    folder, now = tmp_path / "runs/a", time.time()
    (folder / "control").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: a\nsteps: 100\n")
    lines = [
        {"step": s, "time": now - 100 + 2 * s, "kind": "train", "loss": 1.0} for s in range(1, 51)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "control/status.json").write_text(
        json.dumps({"state": "running", "phase": "step", "step": 40, "reason": ""})
    )
    (folder / "control/heartbeat").touch()
    (folder / "checkpoints/step_000000040").mkdir(parents=True)
    (folder / "checkpoints/step_000000040/manifest.json").write_text("{}")
    tries = [
        {"attempt": 1, "started": now - 200, "seconds": 70, "steps": [0, 0], "decision": "restart"},
        {
            "attempt": 2,
            "started": now - 120,
            "seconds": 120,
            "steps": [0, 50],
            "decision": "requeue",
        },
    ]
    (folder / "attempts.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tries))
    monkeypatch.setattr(module.cluster, "jobs_of", lambda run: [])
    return folder


def test_describe(run):
    found = describe(run)
    assert (found["state"], found["step"], found["steps"]) == ("running", 50, 100)
    assert found["tries"] == 2
    assert found["seconds_a_step"] == pytest.approx(2.0)
    assert found["left_s"] == pytest.approx(100.0)
    assert found["goodput"] == pytest.approx(0.5, abs=0.02)  # 50 steps x 2 s in 200 s
    assert (found["checkpoint"], found["loss"]) == (40, 1.0)
    line = line_of(found)
    assert "step 50/100" in line and "0:01:40 left" in line
    assert "goodput 50% (ends 35%, starts 10%, waiting 5%)" in line


def test_a_run_without_a_heartbeat_is_silent(run):
    os.utime(run / "control/heartbeat", (0, 0))
    assert describe(run)["state"] == "silent"
    (run / "control/status.json").write_text(json.dumps({"state": "failed", "reason": "rank 3: x"}))
    assert describe(run)["state"] == "failed" and "rank 3: x" in line_of(describe(run))


def test_a_slow_rank_is_told(run):
    """As the trainer writes it; of a run that is over it means nothing."""
    control = ControlFolder(run, Ownership(run, "t"))
    control.ownership.holds = lambda: True
    control.status("running", 40)
    assert describe(run)["slow_rank"] is None
    control.name_slow(SlowRank(3, "node07", 0.9, 1.5))
    assert "waits for rank 3 on node07 (1.5 times as slow" in line_of(describe(run))
    control.failed("rank 0: killed")
    assert "node07" not in line_of(describe(run))
    assert json.loads((run / "control/status.json").read_text())["slow_rank"]["rank"] == 3


def test_runs_are_found_and_told(run, capsys):
    assert runs_of([run]) == runs_of([run.parent]) == runs_of([run.parent.parent]) == [run]
    assert main([str(run.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 50
    assert main([str(run / "control")]) == 1
    assert "no run in" in capsys.readouterr().err


def test_nothing_known_is_said_as_such(tmp_path):
    assert seconds_a_step([]) is None
    (tmp_path / "submit").mkdir()
    found = describe(tmp_path)
    assert found["state"] == "new" and "step 0/?" in line_of(found)


def test_where_the_time_went():
    """Submitted at 0; a try with steps 1 to 10 kept of 12, one that made nothing, one that runs."""
    tries = [(10.0, 60.0), (70.0, 100.0), (100.0, 160.0)]
    lines = [(step, 28.0 + 2 * step) for step in range(1, 11)]
    lines += [(step, 118.0 + 2 * (step - 10) + 4 * (step > 12)) for step in range(11, 21)]
    found = seconds_of_kinds(tries, lines, 2.0, 0.0, 161.0)
    assert found == {
        "steps": 40.0,
        "between steps": 4.0,
        "starts": 18.0 + 18.0,
        "ends": 12.0 + 30.0 + 18.0,
        "waiting": 10.0 + 10.0 + 1.0,
    }
    assert sum(found.values()) == 161.0


def test_a_run_that_was_given_up_says_why(run):
    """Also where the trainer was refused, and could write no status."""
    (run / "control/status.json").unlink()
    with open(run / "attempts.jsonl", "a", encoding="utf-8") as file:
        file.write(
            json.dumps(
                {
                    "attempt": 3,
                    "started": time.time() - 5,
                    "seconds": 4.0,
                    "steps": [40, 40],
                    "decision": "give up",
                    "why": "the trainer refused to start: no such key",
                }
            )
            + "\n"
        )
    assert "the trainer refused to start: no such key" in line_of(describe(run))
