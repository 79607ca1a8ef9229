"""Launchers that are killed: their ranks save, and leave within half a minute."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.launch import ROOT, free_port
from tests.distributed.test_resume import steps_logged
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    return folder


def command(launcher: str, path: Path) -> list[str]:
    if launcher == "torchrun":
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            str(free_port()),
            "-m",
            "pretrain.train",
            str(path),
        ]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "--module",
        "pretrain.train",
        str(path),
    ]


@pytest.mark.parametrize(
    ("launcher", "which", "number"),
    [
        ("torchrun", 0, signal.SIGKILL),
        ("torchrun", 0, signal.SIGUSR1),
        ("deepspeed", 0, signal.SIGKILL),
        ("deepspeed", 1, signal.SIGKILL),
    ],
)
def test_ranks_do_not_outlive_their_launcher(data, tmp_path, launcher, which, number):
    """which: 0 is what was started, 1 its first child (deepspeed's launch.py)."""
    run = tmp_path / "run"
    recipe = tiny_recipe(data, run, steps=100_000, checkpoint={"every_steps": 10**6})
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    with open(tmp_path / "out.txt", "w", encoding="utf-8") as out:
        started = subprocess.Popen(
            command(launcher, write_recipe(tmp_path / "recipe.yaml", recipe)),
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    family = []
    try:
        until = time.monotonic() + 180
        while steps_logged(run) < 2 and time.monotonic() < until and started.poll() is None:
            time.sleep(0.05)
        above = psutil.Process(started.pid)
        family = above.children(recursive=True)
        assert len(family) >= 2, (tmp_path / "out.txt").read_text()
        os.kill([above, *family][which].pid, number)
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
    finally:
        for process in [started, *family]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        started.wait()
    status = json.loads((run / "control/status.json").read_text())
    assert status["state"] == "stopped" and "is gone" in status["reason"]
    assert (run / f"checkpoints/step_{status['step']:09d}/manifest.json").exists()
