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
    member_header_crc32 uint32 (M,)      of the 512-byte tar header in front of the payload; in a
                                         bundle (bundles.py): of the line that describes the sample
    column:<name>       int64 or float64 (N,)   a number per sample that the samples state
    derived:<name>      uint8, uint32, int64 or float64 (N,)   one that follows from them
    text:<name>         uint8 (N,)       a short text: its number, from 1, in a list in the metadata

In a bundled shard, a sample begins with its line and has no padding; such an index is of version 2.

What columns there are: columns.py. A float column has NaN where a sample lacks the number.
"""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.shards.tar import BLOCK
from data_pipeline.storage.errors import ShardError

SUFFIX = ".idx"
MAX_COLUMNS = 128
"""Of each of the three kinds."""
MAX_TEXTS = 255
"""Different texts of a column of texts."""

ARRAYS = {
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


class TextColumn(NamedTuple):
    """A column of few different texts."""

    codes: np.ndarray
    """(N,) uint8: 0 where a sample lacks it, else the number of its text, from 1."""
    texts: tuple[str, ...]


class DerivedColumns(NamedTuple):
    """Columns that follow from what samples hold, by rules that may grow: see columns.py."""

    columns: dict[str, np.ndarray]
    dropped: int
    """Columns left out, of more than MAX_COLUMNS."""
    texts: dict[str, TextColumn | None]
    """Columns of texts; None for one of more than MAX_TEXTS different texts, or of long ones."""


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
    bundled: bool
    """Whether all samples lie in bundles, each behind a line of its own; see bundles.py."""
    digest: str
    """sha256 over all fields but the derived columns: two shards with equal samples have equal
    digests, and others do not."""
    derived: DerivedColumns | None
    """None in indices that were written before there were any."""
    payloads_hashed: bool = True
    """False for an index that was built from headers alone: then every `member_crc32` is 0, and
    payloads are not checked."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.arrays["key_end"])

    def key(self, row: int) -> str:
        """Return the key of a sample."""
        keys, ends = self._key_views
        return _text(bytes(keys[ends[row - 1] if row else 0 : ends[row]]))

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
        ends, numbers, offsets, sizes, crcs, header_crcs = self._member_views
        extensions = self.extensions
        return [
            (extensions[numbers[at]], offsets[at], sizes[at], crcs[at], header_crcs[at])
            for at in range(ends[row - 1] if row else 0, ends[row])
        ]

    def placed(
        self, row: int, extensions: Collection[str] | None = None
    ) -> list[tuple[int, int, str, int, int, int, int]]:
        """Return `members`, or those of `extensions`, each behind its `header_span`."""
        if self.bundled:
            found = [(*self.header_span(row, m[1]), *m) for m in self.members(row)]
            return [m for m in found if extensions is None or m[2] in extensions]
        # The same as above without a call per member: readers ask for every sample.
        ends, numbers, offsets, sizes, crcs, header_crcs = self._member_views
        found = []
        for at in range(ends[row - 1] if row else 0, ends[row]):
            extension = self.extensions[numbers[at]]
            if extensions is None or extension in extensions:
                offset = offsets[at]
                found.append(
                    (
                        offset - BLOCK,
                        offset,
                        extension,
                        offset,
                        sizes[at],
                        crcs[at],
                        header_crcs[at],
                    )
                )
        return found

    # Reading one number from a memoryview takes a third of the time that an array takes.

    @cached_property
    def _key_views(self) -> list[memoryview]:
        return [_view(self.arrays[name]) for name in ("keys", "key_end")]

    @cached_property
    def _member_views(self) -> list[memoryview]:
        names = ("end", "extension", "offset", "size", "crc32", "header_crc32")
        return [_view(self.arrays[f"member_{name}"]) for name in names]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the views; they are made again on first use."""
        views = "_key_views", "_member_views"
        return {name: value for name, value in self.__dict__.items() if name not in views}

    def header_span(self, row: int, offset: int) -> tuple[int, int]:
        """Return the range of bytes that the member at `offset` has its header_crc32 of."""
        if not self.bundled:
            return offset - BLOCK, offset
        first = int(self.arrays["member_end"][row - 1]) if row else 0
        begin, end = self.arrays["sample_begin"][row], self.arrays["member_offset"][first]
        return int(begin), int(end)

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


def _view(numbers: np.ndarray) -> memoryview:
    # Over bytes: arrays in a mapped file need not be aligned.
    return memoryview(numbers.view(np.uint8)).cast(numbers.dtype.char)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
