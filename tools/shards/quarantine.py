"""`python -m tools.shards quarantine`: the samples that a run leaves out.

    python -m tools.shards quarantine RUN
    python -m tools.shards quarantine RUN --release 000000000785 train-000003.tar
    python -m tools.shards quarantine RUN --exclude 000000000785 --task caption

The run takes changes in at its next planned checkpoint; they hold from the next epoch on.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.order.sources import concatenated, open_sources
from pretrain.engine.quarantine_files import Edit, Listed, append_edits, read_edits, read_list
from pretrain.engine.run_record import RunDirError, check_resumable
from pretrain.recipe.load import load_resolved
from tools.shards.find_sample import row_of


def add_command(commands: Any, text: str) -> None:
    """Add `quarantine` to the sub-commands of tools.shards; `text` says what it does."""
    parser = commands.add_parser("quarantine", help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("run_dir", metavar="RUN", help="folder of the run")
    parser.add_argument("--task", help="this task only; needed to exclude if there are several")
    parser.add_argument(
        "--release",
        nargs="+",
        default=[],
        metavar="KEY|ROW|SHARD",
        help="samples that shall take part again from the next epoch on",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="KEY|ROW",
        help="samples that shall take part no more from the next epoch on",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    try:
        return _run(options)
    except RunDirError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    run_dir = Path(options.run_dir)
    recipe_path = check_resumable(run_dir)
    every = [*read_list(run_dir), *_not_taken_in(run_dir)]
    listed = [entry for entry in every if options.task in (None, entry.task)]
    edits = [*_released(listed, options.release)]
    if options.exclude:
        edits += _excluded(recipe_path, options.task, options.exclude)
    if edits:
        append_edits(run_dir, edits)
        print(f"{len(edits)} changes noted for the next planned checkpoint of the run")
        return 0
    for entry in listed:
        since = "not yet" if entry.from_position is None else f"from sample {entry.from_position}"
        print(
            f"{entry.task}, {since}: {entry.shard}, key {entry.key!r}, row {entry.row}: "
            f"{entry.reason}"
        )
    print(f"{len(listed)} samples; {len(read_edits(run_dir))} changes by hand since the run began")
    return 0


def _not_taken_in(run_dir: Path) -> Iterator[Listed]:
    """What was excluded by hand, and is not on the run's list yet."""
    known = {(entry.task, entry.row) for entry in read_list(run_dir)}
    last = {(edit.task, edit.row): edit for edit in read_edits(run_dir)}
    for place, edit in last.items():
        if edit.exclude and place not in known:
            yield Listed(*edit[:4], "excluded by hand", None)


def _released(listed: list[Listed], wanted: list[str]) -> Iterator[Edit]:
    for what in wanted:
        found = [
            entry
            for entry in listed
            if what in (entry.key, str(entry.row), entry.shard, os.path.basename(entry.shard))
        ]
        if not found:
            raise RunDirError(f"{what!r} is no key, row or shard of a sample that is left out")
        for entry in found:
            yield Edit(entry.task, entry.shard, entry.key, entry.row, False)


def _excluded(recipe_path: Path, task: str | None, wanted: list[str]) -> Iterator[Edit]:
    recipe = load_resolved(recipe_path)
    if task is None and len(recipe.tasks) > 1:
        raise RunDirError(f"--task is needed: one of {', '.join(recipe.tasks)}")
    task = task or next(iter(recipe.tasks))
    if task not in recipe.tasks:
        raise RunDirError(f"the run has no task {task!r}, only {', '.join(recipe.tasks)}")
    shards = concatenated(open_sources(recipe.tasks[task].data, recipe.loader.remote))
    for what in wanted:
        row = row_of(shards, what)
        number, local = shards.locate(row)
        shard = shards.shards[number].label
        yield Edit(task, shard, shards.index(number).key(local), row, True)
