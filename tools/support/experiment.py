"""Runs of an experiment, one process each: which have finished, what came out, tables of it.

What `compare_tasks` and `compare_mixers` have in common: a plan of runs, each with a recipe and its
overrides, that go on where the command was stopped, and a row of the table for each way.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Run:
    """One training of an experiment."""

    way: str
    """What is compared; runs that differ in their seed alone share it."""
    recipe: str
    """A file or the name of a shipped recipe."""
    overrides: Sequence[str]
    """`key.path=value`, `run_dir` among them."""


Plan = dict[Path, Run]
"""Run directory -> run."""


def slug(text: str) -> str:
    """A name for a folder."""
    return "_".join("".join(c if c.isalnum() or c in ".-" else " " for c in text).split())


# ---- running -------------------------------------------------------------------------------------


def train(runs: Plan, jobs: int, console: Console) -> list[str]:
    """Train what has not finished yet, `jobs` runs at a time; names of the runs that failed."""
    waiting = [folder for folder in runs if not evaluations(folder)]
    failed = []
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar, ThreadPoolExecutor(jobs) as pool:
        task = bar.add_task("", total=len(runs), completed=len(runs) - len(waiting))
        codes = pool.map(lambda folder: train_one(folder, runs[folder]), waiting)
        for folder, code in zip(waiting, codes, strict=True):
            bar.advance(task)
            if code:
                failed.append(folder.name)
    return failed


def train_one(folder: Path, run: Run) -> int:
    """One training in one process of one thread; its output goes to a file beside its folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    goes_on = (folder / "checkpoints" / "latest").exists()
    what = ["--resume", str(folder)] if goes_on else [run.recipe, *run.overrides]
    command = [sys.executable, "-m", "pretrain.train", *what]
    with open(folder.with_name(f"{folder.name}.log"), "w", encoding="utf-8") as log:
        return subprocess.run(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ).returncode


# ---- results -------------------------------------------------------------------------------------


def metrics(folder: Path) -> list[dict]:
    """The lines that a run has logged, in order; none if there is no such run."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []


def evaluations(folder: Path) -> dict[str, dict]:
    """task -> its last evaluation, once the run has finished; else nothing."""
    try:
        status = json.loads((folder / "control" / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if status.get("state") != "finished":
        return {}
    return {row["task"]: row for row in metrics(folder) if row["kind"] == "evaluation"}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column has no title."""
    lines = ["| | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def describe(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"
