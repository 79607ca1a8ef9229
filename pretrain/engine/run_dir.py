"""The folder that describes a run by itself.

    <run>/
        recipe.yaml          the resolved recipe; all that `--resume` needs
        tokenizer/           the tokenizer's own files
        starts.jsonl         one line per start: command, versions, git state, world, host
        metrics.jsonl        one line per logged step
        faults/              bad samples that each rank met, one line each
        tensorboard/ logs/ control/ checkpoints/
"""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from data_pipeline.faults import FaultFile
from pretrain.engine.metrics_log import drop_later_steps

_PACKAGES = ("torch", "deepspeed", "webdataset", "transformers", "tokenizers", "safetensors",
             "numpy", "pillow", "simplejpeg", "opencv-python-headless", "pydantic", "omnipretrain")


class RunDirError(RuntimeError):
    """The run directory does not fit what was asked; the message says what to do."""


def check_new(run_dir: Path) -> None:
    """Refuse to start a new run in a folder that already holds one."""
    if (run_dir / "checkpoints").is_dir() and any((run_dir / "checkpoints").glob("step_*")):
        raise RunDirError(
            f"{run_dir} already holds a run with checkpoints: continue it with "
            f"`--resume {run_dir}`, or choose another run_dir"
        )


def check_resumable(run_dir: Path) -> Path:
    """Path of the resolved recipe of an existing run."""
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        raise RunDirError(f"{run_dir} is not a run directory: it has no recipe.yaml")
    return path


def record_start(
    run_dir: Path, world: int, zero_stage: int, device: str, step: int, deterministic: bool
) -> None:
    """Append what this start ran on to `starts.jsonl`."""
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "from_step": step,
        "command": [sys.executable, *sys.argv],
        "world": world,
        "zero_stage": zero_stage,
        "device": device,
        "deterministic": deterministic,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": _versions(),
        "git": git_state(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    with open(run_dir / "starts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def open_fault_file(run_dir: Path, rank: int, world: int, step: int) -> FaultFile:
    """The file of this rank's bad samples, without the lines of steps after `step`, which the run
    continues from; rank 0 looks after those of ranks that a larger world had."""
    folder = run_dir / "faults"
    own = folder / f"rank_{rank:05d}.jsonl"
    others = [p for p in folder.glob("rank_*.jsonl") if int(p.stem.removeprefix("rank_")) >= world]
    for path in [own, *(others if rank == 0 else [])]:
        drop_later_steps(path, step)
    return FaultFile(own)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, str | bool] | None:
    """Commit of the code that runs and whether it was changed since; None outside a checkout."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True, encoding="utf-8", check=True, timeout=20,
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"),
                "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
