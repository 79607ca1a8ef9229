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

import dataclasses
import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline import array_file
from data_pipeline.files import write_atomically
from data_pipeline.index_structure import check_structure
from data_pipeline.tar_headers import BLOCK, ShardError

# Where the header of ours begins, behind its length.
_START = slice(8, 10)
FORMAT = "omnipretrain.shard-index"
VERSIONS = {False: "1", True: "2"}
"""Without and with bundles: readers that do not know bundles refuse the second."""
SUFFIX = ".idx"
COLUMN_PREFIX = "column:"
DERIVED_PREFIX = "derived:"
TEXT_PREFIX = "text:"
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
    """Columns left out because there are more than MAX_COLUMNS of them."""
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
    """sha256 over everything above and below, but for what is derived: equal exactly if the samples
    of two shards are equal."""
    derived: DerivedColumns | None
    """None in indices that were written before there were any."""
    payloads_hashed: bool = True
    """False for an index of headers alone: `member_crc32` is 0 then, and what payloads hold is not
    compared with anything."""

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
        # Written out: readers ask for every sample.
        ends, numbers, offsets, sizes, crcs, header_crcs = self._member_views
        found = []
        for at in range(ends[row - 1] if row else 0, ends[row]):
            extension = self.extensions[numbers[at]]
            if extensions is None or extension in extensions:
                offset = offsets[at]
                found.append((
                    offset - BLOCK, offset, extension, offset, sizes[at], crcs[at], header_crcs[at]
                ))
        return found

    @cached_property
    def headers_digest(self) -> str:
        """Digest of the index of headers alone of the same shard; its own if it is one."""
        if not self.payloads_hashed or self.bundled:
            return self.digest
        unknown = {"member_crc32": np.zeros_like(self.arrays["member_crc32"])}
        arrays = self.arrays | unknown
        return _digest(dataclasses.replace(self, arrays=arrays, payloads_hashed=False))

    # One number of a memoryview costs a third of one of an array, and reading asks for many.

    @cached_property
    def _key_views(self) -> list[memoryview]:
        return [_view(self.arrays[name]) for name in ("keys", "key_end")]

    @cached_property
    def _member_views(self) -> list[memoryview]:
        names = ("end", "extension", "offset", "size", "crc32", "header_crc32")
        return [_view(self.arrays[f"member_{name}"]) for name in names]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without those views, which are made again when they are needed."""
        views = "_key_views", "_member_views", "headers_digest"
        return {name: value for name, value in self.__dict__.items() if name not in views}

    def header_span(self, row: int, offset: int) -> tuple[int, int]:
        """Return where that lies which member_header_crc32 of the member at `offset` checks."""
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to `path`, atomically; the bytes depend on the content only."""
        metadata = _metadata(self) | {"digest": self.digest}
        if self.derived is not None:
            metadata |= {
                **_derived_metadata(self.derived),
                "derived_digest": _derived_digest(self),
            }
        arrays = _named_arrays(self) | _derived_arrays(self)
        write_atomically(Path(path), array_file.serialise(metadata, arrays))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ShardIndex":
        """Map the index at `path` into memory and check it against its digest.

        Errors: FileNotFoundError; ShardError if the file is damaged or of another version.
        """
        try:
            metadata, stored = array_file.load(path)
            index = _from_file(metadata, stored)
            if index.digest != _digest(index):
                raise ValueError("its digest does not match its content")
            derived = None if index.derived is None else _derived_digest(index)
            if derived != metadata.get("derived_digest"):
                raise ValueError("the digest of its derived columns does not match them")
            check_structure(index, ARRAYS)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _bad_index(path, str(error)) from None
        return index


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Whether a file is what another tool keeps under the name of an index (DALI, Energon)."""
    try:
        with open(path, "rb") as file:
            head = file.read(_START.stop)
    except OSError:
        return False
    return len(head) == _START.stop and head[_START] != b'{"'


def _view(numbers: np.ndarray) -> memoryview:
    # Over bytes: arrays in a mapped file need not be aligned.
    return memoryview(numbers.view(np.uint8)).cast(numbers.dtype.char)


def _metadata(index: ShardIndex) -> dict[str, str]:
    """Return the safetensors metadata (strings only), without the digest."""
    metadata = {
        "dropped_columns": str(index.dropped_columns),
        "extensions": json.dumps(index.extensions),
        "format": FORMAT,
        "passed_over": str(index.passed_over),
        "shard_bytes": str(index.shard_bytes),
        "version": VERSIONS[index.bundled],
    }
    return metadata if index.payloads_hashed else metadata | {"payload_crc32": "unknown"}


def _named_arrays(index: ShardIndex) -> dict[str, np.ndarray]:
    columns = {COLUMN_PREFIX + name: c for name, c in index.columns.items()}
    return index.arrays | columns


def _derived_arrays(index: ShardIndex) -> dict[str, np.ndarray]:
    if index.derived is None:
        return {}
    texts = {
        TEXT_PREFIX + name: column.codes
        for name, column in index.derived.texts.items()
        if column is not None
    }
    return texts | {DERIVED_PREFIX + name: c for name, c in index.derived.columns.items()}


def _derived_metadata(derived: DerivedColumns) -> dict[str, str]:
    texts = {name: column and column.texts for name, column in derived.texts.items()}
    return {
        "dropped_derived": str(derived.dropped),
        "derived_texts": json.dumps(texts, sort_keys=True),
    }


def with_digest(**fields: Any) -> ShardIndex:
    """Return a ShardIndex of these fields, with its digest computed."""
    index = ShardIndex(**fields, digest="")
    object.__setattr__(index, "digest", _digest(index))
    return index


def _digest(index: ShardIndex) -> str:
    return _digest_of(json.dumps(_metadata(index), sort_keys=True), _named_arrays(index))


def _derived_digest(index: ShardIndex) -> str:
    """Of the derived columns, and of the index to which they belong."""
    about = json.dumps({"digest": index.digest, **_derived_metadata(index.derived)}, sort_keys=True)
    return _digest_of(about, _derived_arrays(index))


def _digest_of(about: str, arrays: dict[str, np.ndarray]) -> str:
    digest = sha256(about.encode())
    for name, values in array_file.in_file_order(arrays).items():
        digest.update(f"\n{name} {values.dtype.str} {len(values)}\n".encode())
        digest.update(np.ascontiguousarray(values).view(np.uint8).data)
    return digest.hexdigest()


def _from_file(metadata: dict[str, str], stored: dict[str, np.ndarray]) -> ShardIndex:
    if metadata["format"] != FORMAT or metadata["version"] not in VERSIONS.values():
        raise ValueError(f"it is {metadata['format']} version {metadata['version']}")
    return ShardIndex(
        shard_bytes=int(metadata["shard_bytes"]),
        extensions=tuple(json.loads(metadata["extensions"])),
        arrays={name: stored[name] for name in ARRAYS},
        columns=_with_prefix(stored, COLUMN_PREFIX),
        passed_over=int(metadata["passed_over"]),
        dropped_columns=int(metadata["dropped_columns"]),
        bundled=metadata["version"] == VERSIONS[True],
        digest=metadata["digest"],
        derived=_derived(metadata, stored),
        payloads_hashed="payload_crc32" not in metadata,
    )


def _with_prefix(stored: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): values
        for name, values in stored.items()
        if name.startswith(prefix)
    }


def _derived(
    metadata: dict[str, str], stored: dict[str, np.ndarray]
) -> DerivedColumns | None:
    columns, codes = _with_prefix(stored, DERIVED_PREFIX), _with_prefix(stored, TEXT_PREFIX)
    if not {"dropped_derived", "derived_texts", "derived_digest"} & metadata.keys():
        if columns or codes:
            raise ValueError("it has derived columns, but nothing is said about them")
        return None
    texts = {
        name: None if found is None else TextColumn(codes[name], tuple(found))
        for name, found in json.loads(metadata["derived_texts"]).items()
    }
    return DerivedColumns(columns, int(metadata["dropped_derived"]), texts)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _bad_index(path: str | os.PathLike[str], what: str) -> ShardError:
    return ShardError(
        f"{os.fspath(path)}: damaged or foreign index ({what}): delete it, or run "
        "`python -m tools.shards index --force` on its shard"
    )
