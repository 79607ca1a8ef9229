"""Runs of `pretrain.train` that are killed, stopped, damaged and resumed, against one that is not.

Equal means bit for bit: every logged loss and gradient norm, and the final weights.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pretrain.engine.checkpoint.files import newest_whole, read_full_state
from tests.distributed.launch import (
    ROOT,
    kill_ranks,
    run_ranks,
    start_ranks,
    tails,
    without_ranks,
)
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe
from tools import fetch_checkpoint

EXACT = ("loss", "cross_entropy", "token_accuracy", "gradient_norm", "learning_rate", "epoch")


RECORDS = ("recipe.yaml", "starts.jsonl", "metrics.jsonl", "faults/rank_00000.jsonl")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    return folder


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """stage -> run directory of an uninterrupted run; made when asked for."""
    done: dict[int, Path] = {}

    def run(stage: int) -> Path:
        if stage not in done:
            folder = tmp_path_factory.mktemp(f"straight{stage}")
            done[stage] = folder / "run"
            recipe = tiny_recipe(data, done[stage], deepspeed=f"zero{stage}")
            finish(write_recipe(folder / "recipe.yaml", recipe), folder)
        return done[stage]

    return run


def finish(recipe: Path, logs: Path, *more: str, world: int = 2) -> None:
    codes = run_ranks("pretrain.train", [recipe, *more], world, logs)
    assert codes == [0] * world, tails(logs)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert (a["step"], a["kind"]) == (b["step"], b["kind"])
        assert {k: a.get(k) for k in EXACT} == {k: b.get(k) for k in EXACT}, f"step {a['step']}"
    weights = [read_full_state(newest_whole(run / "checkpoints")) for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def kill_when(condition, processes, timeout_s: float = 120) -> bool:
    """SIGKILL all ranks as soon as `condition()`; False if they ended before."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if condition():
            kill_ranks(processes)
            return True
        if all(p.poll() is not None for p in processes):
            return False
        time.sleep(0.001)
    kill_ranks(processes)
    raise AssertionError("the moment to kill never came")


def test_stopped_by_a_signal_to_all_processes(data, straight, tmp_path):
    """As launchers and schedulers send it: to ranks, loader workers and the process that fills the
    cache, and those that write checkpoints. Both ranks save the same step and leave with 0, and
    nobody stays behind."""
    run = tmp_path / "run"
    cache = {"folder": str(tmp_path / "cache"), "max_gib": 0.001, "block_mib": 0.01}
    far = (tmp_path / "far").as_uri()
    recipe = tiny_recipe(
        data, run, loader__cache=cache, checkpoint__asynchronous=True, checkpoint__every_steps=1
    )
    recipe["checkpoint"]["copy_to"] = far
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe)
    processes = start_ranks("pretrain.train", [recipe], 2, tmp_path)
    try:
        until = time.monotonic() + 120
        while steps_logged(run) < 2 and time.monotonic() < until:
            time.sleep(0.005)
        assert all(len(members(process.pid)) >= 2 for process in processes)
        os.killpg(processes[1].pid, signal.SIGTERM)
        os.killpg(processes[0].pid, signal.SIGTERM)
        codes = [process.wait(timeout=120) for process in processes]
        until = time.monotonic() + 10
        while any(members(process.pid) for process in processes):
            assert time.monotonic() < until, "processes stay behind"
            time.sleep(0.1)
    finally:
        kill_ranks(processes)
    assert codes == [0, 0], tails(tmp_path)
    status = json.loads((run / "control/status.json").read_text())
    assert status["state"] == "stopped" and status["reason"] == "SIGTERM"
    assert 2 <= status["step"] < 12
    assert (run / f"checkpoints/step_{status['step']:09d}/manifest.json").exists()
    shutil.rmtree(run / "checkpoints")  # and brought back from where they are copied to
    assert fetch_checkpoint.main([far, str(run)]) == 0
    finish(Path("--resume"), tmp_path / "again", str(run))
    assert json.loads((run / "control/status.json").read_text())["state"] == "finished"
    assert_same_run(straight(2), run)
    assert (tmp_path / "far/latest").read_text() == "step_000000012\n"


def members(group: int) -> list[int]:
    """Processes of a process group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, own, *_ = stat.read_bytes().rpartition(b")")[2].split()
            if int(own) == group and state != b"Z":
                found.append(int(stat.parent.name))
    return found


@contextlib.contextmanager
def small_disk(folder: Path, kib: int):
    """A file system of its own at `folder`; gives a function that mounts it anew with options."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system takes root and mount")
    try:
        yield lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("behind", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_full_disk_and_one_that_is_read_only(data, straight, tmp_path, behind):
    """Both end the run, with the file in the reason and the last checkpoint whole; when there is
    room again the run goes on. behind: the checkpoint is written while training goes on."""
    run, recipe = tmp_path / "disk/run", tmp_path / "recipe.yaml"
    settings = tiny_recipe(data, run, checkpoint__asynchronous=behind)
    write_recipe(recipe, settings)
    with small_disk(tmp_path / "disk", 1000) as remount:
        words = [recipe, "--start-or-resume"]
        assert 1 in run_ranks("pretrain.train", words, 2, tmp_path / "full")
        said = tails(tmp_path / "full")
        assert re.search(rf"No space left on device.*{run}|{run}.*\(os error 28\)", said), said
        remount("ro")
        ranks = start_ranks("pretrain.train", words, 2, tmp_path / "readonly")
        try:
            assert ranks[0].wait(60) == 1  # then the launcher ends the other one
        finally:
            kill_ranks(ranks)
        said = tails(tmp_path / "readonly")
        assert f"Read-only file system: '{run}" in said, said
        remount("size=1g,rw")
        finish(recipe, tmp_path / "last", "--start-or-resume")
        assert_same_run(straight(2), run)


def test_torchrun_starts_a_killed_run_again(data, straight, tmp_path):
    """One command, also for the first start; a rank dies after a checkpoint."""
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(data, run))
    agent = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            "2",
            "-m",
            "pretrain.train",
            str(recipe),
            "--start-or-resume",
            "loader.workers=1",
        ],
        cwd=ROOT,
        env=without_ranks(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until = time.monotonic() + 120
        while steps_logged(run) < 5 and time.monotonic() < until and agent.poll() is None:
            time.sleep(0.001)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text("utf-8").split()
        os.kill(int(children[1]), signal.SIGKILL)
        said, _ = agent.communicate(timeout=240)
    finally:
        agent.kill()
    assert agent.returncode == 0, said
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [start["world"] for start in starts] == [2, 2] and starts[1]["from_step"] >= 4
    assert json.loads((run / "control/status.json").read_text())["state"] == "finished"
    assert_same_run(straight(2), run)


def test_other_world_and_stage_see_the_same_batches(data, straight, tmp_path):
    """Stopped by file at world 2, resumed at world 1 under ZeRO-3 with another micro-batch."""
    run = tmp_path / "run"
    recipe = tiny_recipe(data, run, tasks__caption__objective__decoder__dropout=0.0)
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    processes = start_ranks("pretrain.train", [path], 2, tmp_path)
    kill_when(lambda: steps_logged(run) >= 6, processes)
    finish(
        Path("--resume"),
        tmp_path / "again",
        str(run),
        "deepspeed=zero3",
        "tasks.caption.micro_batch=8",
        world=1,
    )
    whole = tmp_path / "whole"
    recipe["run_dir"] = str(whole)
    finish(write_recipe(tmp_path / "whole.yaml", recipe), tmp_path / "whole_logs", world=1)
    for a, b in zip(metrics(run), metrics(whole), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5), f"step {a['step']}"


def test_a_damaged_checkpoint_is_passed_over(data, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight(2), run)
    newest = newest_whole(run / "checkpoints") / "rank_00001.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    finish(Path("--resume"), tmp_path / "again", str(run))
    log = (run / "logs/rank_00000.log").read_text()
    assert "step_000000012 is passed over" in log and "rank_00001.safetensors is damaged" in log
    assert_same_run(straight(2), run)


def test_balanced_and_averaged(data, tmp_path):
    """MT-AdamW, layer-wise decay and a moving average: killed and resumed, evaluated and read.
    Checkpoints of the killed run are asynchronous, whose content has to be the same."""
    runs = []
    for name in ("straight", "killed"):
        recipe = tiny_recipe(data, tmp_path / name, deepspeed="zero3", ema={"decay": 0.8})
        recipe["optimizer"] = {
            "kind": "mt_adamw",
            "lr": 1e-3,
            "betas": [0.9, 0.95],
            "clip_norm": None,
            "omega": {"caption": 0.5},
            "layer_decay": {"encoders.image": 0.7},
        }
        recipe["checkpoint"]["asynchronous"] = name == "killed"
        path = write_recipe(tmp_path / f"{name}.yaml", recipe)
        runs.append(tmp_path / name)
        if name == "killed":
            processes = start_ranks("pretrain.train", [path], 2, tmp_path / "logs")
            assert kill_when(lambda: steps_logged(runs[1]) >= 6, processes)
            # Another save may be cut off: what it leaves is cleared away.
            (runs[1] / "checkpoints/.writing-step_000000011-00000000").mkdir()
            finish(Path("--resume"), tmp_path / "again", str(runs[1]))
            left = [path.name for path in (runs[1] / "checkpoints").iterdir()]
            assert sorted(left) == ["latest", "step_000000008", "step_000000012"]
        else:
            finish(path, tmp_path)
    assert_same_run(*runs)
    folders = [newest_whole(run / "checkpoints") for run in runs]
    averages = [read_full_state(folder, "ema") for folder in folders]
    for name in averages[0]:
        assert torch.equal(averages[0][name], averages[1][name]), name
    lines = metrics(runs[1])
    assert all(0.01 < line["update_rms"] < 10 for line in lines if line["kind"] == "train")
    (evaluation,) = [line for line in lines if line["kind"] == "evaluation"]
    losses = {w: heldout_loss(folders[1], w, data) for w in ("master", "ema")}
    assert evaluation["cross_entropy"] == pytest.approx(losses["ema"], rel=1e-5)
    assert losses["master"] != pytest.approx(losses["ema"], rel=1e-4)


def heldout_loss(checkpoint: Path, weights: str, data: Path) -> float:
    """Held-out loss of a checkpoint in this process, with weights read as an export reads them."""
    from pretrain.build import build_evaluation_loader
    from pretrain.objectives.objective import EvaluationContext
    from tools.support.trained import open_captioner

    captioner = open_captioner(checkpoint, weights=weights)
    loader = build_evaluation_loader(captioner.recipe, "caption", captioner.tokenizer)
    values, _ = captioner.objective.evaluate(
        captioner.model.encoders,
        loader,
        EvaluationContext(torch.device("cpu"), captioner.tokenizer),
    )
    return values["cross_entropy"]


def test_a_resume_on_other_data_is_refused(data, tmp_path, monkeypatch):
    """The recipe in the run directory is a file that people can edit, and shards can change."""
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    recipe = tiny_recipe(data, run, steps=4)
    finish(write_recipe(tmp_path / "recipe.yaml", recipe), tmp_path, world=1)
    resolved = run / "recipe.yaml"
    resolved.write_text(resolved.read_text().replace(str(data / "train"), str(data / "heldout")))
    assert run_ranks("pretrain.train", ["--resume", run, "steps=5"], 1, tmp_path) == [1]
    reason = json.loads((run / "control" / "failure_rank_00000.json").read_text())["reason"]
    assert "tasks.caption: the training data are not those that this run" in reason
    for checkpoint in run.glob("checkpoints/step_*/manifest.json"):
        checkpoint.write_text("{}")
    kept = {name: (run / name).read_bytes() for name in RECORDS}
    assert run_ranks("pretrain.train", ["--resume", run], 1, tmp_path) == [1]
    reason = json.loads((run / "control" / "status.json").read_text())["reason"]
    assert "none of the 1 checkpoints" in reason
    assert {name: (run / name).read_bytes() for name in RECORDS} == kept
