"""One shard, here or on a server: its size, its index, every byte of it."""

import os
from pathlib import Path
from typing import NamedTuple

from data_pipeline.shards.index import SUFFIX, ShardIndex
from data_pipeline.shards.index_builder import build_index
from data_pipeline.shards.index_file import save_index
from data_pipeline.shards.manifest import ShardRecord
from data_pipeline.shards.names import Catalogue
from data_pipeline.shards.remote_file import RemoteFile
from data_pipeline.shards.remote_index import foreign_index, remote_index
from data_pipeline.shards.shard_set import Progress, load_or_build_index, stored_index
from data_pipeline.shards.verify import Report, verify_file, verify_shard
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.locations import base_name, is_url, without_secrets
from data_pipeline.storage.remote import UrlStorage
from data_pipeline.storage.storage import FileState, TransientReadError


class IndexJob(NamedTuple):
    """How shards are indexed."""

    storage: UrlStorage
    force: bool
    full: bool
    """Remote ones by one pass over all bytes, not by their headers."""
    out: str | None
    """Folder that gets a copy of each index."""


class VerifyJob(NamedTuple):
    """What shards are compared with."""

    storage: UrlStorage
    records: dict[str, ShardRecord]


def records_of(paths: list[str], storage: UrlStorage) -> dict[str, ShardRecord]:
    """What manifests say of shards, by path; those without a record are left out."""
    catalogue = Catalogue(storage)
    found = {path: catalogue.record(path) for path in paths}
    return {path: record for path, record in found.items() if record is not None}


def size_of(path: str, storage: UrlStorage) -> int:
    """Bytes of a shard; 0 if they cannot be told."""
    try:
        return storage.state(path).size if is_url(path) else os.path.getsize(path)
    except (OSError, ShardError, TransientReadError):
        return 0


def index_one(path: str, job: IndexJob, progress: Progress | None) -> int | str:
    """Index a shard; return the number of samples, or what is wrong."""
    try:
        if is_url(path):
            index, _ = foreign_index(
                path, job.storage, full=job.full, force=job.force, progress=progress
            )
        else:
            index = load_or_build_index(path, force=job.force, progress=progress)
        if job.out is not None:
            save_index(index, Path(job.out) / (base_name(path) + SUFFIX))
    except (ShardError, OSError, TransientReadError) as error:
        return _with_path(path, error)
    return len(index)


def verify_one(path: str, job: VerifyJob, progress: Progress | None) -> tuple[list[str], int, int]:
    """Return (faults, number of damaged samples, number of samples) of a shard."""
    record, label = job.records.get(path), without_secrets(path)
    try:
        if is_url(path):
            index, report = _verify_remote(path, job.storage, progress)
        else:
            # Without an index there are no checksums to compare, but the structure can be checked.
            index = stored_index(path) or build_index(path)
            report = verify_shard(path, index, progress)
    except (ShardError, OSError, TransientReadError) as error:
        return [_with_path(path, error)], 0, record.samples if record else 0
    faults = list(report.faults)
    if record is not None and index.digest != record.index_digest:
        faults.append(f"{label}: its index is not the one of the manifest: swapped or replaced")
    faults += [f"{label}: sample {key!r}: {fault}" for key, fault in report.damaged.items()]
    if record is not None and report.sha256 != record.sha256 and not faults:
        faults.append(
            f"{label}: its sha256 is not that of the manifest, though all samples are whole: bytes "
            "between or behind the members differ"
        )
    return faults, len(report.damaged), len(index)


def _verify_remote(
    url: str, storage: UrlStorage, progress: Progress | None
) -> tuple[ShardIndex, Report]:
    """Read a remote shard as it is now and compare it with the index that lies beside it."""
    state: FileState = storage.state(url)
    index = remote_index(url, state, storage, full=True)
    file = RemoteFile(storage, url, state)
    return index, verify_file(file, without_secrets(url), state.size, index, progress)


def _with_path(path: str, error: Exception) -> str:
    label = without_secrets(path)
    return str(error) if label in str(error) else f"{label}: {error}"
