"""Columns of a shard as conditions and statistics see them: those of its index, and what follows.

Beside the numbers in the index (`index.py`) there are `bytes:EXTENSION`, the size of that member in
bytes, and two columns of texts: `key`, and `shard`, the file name of the shard.
"""

import numpy as np

from data_pipeline.index import ShardIndex

BYTES_PREFIX = "bytes:"


def column_names(index: ShardIndex) -> set[str]:
    """Names of all numeric columns of a shard."""
    return {*index.columns, *(BYTES_PREFIX + extension for extension in index.extensions)}


def column_of(index: ShardIndex, name: str) -> np.ndarray | None:
    """A numeric column of a shard, None if it has no such column.

    Returns:
        (N,) int64, or float64 with NaN where a sample lacks the number or the member.
    """
    extension = name.removeprefix(BYTES_PREFIX)
    if extension != name and extension in index.extensions:
        return _member_bytes(index, extension)
    return index.columns.get(name)


def _member_bytes(index: ShardIndex, extension: str) -> np.ndarray:
    arrays = index.arrays
    members = np.flatnonzero(arrays["member_extension"] == index.extensions.index(extension))
    rows = np.searchsorted(arrays["member_end"], members.astype(np.uint64), side="right")
    sizes = arrays["member_size"][members].astype(np.int64)
    if len(members) == len(index):
        return sizes
    found = np.full(len(index), np.nan)
    found[rows] = sizes
    return found
