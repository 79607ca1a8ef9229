"""The file of an index: written, read and checked, and the digest of what it holds."""

import dataclasses
import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import write_atomically
from data_pipeline.shards import array_file
from data_pipeline.shards.index import ARRAYS, DerivedColumns, ShardIndex, TextColumn
from data_pipeline.shards.index_structure import check_structure
from data_pipeline.storage.errors import ShardError

# Where the header of ours begins, behind its length.
_START = slice(8, 10)
FORMAT = "omnipretrain.shard-index"
VERSIONS = {False: "1", True: "2"}
"""Without and with bundles: readers that do not know bundles refuse the second."""
COLUMN_PREFIX = "column:"
DERIVED_PREFIX = "derived:"
TEXT_PREFIX = "text:"


def save_index(index: ShardIndex, path: str | os.PathLike[str]) -> None:
    """Write an index to `path`, atomically; the bytes depend on the content only."""
    metadata = _metadata(index) | {"digest": index.digest}
    if index.derived is not None:
        metadata |= {
            **_derived_metadata(index.derived),
            "derived_digest": _derived_digest(index),
        }
    arrays = _named_arrays(index) | _derived_arrays(index)
    write_atomically(Path(path), array_file.serialise(metadata, arrays))


def load_index(path: str | os.PathLike[str]) -> ShardIndex:
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


def with_digest(**fields: Any) -> ShardIndex:
    """Return a ShardIndex of these fields, with its digest computed."""
    index = ShardIndex(**fields, digest="")
    object.__setattr__(index, "digest", _digest(index))
    return index


def headers_digest(index: ShardIndex) -> str:
    """Digest of the index of headers alone of the same shard; its own if it is one."""
    if not index.payloads_hashed or index.bundled:
        return index.digest
    unknown = {"member_crc32": np.zeros_like(index.arrays["member_crc32"])}
    arrays = index.arrays | unknown
    return _digest(dataclasses.replace(index, arrays=arrays, payloads_hashed=False))


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


def _derived(metadata: dict[str, str], stored: dict[str, np.ndarray]) -> DerivedColumns | None:
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


def _bad_index(path: str | os.PathLike[str], what: str) -> ShardError:
    return ShardError(
        f"{os.fspath(path)}: damaged or foreign index ({what}): delete it, or run "
        "`python -m tools.shards index --force` on its shard"
    )
