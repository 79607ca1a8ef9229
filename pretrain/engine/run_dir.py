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

from data_pipeline.files import naming
from data_pipeline.loader.faults import FaultFile
from pretrain.engine.control.ownership import Ownership
from pretrain.engine.report.metrics_log import drop_later_steps
from pretrain.engine.run_record import STARTS_FILE

_PACKAGES = (
    "torch",
    "deepspeed",
    "webdataset",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
    "pydantic",
    "omnipretrain",
)


def record_start(
    run_dir: Path,
    ownership: Ownership,
    *,
    world: int,
    zero_stage: int,
    device: str,
    step: int,
    deterministic: bool,
) -> None:
    """Append what this start runs on to `starts.jsonl`; raises OwnershipLost."""
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
    ownership.require()
    path = run_dir / STARTS_FILE
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def open_fault_file(
    run_dir: Path, ownership: Ownership, rank: int, world: int, step: int
) -> FaultFile:
    """The file of this rank's bad samples, without the lines of steps after `step`, which the run
    continues from; rank 0 looks after those of ranks that a larger world had."""
    ownership.require()
    folder = run_dir / "faults"
    own = folder / f"rank_{rank:05d}.jsonl"
    others = [p for p in folder.glob("rank_*.jsonl") if int(p.stem.removeprefix("rank_")) >= world]
    for path in [own, *(others if rank == 0 else [])]:
        drop_later_steps(path, step)
    return FaultFile(own, may_write=ownership.holds)


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
            capture_output=True,
            encoding="utf-8",
            check=True,
            timeout=20,
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
