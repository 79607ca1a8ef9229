"""Runs that cannot go on: they end, on every rank, and say why, where and what to do."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain import train
from pretrain.train import main
from tests.distributed.launch import (
    ROOT,
    free_port,
    kill_ranks,
    run_ranks,
    start_ranks,
    tails,
    without_ranks,
)
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    return folder


def status(run: Path) -> dict:
    return json.loads((run / "control/status.json").read_text())


def test_a_run_whose_gradients_are_not_finite_ends(data, tmp_path):
    run = tmp_path / "run"
    recipe = tiny_recipe(
        data, run, optimizer__lr=1e30, schedule__warmup_steps=0, failure={"max_skipped_steps": 2}
    )
    codes = run_ranks("pretrain.train", [write_recipe(tmp_path / "r.yaml", recipe)], 2, tmp_path)
    assert codes == [1, 1], tails(tmp_path)
    assert status(run)["state"] == "failed"
    assert "3 steps in a row" in status(run)["reason"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines][-3:] == [1, 1, 1]
    assert lines[-1]["skipped_steps"] == 3 and lines[-1]["loss"] is None
    assert (run / "control/failure_rank_00001.json").exists()
    assert "was skipped: its gradient is not finite" in (run / "logs/rank_00001.log").read_text()


def test_rotten_data_ends_every_rank_and_names_the_shard(data, tmp_path):
    rotten = tmp_path / "train"
    rotten.mkdir()
    for path in (data / "train").iterdir():
        content = bytearray(path.read_bytes())
        if path.suffix == ".tar":
            content[600::700] = bytes(len(content[600::700]))
        (rotten / path.name).write_bytes(content)
    run = tmp_path / "run"
    recipe = tiny_recipe(data, run, loader={"workers": 1, "max_bad_run": 3})
    recipe["tasks"]["caption"]["data"]["shards"] = [str(rotten)]
    codes = run_ranks("pretrain.train", [write_recipe(tmp_path / "r.yaml", recipe)], 2, tmp_path)
    assert codes == [1, 1], tails(tmp_path)
    assert status(run)["state"] == "failed"
    reasons = " ".join(
        json.loads(path.read_text())["reason"]
        for path in (run / "control").glob("failure_rank_*.json")
    )
    assert "train-00000" in reasons and "rank" in reasons


def test_a_job_that_lost_the_run_leaves_it_alone(data, tmp_path, capsys):
    """Two ranks sleep in the middle of their run, another job goes on with it, and they wake up."""
    run = tmp_path / "run"
    recipe = tiny_recipe(data, run, steps=60)
    path = write_recipe(tmp_path / "r.yaml", recipe)
    losers = start_ranks("pretrain.train", [path], 2, tmp_path / "losers")
    winner = []
    try:
        wait_for(lambda: list(run.glob("checkpoints/step_*")), losers)
        assert main(["--resume", str(run)]) == 2
        assert re.search(r"is in use: process \d+ on .* --take-over", capsys.readouterr().err)
        for process in losers:
            process.send_signal(signal.SIGSTOP)
        token = (run / "control/owner.json").read_text()
        winner = start_ranks(
            "pretrain.train", ["--resume", run, "--take-over"], 1, tmp_path / "winner"
        )
        wait_for(lambda: (run / "control/owner.json").read_text() != token, winner)
        for process in losers:
            process.send_signal(signal.SIGCONT)
        codes = [process.wait(timeout=240) for process in [*losers, *winner]]
        assert codes == [3, 3, 0], tails(tmp_path / "losers") + tails(tmp_path / "winner")
    finally:
        kill_ranks([*losers, *winner])
    assert status(run)["state"] == "finished" and status(run)["step"] == 60
    assert not list(run.glob("control/failure_rank_*.json"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 61))
    assert len((run / "starts.jsonl").read_text().splitlines()) == 2
    for rank in range(2):
        log = (run / f"logs/rank_{rank:05d}.log").read_text()
        (line,) = [line for line in log.splitlines() if "has taken over this run" in line]
        assert f"rank {rank}: " in line and "stops without writing" in line


def wait_for(condition, processes, timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until and all(p.poll() is None for p in processes)
        time.sleep(0.01)


def test_arguments_and_recipes_are_judged_before_anything_starts(data, tmp_path, capsys):
    run = tmp_path / "run"
    path = write_recipe(tmp_path / "r.yaml", tiny_recipe(data, run))
    assert main([str(path), "tasks.caption.micro_batsh=4"]) == 2
    assert "micro_batch" in capsys.readouterr().err
    (run / "checkpoints/step_000000004").mkdir(parents=True)
    assert main([str(path)]) == 2
    assert f"--resume {run}" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path / "nothing")]) == 2
    assert "no recipe.yaml" in capsys.readouterr().err
    (run / "recipe.yaml").write_text(path.read_text())
    assert main(["--resume", str(run), "seed=5"]) == 2
    assert "seed: 3 in" in capsys.readouterr().err
    assert main([]) == 2 and "give a recipe, or --resume" in capsys.readouterr().err


def test_another_rank_speaks_after_rank_0(tmp_path, capsys, monkeypatch):
    """Which ends it, in most launchers, before it repeats what was said."""
    monkeypatch.setenv("RANK", "3")
    waits = []
    monkeypatch.setattr(train.time, "sleep", waits.append)
    assert main(["--resume", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("rank 3: ") and waits == [train.RANK_0_FIRST_S]


@pytest.mark.parametrize("utf8_mode", ["0", "1"])
def test_a_locale_in_which_torch_fails_is_named(tmp_path, utf8_mode):
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.train", "--resume", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": utf8_mode, "PYTHONCOERCECLOCALE": "0"},
    )
    assert done.returncode == 2
    said = "locale's encoding is ASCII" if utf8_mode == "0" else "is not a run directory"
    assert said in done.stderr and "Traceback" not in done.stderr


LAUNCHERS = {
    "python": [sys.executable, "-m", "pretrain.train"],
    "deepspeed": [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--quiet",
        "--num_gpus",
        "2",
        "--master_port",
        "0",
        "--module",
        "pretrain.train",
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)  # torchrun: test_resume.py
def test_launchers(data, tmp_path, launcher):
    run = tmp_path / "run"
    recipe = tiny_recipe(
        data, run, steps=2, schedule__warmup_steps=1, logging__peak_tflops_per_device=0.5
    )
    path = write_recipe(tmp_path / "r.yaml", recipe)
    command = list(LAUNCHERS[launcher])
    if launcher == "deepspeed":
        command[command.index("0")] = str(free_port())
    done = subprocess.run(
        [*command, str(path)],
        cwd=ROOT,
        env=without_ranks(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    start = json.loads((run / "starts.jsonl").read_text())
    assert start["world"] == (1 if launcher == "python" else 2)
    assert start["packages"]["torch"] and start["from_step"] == 0
    assert status(run)["state"] == "finished"
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["mfu"] == pytest.approx(first["model_tflops_per_device"] / 0.5)
    said = done.stdout + done.stderr
    assert "MFU refers to 0.5 TFLOP/s (logging.peak" in said
    # The first screen is ours: no line of DeepSpeed's or of a library.
    assert said.startswith("INFO starting tiny: importing torch and DeepSpeed\n")
    assert [x for x in said.splitlines() if not x.startswith(("INFO ", "step "))] == []


def test_tasks_of_srun(data, tmp_path):
    """Two on one node; a failure note has the rank that SLURM gave."""
    run = tmp_path / "run"
    recipe = tiny_recipe(data, run, steps=2, schedule__warmup_steps=1)
    recipe["tasks"]["caption"]["data"]["shards"] = ["${SHARDS}"]
    path = write_recipe(tmp_path / "r.yaml", recipe)
    job = without_ranks() | {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "pretrain.train", str(path)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SHARDS": shards},
        )
        for rank, shards in (("0", str(data / "train")), ("1", str(tmp_path / "nothing")))
    ]
    said = [task.communicate(timeout=240)[0] for task in tasks]
    assert all(task.returncode == 1 for task in tasks), said
    assert (run / "control/failure_rank_00001.json").exists(), said
    assert "nothing" in json.loads((run / "control/failure_rank_00001.json").read_text())["reason"]
    assert json.loads((run / "starts.jsonl").read_text())["world"] == 2
