"""Stops in the start of a run and in an evaluation, by file and by signal. (All signals, to ranks
and launchers: test_signals.py.)"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.launch import (
    ROOT,
    kill_ranks,
    start_ranks,
    tails,
    without_ranks,
)
from tests.distributed.test_resume import (
    assert_same_run,
    finish,
    metrics,
    steps_logged,
)
from tests.distributed.test_signals import hears_sigterm, launched
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe

pytestmark = pytest.mark.slow


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


def wait_until(condition, process, timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.005)


def status(run: Path) -> dict:
    return json.loads((run / "control/status.json").read_text())


@pytest.mark.parametrize("asked", ["stop file", "signal"])
def test_a_stop_while_the_run_starts(data, straight, tmp_path, asked):
    """1.5 s after the launcher, when its ranks may not have begun; or as soon as a process hears
    signals. It ends with the first step that it can save, and a resume goes on from there."""
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "r.yaml", tiny_recipe(data, run, evaluation_every_steps=6))
    if asked == "stop file":
        process = launched("torchrun", recipe, tmp_path / "out_0.txt")
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
            wait_until(lambda: hears_sigterm(process.pid), process)
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
