"""Run packing jobs for a command line: progress, a report for people, an exit code."""

import errno
import functools
import json
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from data_pipeline.files import write_atomically
from data_pipeline.reading.reader import TransientReadError
from data_pipeline.shards.packing import PackJob, PackResult, SampleFault, pack
from data_pipeline.storage.errors import ShardError

if TYPE_CHECKING:
    from rich.console import Console

_SKIPPED_SHOWN = 10
# Details of a job that the report names otherwise, or that only the manifest needs.
_SILENT = {"seed", "missing", "inputs", "tokenizer_digest", "rows"}
LEFT_OUT_NAME = "left_out.txt"
"""File beside the shards that names each thing that was left out; absent if nothing was."""
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def run_jobs(jobs: Callable[[], Iterable[PackJob]], processes: int) -> int:
    """Pack the jobs that `jobs` returns; return 0, or 1 after an error that was printed."""
    from rich.console import Console  # `--help` does without

    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        for job in jobs():
            result = _pack_with_progress(job, processes, console)
            _account_for_all(job, result)
            _report(job, result, console)
    except (SampleFault, ShardError, OSError, ValueError, TransientReadError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        if getattr(error, "errno", None) in _DISK_FULL:
            console.print("free some space; the same command continues with the missing shards")
        return 1
    except KeyboardInterrupt:
        console.print("stopped; the same command continues with the shards that are missing")
        return 130
    return 0


def _pack_with_progress(job: PackJob, processes: int, console: "Console") -> PackResult:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("packing {task.fields[split]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("", total=len(job.items), split=job.folder.name)
        return pack(job, processes=processes, progress=functools.partial(bar.advance, task))


def _account_for_all(job: PackJob, result: PackResult) -> None:
    """Name what was left out in a file; nothing is lost without a word.

    Errors: RuntimeError if an item is neither in the shards nor named.
    """
    named = [f"{line}" for line in job.missing]
    items = dict(zip(job.keys, job.items, strict=True)) if result.skipped else {}
    for key in result.skipped:
        origin = getattr(items[key], "name", None) or getattr(items[key], "origin", "")
        named.append(f"{key}: cannot be used: {origin}".removesuffix(": "))
    packed = result.manifest.samples
    if packed + len(result.skipped) != len(job.items):
        raise RuntimeError(
            f"{job.folder}: {len(job.items)} items were to be packed, and {packed} are, with "
            f"{len(result.skipped)} left out: please report this with the command"
        )
    place = job.folder / LEFT_OUT_NAME
    if named:
        lines = (" ".join(line.split()) + "\n" for line in named)
        write_atomically(place, [line.encode("utf-8", "backslashreplace") for line in lines])
    else:
        place.unlink(missing_ok=True)


def _report(job: PackJob, result: PackResult, console: "Console") -> None:
    manifest = result.manifest
    text = (
        f"{job.folder}: {manifest.samples:,} samples in {len(manifest.shards)} shards, "
        f"{manifest.bytes / 1e6:,.1f} MB"
    )
    if result.reused_shards:
        text += f" ({result.reused_shards} shards kept from an earlier run)"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    left_out = len(result.skipped) + job.details.get("missing", 0)
    if left_out:
        shown = ", ".join(result.skipped[:_SKIPPED_SHOWN])
        for line in job.missing[:_SKIPPED_SHOWN]:
            console.print(f"missing: {line}", markup=False, highlight=False, soft_wrap=True)
        console.print(
            f"left out: {left_out} items ({job.details['missing']} missing, "
            f"{len(result.skipped)} unusable{': ' + shown if shown else ''}); "
            f"all of them: {job.folder / LEFT_OUT_NAME}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    for name, value in {**job.details, **job.account}.items():
        if value and name not in _SILENT:
            text = f"{name.replace('_', ' ')}: {json.dumps(value, ensure_ascii=False)}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    if not manifest.licence:
        console.print("no licence given: --licence records it in the manifest", highlight=False)
