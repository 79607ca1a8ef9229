"""The supervisor around toy runs: nothing outlives it, and each end has what must follow."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOY = [sys.executable, "-m", "tests.slurm.toy_trainer"]


def start(run: Path, *toy: str, options: tuple[str, ...] = (), launcher: str = ""):
    """A supervisor around a toy run; `launcher`: Python code that starts it instead."""
    command = [*TOY, str(run), *toy]
    if launcher:
        command = [sys.executable, "-c", launcher, *command]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return subprocess.Popen(
        [sys.executable, "-m", "slurm.supervise", str(run), *options, "--", *command],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )


def attempts(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


def wait_for_steps(run: Path, count: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        path = run / "steps.txt"
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("the toy run makes no steps")


def steps_are_whole(run: Path, last: int) -> None:
    """Every step, in order; those after the last checkpoint before a crash may be there again."""
    found = [int(line) for line in (run / "steps.txt").read_text().split()]
    assert sorted(set(found)) == list(range(1, last + 1)) and found[-1] == last


def test_a_run_that_falls_is_started_again_on_the_spot(tmp_path):
    with start(tmp_path, "--steps", "30", "--fail-at", "15", "--step-s", "0.01") as process:
        assert process.wait(timeout=60) == 0
    first, second = attempts(tmp_path)
    assert (first["decision"], first["reason"], first["steps"]) == ("restart", "it fell", [0, 10])
    assert (second["decision"], second["steps"]) == ("done", [10, 30])
    steps_are_whole(tmp_path, 30)


def test_a_run_that_gets_nowhere_is_given_up(tmp_path):
    with start(tmp_path, "--fail-at", "0", "--always-fail") as process:
        assert process.wait(timeout=60) == 13
    assert [a["decision"] for a in attempts(tmp_path)] == ["restart", "restart", "give up"]


@pytest.mark.parametrize(
    ("number", "code", "decision"),
    [
        (signal.SIGUSR1, 75, "requeue"),
        (signal.SIGTERM, 75, "requeue"),
        (signal.SIGINT, 0, "stop"),
    ],
)
def test_signals_become_files(tmp_path, number, code, decision):
    """The time limit and a preemption are to be followed by another job; Ctrl-C is not."""
    with start(tmp_path, "--steps", "10000") as process:
        wait_for_steps(tmp_path, 3)
        process.send_signal(number)
        assert process.wait(timeout=60) == code
    (only,) = attempts(tmp_path)
    assert (only["decision"], only["state"]) == (decision, "stopped")
    steps_are_whole(tmp_path, only["steps"][1])
    if decision == "stop":  # also for a job of a chain that starts after it
        with start(tmp_path, "--steps", "10000") as process:
            assert process.wait(timeout=60) == 0
        assert len(attempts(tmp_path)) == 1


@pytest.mark.parametrize("step", ["0", "12"])
def test_a_run_without_a_sign_of_life_is_ended(tmp_path, step):
    """Also one that never gave any, since a node went in its start."""
    options = ("--silent-minutes", "0.05", "--leave-s", "2")
    with start(tmp_path, "--steps", "20", "--hang-at", step, options=options) as process:
        assert process.wait(timeout=90) == 0
    assert "no sign of life" in attempts(tmp_path)[0]["reason"]
    steps_are_whole(tmp_path, 20)


LAUNCHER = """
import subprocess, sys
ranks = [subprocess.Popen(sys.argv[1:], start_new_session=True)]
sys.exit(ranks[0].wait())
"""


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize(
    ("whom", "number"),
    [
        ("launcher", signal.SIGKILL),
        ("launcher", signal.SIGTERM),
        ("guard", signal.SIGKILL),
        ("supervisor", signal.SIGKILL),
    ],
)
def test_no_process_outlives_its_launcher(tmp_path, whom, number, deaf):
    """Ranks in sessions of their own, as torchrun and deepspeed start them, are left to save, and
    are ended if they do not leave."""
    options = ("--max-restarts", "0", "--leave-s", "1" if deaf else "40")
    toy = ("--steps", "10000", "--ranks", "2", *(["--deaf"] if deaf else []))
    with start(tmp_path, *toy, options=options, launcher=LAUNCHER) as process:
        wait_for_steps(tmp_path, 3)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 4  # guard, launcher, two ranks
        victims = {"guard": family[0], "launcher": family[1], "supervisor": process}
        victims[whom].send_signal(number)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
        code = process.wait(timeout=60)
    if whom != "supervisor":
        assert code == 75 and attempts(tmp_path)[0]["decision"] == "requeue"
    status = json.loads((tmp_path / "control/status.json").read_text())
    assert status["state"] == ("running" if deaf else "stopped")
    if not deaf:
        steps_are_whole(tmp_path, status["step"])


def test_a_try_whose_supervisor_was_killed_is_in_the_ledger(tmp_path):
    """Else a node that takes its supervisor along each time would never be counted."""
    with start(tmp_path, "--steps", "10000") as process:
        wait_for_steps(tmp_path, 12)
        process.kill()
    with start(tmp_path, "--steps", "40") as process:
        assert process.wait(timeout=60) == 0
    killed, last = attempts(tmp_path)
    assert "was killed" in killed["reason"] and killed["steps"][0] == 0
    assert last["steps"] == [killed["steps"][1], 40] and last["decision"] == "done"


def test_words_that_make_no_sense(tmp_path):
    for arguments, said in (
        (["x"], "behind `--`"),
        (["x", "--launcher", "srun", "--", "y"], "is for SLURM jobs"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "slurm.supervise", *arguments],
            cwd=ROOT,
            text=True,
            capture_output=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
        )
        assert done.returncode == 2 and said in done.stderr


def test_a_ledger_that_cannot_be_written_ends_no_run_and_starts_none_for_ever(tmp_path):
    """As on a full disk: the tries are counted in memory."""
    (tmp_path / "attempts.jsonl").mkdir()
    with start(tmp_path, "--fail-at", "0", "--always-fail") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 13 and said.count("warning: ") == 3


def test_a_second_supervisor_leaves_the_first_alone(tmp_path):
    with start(tmp_path, "--steps", "10000") as first:
        wait_for_steps(tmp_path, 3)
        with start(tmp_path, "--steps", "10000") as second:
            _, said = second.communicate(timeout=60)
        assert second.returncode == 2 and f"process {first.pid} supervises it" in said
        assert not (tmp_path / "attempts.jsonl").exists()
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=60) == 0
    assert [a["decision"] for a in attempts(tmp_path)] == ["stop"]
