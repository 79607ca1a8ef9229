"""What a finished run hands on by itself: the formats that its recipe names."""

import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path

from pretrain.engine.control.control import read_status
from pretrain.engine.control.ownership import HEARTBEAT_FILE
from pretrain.recipe.recipe import Recipe

log = logging.getLogger("omnipretrain.train")

FOLDER = "exports"
_BEAT_S = 2.0  # between two signs of life
# Formats that are one file; the others are folders.
_SUFFIXES = {
    "safetensors": ".safetensors",
    "uniformerv2": ".pth",
    "internimage": ".pth",
    "mmdet": ".pth",
    "bevformer": ".pth",
    "m3i-raw": ".pth",
    "onnx": ".onnx",
    "torch": ".pt2",
}


def export_finished(recipe: Recipe) -> None:
    """Write RUN/exports/step_N/FORMAT, for each in `recipe.export`, from the last checkpoint.

    On rank 0, after the run has ended; nothing is written of a run that was stopped. Each is the
    command that a person would type, in a process of its own. What it says goes to
    `logs/export_FORMAT.txt`; one that fails is said in a line and changes nothing else, the exit
    code of the run least of all.
    """
    run_dir = Path(recipe.run_dir)
    status = read_status(run_dir)
    if not recipe.export or status.get("state") != "finished":
        return
    folder = run_dir / FOLDER / f"step_{status['step']:09d}"
    for name in recipe.export:
        out = folder / f"{name}{_SUFFIXES.get(name, '')}"
        if out.exists():  # of an earlier start of the finished run
            continue
        log.info("exporting to %s", out)
        words = ["export", "--run", str(run_dir), "--to", name, "--out", str(out)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            code, last = _run(run_dir, words, run_dir / "logs" / f"export_{name}.txt")
        except OSError as error:
            code, last = 1, str(error)
        if code == 0:
            log.info("exported: %s", out)
        else:
            log.warning(
                "no export to %s (%s); the run is whole, and `python -m tools.convert %s` does it "
                "again",
                name,
                last,
                " ".join(words),
            )


def _run(run_dir: Path, words: list[str], said: Path) -> tuple[int, str]:
    """Exit code and last line of `tools.convert`; the run shows signs of life all the while, or its
    supervisor would take it for one that hangs."""
    # The new process is none of the launcher's ranks.
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    with said.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.convert", *words],
            env={name: value for name, value in os.environ.items() if name not in ours},
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_BEAT_S)
            with contextlib.suppress(OSError):
                (run_dir / "control" / HEARTBEAT_FILE).touch()
    lines = said.read_text("utf-8", "replace").split("\n")
    return process.returncode, next((one.strip() for one in reversed(lines) if one.strip()), "")
