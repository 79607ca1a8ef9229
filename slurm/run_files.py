"""What a run says of itself in its directory, read without the trainer's code."""

import contextlib
import json
import os
import time
from pathlib import Path


def control(run: Path, name: str) -> Path:
    """A control file: stop, stop.auto, save, heartbeat, status.json, ..."""
    return run / "control" / name


def read_json(path: Path) -> dict:
    """The object in a file; empty if it is not there or cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def status(run: Path) -> dict:
    """control/status.json."""
    return read_json(control(run, "status.json"))


def age(path: Path) -> float | None:
    """Seconds since a file changed; None if it is not there."""
    try:
        return max(time.time() - path.stat().st_mtime, 0.0)
    except OSError:
        return None


def last_checkpoint(run: Path) -> int:
    """Step of the newest checkpoint that is in place; 0 if there is none."""
    steps = [0]
    for manifest in run.glob("checkpoints/step_*/manifest.json"):
        with contextlib.suppress(ValueError):
            steps.append(int(manifest.parent.name.removeprefix("step_")))
    return max(steps)


def other_owner(run: Path, job: str | None) -> dict:
    """Who is at work in the run directory, if that is not this job; empty if nobody is.

    job: as the trainer notes it ("SLURM_JOB_ID=123"); None outside a scheduler, where the trainer
    itself tells processes of this machine apart.
    """
    owner = read_json(control(run, "owner.json"))
    if not owner or "left" in owner or job is None or owner.get("job") == job:
        return {}
    return owner


def write_json(path: Path, value: dict) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)
