"""Pack a list of items into shards: parallel, resumable, and byte-identical however it went.

A shard is a function of its slice of the item list alone. So several processes may each write
whole shards, a killed job continues with the shards that are missing, and neither changes a byte.
"""

import concurrent.futures
import concurrent.futures.process
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from data_pipeline.files import TEMPORARY_SUFFIX, exclusive, write_atomically
from data_pipeline.shards.index import index_path
from data_pipeline.shards.index_file import load_index
from data_pipeline.shards.manifest import FILE_NAME, PLAN_NAME, Manifest, ShardRecord
from data_pipeline.shards.packer import (
    END_OF_ARCHIVE,
    ShardFile,
    WrittenShard,
    check_sample,
    make_manifest,
    shard_name,
)
from data_pipeline.shards.verify import verify_shard
from data_pipeline.storage.errors import ShardError

Build = Callable[[Any], Mapping[str, bytes]]
Progress = Callable[[int], None]

_REPORT_EVERY_SAMPLES = 16
_log = logging.getLogger("omnipretrain.data")


class SampleFault(ValueError):
    """An item that cannot become a sample. The message names the item, its origin and the fault."""


@dataclass(frozen=True)
class PackJob:
    """What is packed. All but `folder` and what follows `details`
    determines the bytes of the result."""

    folder: Path
    prefix: str
    keys: Sequence[str]
    items: Sequence[Any]
    """One per key, in storage order; anything with a `repr` that tells its whole content."""
    ranges: Sequence[tuple[int, int]]
    """First and behind-last item of each shard, see plan_ranges."""
    build: Build
    """Makes the members of a sample from an item; picklable. It raises SampleFault."""
    skip_faults: bool = False
    """Leave items with a SampleFault out, and count them, instead of stopping."""
    bundle: int = 1
    """Samples per bundle, see bundles.py; 1: members lie plainly in the tar."""
    licence: str = ""
    command: str = ""
    classes: list[str] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    account: Mapping[str, Any] = field(default_factory=dict)
    """As `details`, of what does not change the bytes: how many rows were read, what was passed
    over."""
    missing: Sequence[str] = ()
    """A line for each thing that was asked for and is not among the items."""
    scratch: Sequence[Path] = ()
    """Files that only this packing needs; removed when it is finished."""

    def digest(self) -> str:
        """sha256 over the plan: equal if a rerun would write the same bytes.

        Whether faults are skipped does not count: shards without any are the same either way, so
        that a packing that a fault has stopped may go on with skip_faults.
        """
        plan: list[Any] = [self.prefix, list(self.ranges), dict(self.details), self.classes]
        if self.bundle > 1:
            plan.append(self.bundle)
        digest = sha256(json.dumps(plan).encode())
        digest.update(repr(self.build).encode())
        for key, item in zip(self.keys, self.items, strict=True):
            digest.update(f"\n{key}\0{item!r}".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class PackResult:
    """What pack did."""

    manifest: Manifest
    skipped: list[str]
    """Keys of the items that were left out, in storage order."""
    reused_shards: int
    """Shards that an earlier run had finished."""


@dataclass(frozen=True)
class _Task:
    path: Path
    keys: Sequence[str]
    items: Sequence[Any]
    build: Build
    skip_faults: bool
    bundle: int


def plan_ranges(
    sizes: Iterable[int], max_samples: int, max_bytes: int | None = None
) -> list[tuple[int, int]]:
    """Cut items into consecutive shards of at most max_samples and max_bytes.

    Args: sizes: bytes that each sample takes in a tar at most, see packer.sample_bytes. A sample
    larger than max_bytes gets a shard of its own.
    """
    if max_samples < 1 or (max_bytes is not None and max_bytes < 1):
        raise ValueError(f"max_samples {max_samples}, max_bytes {max_bytes}: must be positive")
    ranges: list[tuple[int, int]] = []
    begin, total, end = 0, len(END_OF_ARCHIVE), 0
    for number, size in enumerate(sizes):
        full = number - begin == max_samples
        if max_bytes is not None and number > begin and total + size > max_bytes:
            full = True
        if full:
            ranges.append((begin, number))
            begin, total = number, len(END_OF_ARCHIVE)
        total += size
        end = number + 1
    if end > begin:
        ranges.append((begin, end))
    return ranges


def pack(job: PackJob, *, processes: int = 1, progress: Progress | None = None) -> PackResult:
    """Write all shards of a job, their indices and the manifest; continue what was begun before.

    Shards of an earlier run are kept if they are whole, checked byte by byte; others are written
    again. Until the manifest stands, `packing.json` marks the folder as unfinished.

    Args: processes: worker processes, each writing whole shards; progress: called with numbers of
    finished samples.
    Errors: SampleFault (unless skip_faults); FileExistsError if the folder holds other shards, or
    another process packs into it; ValueError for bad or repeated keys; OSError, of which a worker
    process that was killed is one.
    """
    _check_keys(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    plan = job.digest()
    try:
        with exclusive(job.folder / PLAN_NAME, wait=False):
            _claim_folder(job, plan)
            tasks = [
                _Task(
                    job.folder / shard_name(job.prefix, number),
                    job.keys[begin:end],
                    job.items[begin:end],
                    job.build,
                    job.skip_faults,
                    job.bundle,
                )
                for number, (begin, end) in enumerate(job.ranges)
            ]
            done = _run(tasks, processes, progress or (lambda count: None))
            return _finish(job, plan, done)
    except BlockingIOError:
        raise FileExistsError(f"{job.folder}: another process is packing into it") from None


def _check_keys(job: PackJob) -> None:
    if not len(job.items):
        raise ValueError("nothing to pack")
    seen = set()
    for key in job.keys:
        check_sample(key, {"json": b""})
        if key in seen:
            raise ValueError(f"the key {key!r} stands for two items; keys must be unique")
        seen.add(key)


def _claim_folder(job: PackJob, plan: str) -> None:
    """Make sure that what the folder holds is of the same job, and remove broken-off files."""
    begun = (job.folder / FILE_NAME).exists() or any(job.folder.glob("*.tar"))
    if not begun:  # at most a plan whose first shard was never finished
        text = json.dumps({"plan": plan, "command": job.command}, indent=1) + "\n"
        write_atomically(job.folder / PLAN_NAME, [text.encode()])
    elif _plan_of(job.folder) != plan:
        raise FileExistsError(
            f"{job.folder}: holds shards of another packing (other input, seed or options): pack "
            "into an empty folder, or remove this one"
        )
    with os.scandir(job.folder) as entries:
        broken = [e.path for e in entries if e.name.endswith(TEMPORARY_SUFFIX)]
    for path in broken:
        os.unlink(path)


def _plan_of(folder: Path) -> str | None:
    """Return the plan digest of what was packed into a folder; None if it cannot be told."""
    for name in (FILE_NAME, PLAN_NAME):
        try:
            content = json.loads((folder / name).read_bytes())
            return content.get("details", content).get("plan")
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError):
            return None  # not our file
    return None


def _finish(job: PackJob, plan: str, done: list[tuple[WrittenShard, bool]]) -> PackResult:
    skipped = []
    for (begin, end), (written, _) in zip(job.ranges, done, strict=True):
        packed = set(written.index.keys())
        skipped += [key for key in job.keys[begin:end] if key not in packed]
    if len(skipped) == len(job.items):
        for written, _ in done:  # empty shards would only be in the way of the next attempt
            shard = job.folder / written.record.name
            shard.unlink(missing_ok=True)
            index_path(shard).unlink(missing_ok=True)
        (job.folder / PLAN_NAME).unlink(missing_ok=True)
        raise SampleFault(f"none of the {len(skipped)} items could be packed")
    details = {**job.details, **job.account, "left_out": len(skipped), "plan": plan}
    manifest = make_manifest(
        [written for written, _ in done],
        licence=job.licence,
        command=job.command,
        classes=job.classes,
        details=details,
    )
    manifest.save(job.folder)
    for path in [job.folder / PLAN_NAME, *job.scratch]:
        path.unlink(missing_ok=True)
    return PackResult(manifest, skipped, sum(reused for _, reused in done))


def _run(tasks: list[_Task], processes: int, progress: Progress) -> list[tuple[WrittenShard, bool]]:
    if processes == 1 or len(tasks) == 1:
        return [_pack_shard(task, progress) for task in tasks]
    # Spawned, not forked: the parent may run threads (a progress bar).
    context = multiprocessing.get_context("spawn")
    counts = context.SimpleQueue()
    executor = concurrent.futures.ProcessPoolExecutor(
        min(processes, len(tasks)), context, initializer=_start_worker, initargs=(counts,)
    )
    try:
        futures = [executor.submit(_pack_shard_in_worker, task) for task in tasks]
        waiting = set(futures)
        while waiting:
            finished, waiting = concurrent.futures.wait(
                waiting, timeout=0.1, return_when=concurrent.futures.FIRST_COMPLETED
            )
            while not counts.empty():
                progress(counts.get())
            for future in finished:
                future.result()  # raises the first error
        return [future.result() for future in futures]
    except concurrent.futures.process.BrokenProcessPool:
        raise ChildProcessError(
            "a packing process was killed, perhaps for want of memory (--processes 1 needs less); "
            "the same command continues with the shards that are missing"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


_counts: Any = None
"""Queue of a worker process to its parent for numbers of finished samples."""


def _start_worker(counts: Any) -> None:
    global _counts
    _counts = counts
    # Ctrl-C reaches all processes. As an exception it would be sent to the parent as a result, and
    # a second one, while the parent waits for its workers, would leave both waiting for ever.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _pack_shard_in_worker(task: _Task) -> tuple[WrittenShard, bool]:
    return _pack_shard(task, _counts.put)


def _pack_shard(task: _Task, progress: Progress) -> tuple[WrittenShard, bool]:
    """Return the shard, and whether an earlier run had written it."""
    existing = _existing_shard(task)
    if existing is not None:
        progress(len(task.items))
        return existing, True
    shard = ShardFile(task.path, task.bundle)
    unreported = 0
    try:
        for key, item in zip(task.keys, task.items, strict=True):
            try:
                shard.add(key, task.build(item))
            except SampleFault as fault:
                if not task.skip_faults:
                    raise
                _log.warning("left out: %s", fault)
            unreported += 1
            if unreported == _REPORT_EVERY_SAMPLES:
                progress(unreported)
                unreported = 0
        progress(unreported)
        return shard.commit(), False
    except BaseException as error:
        shard.discard()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(task.path)  # "no space left on device": on which one?
        raise


def _existing_shard(task: _Task) -> WrittenShard | None:
    """Return the shard of an earlier run if every byte and key of it is what it must be."""
    path = os.fspath(task.path)
    try:
        index = load_index(index_path(path))
        report = verify_shard(path, index)
    except FileNotFoundError:
        return None
    except ShardError as error:
        _log.warning("written again: %s", error)
        return None
    keys = index.keys()
    found = set(keys)
    # With skip_faults, items may be missing, but what is there must be in the planned order.
    expected = [key for key in task.keys if key in found or not task.skip_faults]
    if not report.intact or keys != expected:
        _log.warning("written again: %s is damaged or incomplete", path)
        return None
    record = ShardRecord(task.path.name, len(index), report.bytes, report.sha256, index.digest)
    return WrittenShard(record, index)
