"""The index of one shard: where each member of each sample lies, and what its bytes must hash to.

Stored as `<shard>.tar.idx`, a safetensors file (readable by any safetensors library), memory-mapped
on use. With N samples and M members in all, arrays are little-endian:

    keys                uint8  (bytes,)  UTF-8 keys, one behind the other
    key_end             uint64 (N,)      end of each key in `keys`
    sample_begin        uint64 (N,)      first byte of the sample in the tar, headers included
    sample_end          uint64 (N,)      first byte behind the sample, padding included
    member_end          uint64 (N,)      end of each sample's members in the member arrays
    member_extension    uint32 (M,)      number in the list of extensions
    member_offset       uint64 (M,)      first payload byte in the tar
    member_size         uint64 (M,)      payload bytes
    member_crc32        uint32 (M,)      of the payload; 0 if the metadata says that it is unknown
    member_header_crc32 uint32 (M,)      of the 512-byte tar header in front of the payload
    column:<name>       int64 or float64 (N,)   a number per sample

Columns are found in the samples themselves: numbers of the `json` member, `<name>.count` for its
lists, and `cls`. A float column has NaN where a sample lacks the number.
"""

import json
import os
import re
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline import array_file
from data_pipeline.files import write_atomically
from data_pipeline.index_structure import check_structure
from data_pipeline.tar_headers import Member, ShardError, iter_members

FORMAT = "omnipretrain.shard-index"
VERSION = 1
SUFFIX = ".idx"
COLUMN_PREFIX = "column:"
MAX_COLUMNS = 128
_COLUMN_SOURCES = ("json", "cls")
# Larger members give no columns: a record of numbers is small, and they would be held in memory.
_LARGEST_RECORD = 16 << 20
_CHUNK = 1 << 20

_ARRAYS = {
    "keys": np.uint8,
    "key_end": np.uint64,
    "sample_begin": np.uint64,
    "sample_end": np.uint64,
    "member_end": np.uint64,
    "member_extension": np.uint32,
    "member_offset": np.uint64,
    "member_size": np.uint64,
    "member_crc32": np.uint32,
    "member_header_crc32": np.uint32,
}
_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


def index_path(shard_path: str | os.PathLike[str]) -> Path:
    """Return where the index of a shard lies by default: beside it."""
    return Path(os.fspath(shard_path) + SUFFIX)


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member name into (key, extension), by the rule of the webdataset library.

    The key keeps its folders; the first dot of the base name splits; the extension is lower-cased.
    None for names that webdataset passes over: no dot, hidden files, `__meta__` entries. One rule
    differs: hidden files in folders (`a/.DS_Store`) are passed over too, where webdataset makes
    samples of them.
    """
    match = _NAME.fullmatch(name)
    if match is None or _META.match(name):
        return None
    return match.group(1), match.group(2).lower()


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Index of one shard; see the module docstring for the arrays."""

    shard_bytes: int
    extensions: tuple[str, ...]
    arrays: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    passed_over: int
    """Members that belong to no sample: names without a dot, hidden files, `__meta__` entries."""
    dropped_columns: int
    """Numeric columns left out because there are more than MAX_COLUMNS of them."""
    digest: str
    """sha256 over everything else: equal exactly if the samples of two shards are equal."""
    payloads_hashed: bool = True
    """False for an index of headers alone: `member_crc32` is 0 then, and what payloads hold is not
    compared with anything."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.arrays["key_end"])

    def key(self, row: int) -> str:
        """Return the key of a sample."""
        begin, end = _bounds(self.arrays["key_end"], row)
        return _text(self.arrays["keys"][begin:end].tobytes())

    def keys(self) -> list[str]:
        """Return all keys, in storage order."""
        blob = self.arrays["keys"].tobytes()
        ends = self.arrays["key_end"].tolist()
        return [_text(blob[a:b]) for a, b in zip([0, *ends], ends, strict=False)]

    def span(self, row: int) -> tuple[int, int]:
        """Return the first byte of a sample in the tar and the first one behind it."""
        return int(self.arrays["sample_begin"][row]), int(self.arrays["sample_end"][row])

    def members(self, row: int) -> list[tuple[str, int, int, int, int]]:
        """Return (extension, offset, size, crc32, header_crc32) of each member, in tar order."""
        a, b = _bounds(self.arrays["member_end"], row)
        arrays, extensions = self.arrays, self.extensions
        return [
            (extensions[number], offset, size, crc32, header_crc32)
            for number, offset, size, crc32, header_crc32 in zip(
                arrays["member_extension"][a:b].tolist(),
                arrays["member_offset"][a:b].tolist(),
                arrays["member_size"][a:b].tolist(),
                arrays["member_crc32"][a:b].tolist(),
                arrays["member_header_crc32"][a:b].tolist(),
                strict=True,
            )
        ]

    def extension_counts(self) -> dict[str, int]:
        """Return how many samples have a member of each extension."""
        counts = np.bincount(self.arrays["member_extension"], minlength=len(self.extensions))
        return dict(zip(self.extensions, counts.tolist(), strict=True))

    def check_shard_size(self, shard_path: str, size: int) -> None:
        """Raise ShardError if `size`, of the shard as it is now, is not that of the indexed one."""
        if size != self.shard_bytes:
            raise ShardError(
                f"{shard_path}: has {size} bytes, but its index describes {self.shard_bytes}: the "
                "shard was truncated or replaced. Restore it, or, if the new content is intended, "
                f"run `python -m tools.shards index --force {shard_path}`"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to `path`, atomically; the bytes depend on the content only."""
        metadata = _metadata(self) | {"digest": self.digest}
        write_atomically(Path(path), array_file.serialise(metadata, _named_arrays(self)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ShardIndex":
        """Map the index at `path` into memory and check it against its digest.

        Errors: FileNotFoundError; ShardError if the file is damaged or of another version.
        """
        try:
            index = _from_file(*array_file.load(path))
            if index.digest != _digest(index):
                raise ValueError("its digest does not match its content")
            check_structure(index, _ARRAYS)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _bad_index(path, str(error)) from None
        return index


class IndexBuilder:
    """Collects the members of one shard, in tar order, and turns them into a ShardIndex."""

    def __init__(self, shard: str) -> None:
        """`shard` names the shard in messages."""
        self._shard = shard
        self._arrays = {
            name: array({np.uint8: "B", np.uint32: "I", np.uint64: "Q"}[dtype])
            for name, dtype in _ARRAYS.items()
        }
        self._extension_numbers: dict[str, int] = {}
        self._columns = _Columns()
        self._passed_over = 0
        self._key: str | None = None
        self._sample_extensions: set[str] = set()
        self._seen: dict[str, set[str]] = {}

    def add(self, member: Member, crc32: int, payload: bytes | None) -> None:
        """Append one member; `payload` is needed for extensions that `wants_payload` names.

        Errors: ShardError if the sample has this extension twice, or lies in two places.
        """
        split = split_name(member.name)
        if split is None:
            self._passed_over += 1
            return
        key, extension = split
        arrays = self._arrays
        if key != self._key:
            self._start_sample(key, member)
        if extension in self._sample_extensions:
            raise ShardError(f"{self._shard}: byte {member.begin}: {member.name!r} appears twice")
        self._sample_extensions.add(extension)
        number = self._extension_numbers.setdefault(extension, len(self._extension_numbers))
        arrays["member_extension"].append(number)
        arrays["member_offset"].append(member.offset)
        arrays["member_size"].append(member.size)
        arrays["member_crc32"].append(crc32)
        arrays["member_header_crc32"].append(member.header_crc32)
        arrays["member_end"][-1] += 1
        arrays["sample_end"][-1] = member.end
        if payload is not None and extension in _COLUMN_SOURCES:
            self._columns.add(len(arrays["key_end"]) - 1, extension, payload)

    def finish(self, shard_bytes: int, payloads_hashed: bool = True) -> ShardIndex:
        """Return the index of the finished shard of `shard_bytes` bytes."""
        self._check_not_split()
        arrays = {
            name: np.frombuffer(self._arrays[name], dtype)
            if len(self._arrays[name])
            else np.empty(0, dtype)
            for name, dtype in _ARRAYS.items()
        }
        columns, dropped = self._columns.finish(len(arrays["key_end"]))
        index = ShardIndex(
            shard_bytes=shard_bytes,
            extensions=tuple(self._extension_numbers),
            arrays=arrays,
            columns=columns,
            passed_over=self._passed_over,
            dropped_columns=dropped,
            digest="",
            payloads_hashed=payloads_hashed,
        )
        object.__setattr__(index, "digest", _digest(index))
        return index

    def _start_sample(self, key: str, member: Member) -> None:
        self._check_not_split()
        arrays = self._arrays
        self._key, self._sample_extensions = key, set()
        arrays["keys"].frombytes(key.encode())
        arrays["key_end"].append(len(arrays["keys"]))
        arrays["sample_begin"].append(member.begin)
        arrays["sample_end"].append(member.end)
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


@dataclass(slots=True)
class _Columns:
    """Sparse numeric columns while an index is being built."""

    rows: dict[str, array] = field(default_factory=dict)
    values: dict[str, list[int | float]] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def add(self, row: int, extension: str, payload: bytes) -> None:
        try:
            content = json.loads(payload)
        except (ValueError, RecursionError):
            return  # members of other people need not be valid; an index is no place to judge
        if extension == "cls":
            content = {"cls": content}
        if not isinstance(content, dict):
            return
        for name, value in content.items():
            if isinstance(value, list):
                name, value = f"{name}.count", len(value)
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._append(name, row, value)

    def _append(self, name: str, row: int, value: int | float) -> None:
        if name not in self.rows:
            if any("\ud800" <= letter <= "\udfff" for letter in name):
                return  # half a character, which JSON can spell and UTF-8 cannot
            if len(self.rows) == MAX_COLUMNS:
                self.dropped.add(name)
                return
            self.rows[name], self.values[name] = array("Q"), []
        rows = self.rows[name]
        if not rows or rows[-1] != row:  # `cls` may also be a field of the json member
            rows.append(row)
            self.values[name].append(value)

    def finish(self, samples: int) -> tuple[dict[str, np.ndarray], int]:
        columns = {}
        for name in sorted(self.rows):
            values = self.values[name]
            whole = all(isinstance(v, int) and -(2**63) <= v < 2**63 for v in values)
            if whole and len(values) == samples:
                columns[name] = np.array(values, np.int64)
            else:
                columns[name] = np.full(samples, np.nan)
                columns[name][self.rows[name]] = [_as_float(value) for value in values]
        return columns, len(self.dropped)


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON integers have no limit
        return float("inf") if value > 0 else float("-inf")


def wants_payload(extension: str, size: int) -> bool:
    """Return whether the builder reads numbers from members of this extension and size in bytes."""
    return extension in _COLUMN_SOURCES and size <= _LARGEST_RECORD


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

    Args: headers_only: pass over payloads that give no columns; see `ShardIndex.payloads_hashed`.
    Errors: as build_index.
    """
    builder = IndexBuilder(shard)
    passed = 0
    for member in iter_members(file, shard, total):
        split = split_name(member.name)
        keep = split is not None and wants_payload(split[1], member.size)
        crc32, parts, left = 0, [], member.size if keep or not headers_only else 0
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                raise ShardError(f"{shard}: was truncated while being read")
            crc32 = zlib.crc32(chunk, crc32)
            left -= len(chunk)
            if keep:
                parts.append(chunk)
        builder.add(member, 0 if headers_only else crc32, b"".join(parts) if keep else None)
        if progress is not None and member.end - passed >= _CHUNK:
            progress(member.end - passed)
            passed = member.end
    if progress is not None:
        progress(total - passed)
    return builder.finish(total, payloads_hashed=not headers_only)


def _bounds(ends: np.ndarray, row: int) -> tuple[int, int]:
    if row == 0:
        return 0, int(ends[0])
    first, last = ends[row - 1 : row + 1].tolist()
    return first, last


def _metadata(index: ShardIndex) -> dict[str, str]:
    """Return the safetensors metadata (strings only), without the digest."""
    metadata = {
        "dropped_columns": str(index.dropped_columns),
        "extensions": json.dumps(index.extensions),
        "format": FORMAT,
        "passed_over": str(index.passed_over),
        "shard_bytes": str(index.shard_bytes),
        "version": str(VERSION),
    }
    return metadata if index.payloads_hashed else metadata | {"payload_crc32": "unknown"}


def _named_arrays(index: ShardIndex) -> dict[str, np.ndarray]:
    return index.arrays | {COLUMN_PREFIX + name: c for name, c in index.columns.items()}


def _digest(index: ShardIndex) -> str:
    digest = sha256(json.dumps(_metadata(index), sort_keys=True).encode())
    for name, values in array_file.in_file_order(_named_arrays(index)).items():
        digest.update(f"\n{name} {values.dtype.str} {len(values)}\n".encode())
        digest.update(np.ascontiguousarray(values).view(np.uint8).data)
    return digest.hexdigest()


def _from_file(metadata: dict[str, str], stored: dict[str, np.ndarray]) -> ShardIndex:
    if metadata["format"] != FORMAT or metadata["version"] != str(VERSION):
        raise ValueError(f"it is {metadata['format']} version {metadata['version']}")
    return ShardIndex(
        shard_bytes=int(metadata["shard_bytes"]),
        extensions=tuple(json.loads(metadata["extensions"])),
        arrays={name: stored[name] for name in _ARRAYS},
        columns={
            name.removeprefix(COLUMN_PREFIX): values
            for name, values in stored.items()
            if name.startswith(COLUMN_PREFIX)
        },
        passed_over=int(metadata["passed_over"]),
        dropped_columns=int(metadata["dropped_columns"]),
        digest=metadata["digest"],
        payloads_hashed="payload_crc32" not in metadata,
    )


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _bad_index(path: str | os.PathLike[str], what: str) -> ShardError:
    return ShardError(
        f"{os.fspath(path)}: damaged or foreign index ({what}): delete it, or run "
        "`python -m tools.shards index --force` on its shard"
    )
