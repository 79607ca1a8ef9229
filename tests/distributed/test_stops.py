"""Stops as people and launchers ask for them, from real processes; the fast form of the first test,
with a signal to process groups, is in test_resume.py."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.launch import (
    ROOT,
    free_port,
    kill_ranks,
    start_ranks,
    tails,
    without_ranks,
)
from tests.distributed.test_resume import (
    assert_same_run,
    finish,
    members,
    metrics,
    steps_logged,
)
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe

pytestmark = pytest.mark.slow
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
    "deepspeed": [
        "-m",
        "deepspeed.launcher.launch",
        "--world_info",
        "eyJsb2NhbGhvc3QiOiBbMCwgMV19",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        "PORT",
        "--module",
    ],  # what deepspeed's runner starts on each node
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder, heldout=120)
    return folder


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = tiny_recipe(data, folder / "run", evaluation_every_steps=6)
    finish(write_recipe(folder / "recipe.yaml", recipe), folder)
    return folder / "run"


def launch(launcher: str, recipe: Path, out: Path) -> subprocess.Popen:
    """The launcher in a session of its own."""
    words = [str(free_port()) if word == "PORT" else word for word in LAUNCHERS[launcher]]
    with open(out, "w", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, *words, "pretrain.train", str(recipe)],
            cwd=ROOT,
            env=without_ranks(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_until(condition, process, timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.005)


def descendants(pid: int) -> list[int]:
    """All processes that a process has started, and they."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    own = [int(word) for word in path.read_text("utf-8").split()] if path.exists() else []
    return own + [deeper for child in own for deeper in descendants(child)]


def nobody_left(pids: list[int], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while any(members(pid) or Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def status(run: Path) -> dict:
    return json.loads((run / "control/status.json").read_text())


def catches_sigterm(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    (caught,) = (line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> signal.SIGTERM - 1 & 1)


@pytest.mark.parametrize("asked", ["stop file", "signal"])
def test_a_stop_while_the_run_starts(data, straight, tmp_path, asked):
    """1.5 s after the launcher, when its ranks may not have begun; or as soon as a process hears
    signals. It ends with the first step that it can save, and a resume goes on from there."""
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "r.yaml", tiny_recipe(data, run, evaluation_every_steps=6))
    if asked == "stop file":
        process = launch("torchrun", recipe, tmp_path / "out_0.txt")
    else:
        process = subprocess.Popen(
            [sys.executable, "-m", "pretrain.train", str(recipe)],
            cwd=ROOT,
            env=without_ranks(),
            start_new_session=True,
        )
    try:
        if asked == "stop file":
            time.sleep(1.5)
            (run / "control").mkdir(parents=True, exist_ok=True)
            (run / "control/stop").touch()
        else:
            wait_until(lambda: catches_sigterm(process.pid), process)
            assert not (run / "starts.jsonl").exists()
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0, tails(tmp_path)
    finally:
        kill_ranks([process])
    said = "control/stop" if asked == "stop file" else "SIGTERM"
    found = status(run)
    assert (found["state"], found["step"], found["reason"]) == ("stopped", 1, said)
    finish(Path("--resume"), tmp_path / "again", str(run))
    if asked == "stop file":  # the other one began on one rank
        assert_same_run(straight, run)


def test_a_stop_during_an_evaluation(data, straight, tmp_path):
    """It is cut off between two batches, and the resume begins with it."""
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "r.yaml", tiny_recipe(data, run, evaluation_every_steps=6))
    ranks = start_ranks("pretrain.train", [recipe], 2, tmp_path)
    try:
        wait_until(lambda: steps_logged(run) >= 6, ranks[0])
        (run / "control/stop").touch()
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0], tails(tmp_path)
    finally:
        kill_ranks(ranks)
    assert (status(run)["state"], status(run)["step"]) == ("stopped", 6)
    assert not [line for line in metrics(run) if line["kind"] == "evaluation"]
    assert "the evaluation after step 6 ends early" in (run / "logs/rank_00000.log").read_text()
    finish(Path("--resume"), tmp_path / "again", str(run))
    assert [line["step"] for line in metrics(run) if line["kind"] == "evaluation"] == [6, 12]
    assert_same_run(straight, run)
