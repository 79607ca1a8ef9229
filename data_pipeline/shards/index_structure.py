"""Whether the arrays of an index agree with each other: a digest only says that they are unchanged.

An index may come from anywhere. One that contradicts itself is an error when it is opened, so that
nothing that reads by it has to expect rows that are not there, or bytes behind the shard's end.
"""

from collections.abc import Mapping

import numpy as np

from data_pipeline.shards.bundles import LONGEST_LINE
from data_pipeline.shards.index import ShardIndex, TextColumn
from data_pipeline.shards.tar import BLOCK


def check_structure(index: ShardIndex, types: Mapping[str, type]) -> None:
    """Raise ValueError if arrays of `index` contradict each other.

    types: array -> its numpy type.
    """
    arrays = index.arrays
    for name, dtype in types.items():
        if arrays[name].dtype != dtype:
            raise ValueError(f"array {name!r} is of type {arrays[name].dtype}")
    samples, members = len(arrays["key_end"]), len(arrays["member_extension"])
    for name in types.keys() - {"keys"}:
        per_member = name.startswith("member_") and name != "member_end"
        _check_length(name, arrays[name], members if per_member else samples)
    derived = index.derived.columns if index.derived is not None else {}
    for name, column in [*index.columns.items(), *derived.items()]:
        _check_length(f"column {name}", column, samples)
    for name, column in (index.derived.texts if index.derived is not None else {}).items():
        if column is not None:
            _check_texts(name, column, samples)
    _check_ends("key_end", arrays["key_end"], len(arrays["keys"]))
    _check_ends("member_end", arrays["member_end"], members)
    if (np.diff(arrays["member_end"], prepend=np.uint64(0)) == 0).any():
        raise ValueError("a sample has no members")
    if members and int(arrays["member_extension"].max()) >= len(index.extensions):
        raise ValueError("a member has an extension that is not listed")
    if not all(isinstance(extension, str) for extension in index.extensions):
        raise ValueError("an extension is no text")
    offsets, sizes = arrays["member_offset"], arrays["member_size"]
    room = np.uint64(max(index.shard_bytes, 0))
    # Compared so that no sum of two 64-bit numbers is needed, which could wrap around.
    if (offsets > room).any() or (offsets < BLOCK).any() or (sizes > room - offsets).any():
        raise ValueError("a member lies outside of the shard")
    if index.bundled and samples:
        ends = arrays["member_end"][:-1]
        begins, firsts = arrays["sample_begin"], offsets[np.append(np.uint64(0), ends)]
        if (begins >= firsts).any() or (firsts - begins > np.uint64(LONGEST_LINE)).any():
            raise ValueError("a bundled sample does not begin with its line")
        if (offsets[1:] < offsets[:-1]).any():
            raise ValueError("members of a bundle are not in order")


def _check_texts(name: str, column: TextColumn, samples: int) -> None:
    _check_length(f"text {name}", column.codes, samples)
    if column.codes.dtype != np.uint8 or not all(isinstance(text, str) for text in column.texts):
        raise ValueError(f"the column of texts {name!r} holds something else")
    if samples and int(column.codes.max()) > len(column.texts):
        raise ValueError(f"a sample has a text of {name!r} that is not listed")


def _check_length(name: str, values: np.ndarray, wanted: int) -> None:
    if len(values) != wanted:
        raise ValueError(f"array {name!r} has {len(values)} entries, not {wanted}")


def _check_ends(name: str, ends: np.ndarray, last: int) -> None:
    """`ends` never fall, and the last one is `last`."""
    if (ends[1:] < ends[:-1]).any() or (int(ends[-1]) if len(ends) else 0) != last:
        raise ValueError(f"array {name!r} does not rise to {last}")
