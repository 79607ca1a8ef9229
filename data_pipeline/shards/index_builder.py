"""Build the index of a shard: while it is written, or by one pass over its bytes."""

import os
import zlib
from array import array
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from data_pipeline.shards import bundles
from data_pipeline.shards.columns import SOURCES, ColumnBuilder
from data_pipeline.shards.index import ARRAYS, ShardIndex, split_name
from data_pipeline.shards.index_file import with_digest
from data_pipeline.shards.tar import Member, iter_members
from data_pipeline.storage.errors import ShardError

# Larger members give no columns: captions and numbers are small; others would fill the memory.
_LARGEST_RECORD = 16 << 20
_PLACE = ("member_offset", "member_size", "member_crc32", "member_header_crc32")
_CHUNK = 1 << 20


class IndexBuilder:
    """Collects the members of one shard, in tar order, and turns them into a ShardIndex."""

    def __init__(self, shard: str) -> None:
        """`shard` names the shard in messages."""
        self._shard = shard
        self._arrays = {
            name: array({np.uint8: "B", np.uint32: "I", np.uint64: "Q"}[dtype])
            for name, dtype in ARRAYS.items()
        }
        self._extension_numbers: dict[str, int] = {}
        self._columns = ColumnBuilder()
        self._passed_over = 0
        self._bundled: bool | None = None
        self._key: str | None = None
        self._sample_extensions: set[str] = set()
        self._seen: dict[str, set[str]] = {}

    def add(self, member: Member, crc32: int, payload: bytes | None) -> None:
        """Append one member; `payload` is needed for extensions that `wants_payload` names.

        A bundle is no member of a sample: the samples inside of it are appended.

        Errors: ShardError if the sample has this extension twice, or lies in two places, or if a
        bundle is damaged or has plain members beside it.
        """
        split = split_name(member.name)
        if split is None:
            self._passed_over += 1
            return
        key, extension = split
        start = b"" if payload is None else payload[: bundles.START_BYTES]
        bundled = bundles.is_bundle(extension, start)
        if self._bundled not in (None, bundled):
            raise ShardError(
                f"{self._shard}: byte {member.begin}: {member.name!r}: a shard holds either "
                "bundles or plain members: repack it with `python -m tools.shards repack`"
            )
        self._bundled = bundled
        if bundled:
            self._add_bundle(member, payload)
            return
        if key != self._key:
            self._start_sample(key, member.begin)
        if extension in self._sample_extensions:
            raise ShardError(f"{self._shard}: byte {member.begin}: {member.name!r} appears twice")
        place = member.offset, member.size, crc32, member.header_crc32
        self._add_member(extension, place, member.end, payload)

    def finish(self, shard_bytes: int, payloads_hashed: bool = True) -> ShardIndex:
        """Return the index of the finished shard of `shard_bytes` bytes."""
        self._check_not_split()
        arrays = {
            name: np.frombuffer(self._arrays[name], dtype)
            if len(self._arrays[name])
            else np.empty(0, dtype)
            for name, dtype in ARRAYS.items()
        }
        columns, dropped, derived = self._columns.finish(len(arrays["key_end"]))
        return with_digest(
            shard_bytes=shard_bytes,
            extensions=tuple(self._extension_numbers),
            arrays=arrays,
            columns=columns,
            passed_over=self._passed_over,
            dropped_columns=dropped,
            bundled=bool(self._bundled),
            derived=derived,
            payloads_hashed=payloads_hashed or bool(self._bundled),  # a bundle has its own crc32
        )

    def _add_bundle(self, member: Member, payload: bytes) -> None:
        place = f"{self._shard}: byte {member.begin}"
        for sample in bundles.iter_samples(payload, place):
            self._start_sample(sample.key, member.offset + sample.begin)
            for extension, offset, size, crc32 in sample.members:
                begin = member.offset + offset
                self._add_member(
                    extension,
                    (begin, size, crc32, sample.line_crc32),
                    begin + size,
                    payload[offset : offset + size],
                )

    def _add_member(
        self, extension: str, place: tuple[int, int, int, int], end: int, payload: bytes | None
    ) -> None:
        """Append to the sample in work; place: offset, size, crc32, crc32 of the header."""
        arrays = self._arrays
        self._sample_extensions.add(extension)
        number = self._extension_numbers.setdefault(extension, len(self._extension_numbers))
        arrays["member_extension"].append(number)
        for name, value in zip(_PLACE, place, strict=True):
            arrays[name].append(value)
        arrays["member_end"][-1] += 1
        arrays["sample_end"][-1] = end
        if payload is not None and extension in SOURCES:
            self._columns.add(len(arrays["key_end"]) - 1, extension, payload)

    def _start_sample(self, key: str, begin: int) -> None:
        self._check_not_split()
        arrays = self._arrays
        self._key, self._sample_extensions = key, set()
        arrays["keys"].frombytes(key.encode())
        arrays["key_end"].append(len(arrays["keys"]))
        arrays["sample_begin"].append(begin)
        arrays["sample_end"].append(begin)
        arrays["member_end"].append(arrays["member_end"][-1] if arrays["member_end"] else 0)

    def _check_not_split(self) -> None:
        """Refuse a key whose members lie apart: other readers would see two half samples.

        The same key with the same extensions again is a second sample, as webdataset has it.
        """
        if self._key is None:
            return
        before = self._seen.setdefault(self._key, self._sample_extensions)
        if before is not self._sample_extensions and not before & self._sample_extensions:
            raise ShardError(
                f"{self._shard}: byte {self._arrays['sample_begin'][-1]}: the members of sample "
                f"{self._key!r} are not beside each other ({sorted(before)} and "
                f"{sorted(self._sample_extensions)}): repack it, e.g. with `tar --sort=name`"
            )


def wants_payload(extension: str, size: int) -> bool:
    """Return whether the builder reads numbers or samples from members like this; size in bytes."""
    if extension == bundles.EXTENSION:
        return size <= bundles.MAX_BYTES
    return extension in SOURCES and size <= _LARGEST_RECORD


def build_index(
    tar_path: str | os.PathLike[str], progress: Callable[[int], None] | None = None
) -> ShardIndex:
    """Index a shard by one pass over all its bytes.

    Args: progress: called with the number of bytes passed since its last call.
    Errors: OSError if it cannot be read; ShardError naming shard and byte if it is damaged, holds
    links, devices or unsafe names, or if members of a sample lie apart.
    """
    shard = os.fspath(tar_path)
    with open(shard, "rb", buffering=_CHUNK) as file:
        return index_file(file, shard, os.fstat(file.fileno()).st_size, progress)


def index_file(
    file: BinaryIO,
    shard: str,
    total: int,
    progress: Callable[[int], None] | None = None,
    headers_only: bool = False,
) -> ShardIndex:
    """Index an open shard of `total` bytes that stands at its begin; `shard` names it in messages.

    Args: headers_only: pass over payloads that the builder does not want; see
    `ShardIndex.payloads_hashed`.
    Errors: as build_index.
    """
    builder = IndexBuilder(shard)
    passed = 0
    for member in iter_members(file, shard, total):
        if headers_only and not _is_wanted(member):
            builder.add(member, 0, None)
        else:
            crc32, payload = read_payload(file, member, shard)
            builder.add(member, 0 if headers_only else crc32, payload)
        if progress is not None and member.end - passed >= _CHUNK:
            progress(member.end - passed)
            passed = member.end
    if progress is not None:
        progress(total - passed)
    return builder.finish(total, payloads_hashed=not headers_only)


def _is_wanted(member: Member) -> bool:
    split = split_name(member.name)
    if split is None:
        return False
    # A bundle that is too large is read as far as it takes to say so.
    return split[1] == bundles.EXTENSION or wants_payload(split[1], member.size)


def read_payload(file: BinaryIO, member: Member, shard: str) -> tuple[int, bytes | None]:
    """Return the crc32 of a payload, and the payload itself if the builder wants it.

    file: stands at the payload.
    """
    split = split_name(member.name)
    extension = split[1] if split is not None else ""
    keep = wants_payload(extension, member.size)
    crc32, parts, left = 0, [], member.size
    while left:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            raise ShardError(f"{shard}: was truncated while being read")
        if left == member.size and bundles.is_bundle(extension, chunk) and not keep:
            raise ShardError(
                f"{shard}: byte {member.begin}: a bundle of {member.size} bytes is refused: at "
                f"most {bundles.MAX_BYTES}"
            )
        crc32 = zlib.crc32(chunk, crc32)
        left -= len(chunk)
        if keep:
            parts.append(chunk)
    return crc32, b"".join(parts) if keep else None
