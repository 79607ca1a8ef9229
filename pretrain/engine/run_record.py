"""Whether a folder holds a run, and how far it came: an absent checkpoint is no new run.

The step of a run is told by more than its checkpoints. Where they are gone (deleted, archived, on
a disk that is not mounted) and anything else speaks of a step, nothing starts in that folder.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from pretrain.engine.checkpoint.files import list_checkpoints
from pretrain.engine.control.control import STATUS_FILE, read_status

RECIPE_FILE, STARTS_FILE, METRICS_FILE = "recipe.yaml", "starts.jsonl", "metrics.jsonl"


class RunDirError(RuntimeError):
    """The run directory does not fit what was asked; the message says what to do."""


def check_new(run_dir: Path) -> None:
    """Refuse to start a new run in a folder that already holds one.

    Raises:
        RunDirError: with what is there and what to do.
    """
    if list_checkpoints(run_dir / "checkpoints"):
        raise RunDirError(
            f"{run_dir} already holds a run with checkpoints: continue it with "
            f"`--resume {run_dir}` (or start with --start-or-resume, which does so by itself), or "
            "choose another run_dir"
        )
    check_not_lost(run_dir)


def check_resumable(run_dir: Path) -> Path:
    """Path of the resolved recipe of an existing run.

    Raises:
        RunDirError: there is no run, or its checkpoints are gone.
    """
    path = run_dir / RECIPE_FILE
    if not path.is_file():
        raise RunDirError(f"{run_dir} is not a run directory: it has no {RECIPE_FILE}")
    check_not_lost(run_dir)
    return path


def holds_run(run_dir: Path) -> bool:
    """Whether `--start-or-resume` has something to go on with.

    Raises:
        RunDirError: there was something, and its checkpoints are gone.
    """
    if list_checkpoints(run_dir / "checkpoints"):
        check_resumable(run_dir)  # checkpoints without a recipe: no new run over them
        return True
    check_not_lost(run_dir)
    return (run_dir / RECIPE_FILE).is_file()


def check_not_lost(run_dir: Path) -> None:
    """Refuse a folder whose records speak of steps that no checkpoint is there for.

    A run that ended before its first checkpoint has nothing to lose, and may start again: its
    status says that none was written, and no other record contradicts it.

    Raises:
        RunDirError: naming every record and where checkpoints were looked for.
    """
    root = run_dir / "checkpoints"
    if list_checkpoints(root):
        return
    found = dict(_records(run_dir))
    logged = found.pop(METRICS_FILE, 0)
    status = read_status(run_dir)
    # Steps are logged before the checkpoint that they lead to, which is written every so many.
    never_saved = status.get("step") == 0 and logged <= _first_checkpoint_by(run_dir)
    if logged and not never_saved:
        found[METRICS_FILE] = logged
    if not found:
        return
    told = ", ".join(f"{run_dir / name} (step {step})" for name, step in found.items())
    raise RunDirError(
        f"{run_dir} held a run with steps taken: {told}; but no checkpoint is there: looked for "
        f"{root}/step_*. Bring the checkpoints back (or mount their disk), or start in another "
        "run_dir; to give this run up, delete the folder. Nothing was changed"
    )


def _records(run_dir: Path) -> Iterator[tuple[str, int]]:
    """(file, step) of every record that speaks of a step above 0."""
    status = read_status(run_dir).get("step", 0)
    if isinstance(status, int) and status > 0:
        yield f"control/{STATUS_FILE}", status
    latest = run_dir / "checkpoints" / "latest"
    if latest.is_file():
        digits = latest.read_text(encoding="utf-8", errors="replace").strip()[len("step_") :]
        yield "checkpoints/latest", int(digits) if digits.isdecimal() else 0
    for name, key in ((STARTS_FILE, "from_step"), (METRICS_FILE, "step")):
        if step := _last_step(run_dir / name, key):
            yield name, step


def _last_step(path: Path, key: str) -> int:
    """The highest step in a file of JSON lines; 0 if there is none."""
    highest = 0
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    highest = max(highest, int(json.loads(line)[key]))
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a crash has cut
    return highest


def _first_checkpoint_by(run_dir: Path) -> int:
    """The step by which a run has its first checkpoint; 0 if its recipe does not say.

    One that is written while training goes on may be there as late as when the second is due.
    """
    import yaml

    try:
        recipe = yaml.safe_load((run_dir / RECIPE_FILE).read_text(encoding="utf-8"))
        settings = recipe["checkpoint"]
        return int(settings["every_steps"]) * (2 if settings.get("asynchronous") else 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return 0
