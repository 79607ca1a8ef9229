"""Check every byte of a shard against its index."""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import BinaryIO

from data_pipeline.shards import bundles
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.tar import iter_members
from data_pipeline.storage.errors import ShardError

_CHUNK = 1 << 20


@dataclass
class Report:
    """What verify_shard found."""

    path: str
    samples: int
    bytes: int
    sha256: str
    """Of the file as it is."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Key of each damaged sample -> its first fault."""
    faults: list[str] = field(default_factory=list)
    """Faults of the file as a whole: its size, its headers, its end."""

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damaged and not self.faults


def verify_shard(
    path: str, index: ShardIndex, progress: Callable[[int], None] | None = None
) -> Report:
    """Compare all headers and payloads of a shard with its index; lists all faults, not the first.

    Args: progress: called with the number of bytes passed since its last call.
    Errors: OSError if the shard cannot be read. Damage is no error here; it is what is reported.
    """
    with open(path, "rb", buffering=_CHUNK) as file:
        return verify_file(file, path, os.fstat(file.fileno()).st_size, index, progress)


def verify_file(
    file: BinaryIO,
    path: str,
    total: int,
    index: ShardIndex,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """As verify_shard, for an open file of `total` bytes that stands at its begin; `path` names it.

    An index of headers alone does not know the payloads: they are not compared then.
    """
    hashed = _HashedFile(file, progress)
    report = Report(path, len(index), total, "")
    try:
        index.check_shard_size(path, total)
    except ShardError as error:
        report.faults.append(str(error))
    for row in range(len(index)):
        fault = _first_fault(hashed, index, row, total)
        if fault is not None:
            key = index.key(row)
            # The same key may stand for two samples; keep both in the report.
            report.damaged[key if key not in report.damaged else f"{key} (row {row})"] = fault
    hashed.pass_to(total)
    report.sha256 = hashed.digest.hexdigest()
    _check_structure(file, index, report)
    return report


class _HashedFile:
    """Sequential reading that hashes all bytes on the way."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], None] | None) -> None:
        self.digest = sha256()
        self._file = file
        self._position = 0
        self._progress = progress

    def crc32(self, size: int) -> int:
        """Return the crc32 of the next `size` bytes, or of those that are left in the file."""
        value = 0
        while size > 0 and (chunk := self._file.read(min(size, _CHUNK))):
            self.digest.update(chunk)
            value = zlib.crc32(chunk, value)
            size -= len(chunk)
            self._position += len(chunk)
            if self._progress is not None:
                self._progress(len(chunk))
        return value

    def pass_to(self, position: int) -> None:
        """Hash everything up to `position`."""
        self.crc32(position - self._position)


def _first_fault(file: _HashedFile, index: ShardIndex, row: int, total: int) -> str | None:
    fault = None
    header = 0
    for number, (extension, offset, size, crc32, header_crc32) in enumerate(index.members(row)):
        begin, end = index.header_span(row, offset)
        if number == 0 or not index.bundled:  # the members of a bundled sample share a line
            file.pass_to(min(begin, total))
            header = file.crc32(end - begin)
        payload = file.crc32(size)
        if fault is not None:
            continue  # the rest is read for the hash only
        if offset + size > total:
            fault = f"member .{extension}: cut, the file ends at byte {total}"
        elif header != header_crc32:
            what = "line in its bundle" if index.bundled else "tar header"
            fault = f"member .{extension}: damaged {what} at byte {begin}"
        elif index.payloads_hashed and payload != crc32:
            fault = f"member .{extension}: damaged payload ({size} bytes at byte {offset})"
    return fault


def _check_structure(file: BinaryIO, index: ShardIndex, report: Report) -> None:
    """Walk the headers as any tar reader does: what the index skips must be sound as well."""
    if index.bundled:
        _check_bundles(file, index, report)
        return
    offsets = set(index.arrays["member_offset"].tolist())
    others = 0
    try:
        file.seek(0)
        for member in iter_members(file, report.path, report.bytes):
            if member.offset in offsets:
                offsets.remove(member.offset)
            else:
                others += 1
    except ShardError as error:
        report.faults.append(str(error))
        return
    if offsets or others != index.passed_over:
        report.faults.append(
            f"{report.path}: {len(offsets)} members of its index are not in the tar, and "
            f"{others - index.passed_over} members of the tar are not in its index"
        )


def _check_bundles(file: BinaryIO, index: ShardIndex, report: Report) -> None:
    """Walk the tar headers and the first line of each bundle: samples must fill it to the end."""
    begins, ends = (index.arrays[f"sample_{side}"].tolist() for side in ("begin", "end"))
    row, others = 0, 0
    try:
        file.seek(0)
        for member in iter_members(file, report.path, report.bytes):
            start = file.read(min(member.size, bundles.LONGEST_HEAD))
            if not bundles.is_bundle(bundles.EXTENSION, start):
                others += 1
                continue
            head, samples = bundles.read_head(start, report.path)
            at, behind = member.offset + head, row + samples
            while row < min(behind, len(begins)) and begins[row] == at:
                at = ends[row]
                row += 1
            if row != behind or at != member.offset + member.size:
                raise ShardError(
                    f"{report.path}: byte {at}: bundle {member.name!r} is not what its index says"
                )
    except ShardError as error:
        report.faults.append(str(error))
        return
    if row != len(begins) or others != index.passed_over:
        report.faults.append(
            f"{report.path}: {len(begins) - row} samples of its index are not in the tar, and "
            f"{others - index.passed_over} members of the tar are not in its index"
        )
