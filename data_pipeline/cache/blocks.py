"""The unit of the node cache: a block, a few neighbouring samples of one shard.

Whole shards are the wrong unit for the order (order.py): thousands of lanes stand in as many
places of the data set, so that all shards are in use at the same time. What a lane needs next is
the next few samples, and what it has left behind is not needed again before the next epoch.
"""

import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from math import log2
from typing import NamedTuple

import numpy as np

from data_pipeline.order.order import Order
from data_pipeline.shards.shard_set import Shard, ShardSet

WHOLE_SHARD = float("inf")
"""As `block_bytes`: a shard is one block."""


class Extent(NamedTuple):
    """A block as bytes of a shard. The extents of a shard hold all its bytes."""

    name: str
    """By the content of the shard and the samples, whatever its file is called."""
    number: int
    """Of the shard in its set."""
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin


def block_rows(shard: Shard, block_bytes: float) -> int:
    """Samples in a block of `shard`: the power of two whose bytes are nearest to `block_bytes`.

    It depends on the shard alone, so that all tasks and runs that read a shard share its blocks.
    At most the 64 neighbours that the order reads in a row, of which most begin at a multiple of a
    power of two; more would be fetched for other lanes, and too early.
    """
    if block_bytes == WHOLE_SHARD:
        return max(shard.samples, 1)
    mean = max(shard.bytes, 1) / max(shard.samples, 1)
    return int(min(2 ** round(log2(max(block_bytes / mean, 1.0))), Order.chunk_rows))


def block_key(shard: Shard) -> str:
    """First part of the names of a shard's blocks; another content or version has another one."""
    return sha256(f"{shard.index_digest}\0{shard.version or ''}".encode()).hexdigest()[:32]


def extent_of_row(shards: ShardSet, number: int, row: int, block_bytes: float) -> Extent:
    """The block that holds a row of shard `number`.

    Raises ShardError, OSError: the index of the shard cannot be read.
    """
    shard = shards.shards[number]
    rows = block_rows(shard, block_bytes)
    first = row // rows * rows
    last = min(first + rows, shard.samples)
    begins = shards.index(number).arrays["sample_begin"]
    begin = int(begins[first]) if first else 0
    end = int(begins[last]) if last < shard.samples else shard.bytes
    return Extent(_name(block_key(shard), first, last), number, begin, end)


def extent_of_byte(shards: ShardSet, number: int, byte: int, block_bytes: float) -> Extent:
    """The block that holds a byte of shard `number`; raises as `extent_of_row`."""
    begins = shards.index(number).arrays["sample_begin"]
    row = int(np.searchsorted(begins, byte, side="right")) - 1
    return extent_of_row(shards, number, max(row, 0), block_bytes)


class Blocks:
    """All blocks of several sets of shards, numbered; a shard in two sets has one range of numbers.

    Args:
        sets: name -> shards.
        block_bytes: what a block is to hold, or WHOLE_SHARD.
    """

    def __init__(self, sets: Mapping[str, ShardSet], block_bytes: float) -> None:
        self._sets, self._block_bytes = dict(sets), block_bytes
        self._of_key: dict[str, int] = {}
        self._homes: list[tuple[str, int]] = []  # a set, and the number there, of each shard
        self._rows_of: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        distinct: list[Shard] = []
        for name, shards in sets.items():
            numbers = []
            for number, shard in enumerate(shards.shards):
                key = block_key(shard)
                if key not in self._of_key:
                    self._of_key[key] = len(distinct)
                    distinct.append(shard)
                    self._homes.append((name, number))
                numbers.append(self._of_key[key])
            ends = np.cumsum([shard.samples for shard in shards.shards], dtype=np.int64)
            self._rows_of[name] = ends, np.array(numbers, dtype=np.int64)
        self._block_rows = np.array([block_rows(s, block_bytes) for s in distinct], dtype=np.int64)
        self._samples = np.array([shard.samples for shard in distinct], dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(-(-self._samples // self._block_rows))])
        self._sample_bytes = np.array([s.bytes / max(s.samples, 1) for s in distinct])
        self.total_bytes = sum(shard.bytes for shard in distinct)
        """Of all shards, each counted once."""

    def __len__(self) -> int:
        """Return the number of blocks."""
        return int(self._first[-1])

    def of_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Numbers of the blocks that hold `rows`, (n,) int64, of the set `name`: (n,) int64."""
        ends, shards = self._rows_of[name]
        places = np.searchsorted(ends, rows, side="right")
        starts = np.concatenate([[0], ends[:-1]])
        within = shards[places]
        return self._first[within] + (rows - starts[places]) // self._block_rows[within]

    def sizes(self) -> np.ndarray:
        """Bytes of each block, (blocks,) float64, if all samples of a shard were equally large."""
        shards = np.repeat(np.arange(len(self._samples)), np.diff(self._first))
        begins = (np.arange(len(self)) - self._first[shards]) * self._block_rows[shards]
        counts = np.minimum(self._block_rows[shards], self._samples[shards] - begins)
        return counts * self._sample_bytes[shards]

    def extent(self, block: int) -> tuple[str, Extent]:
        """A set that has a block, and where the block lies there; raises as `extent_of_row`."""
        shard = int(np.searchsorted(self._first, block, side="right")) - 1
        row = (block - int(self._first[shard])) * int(self._block_rows[shard])
        name, number = self._homes[shard]
        return name, extent_of_row(self._sets[name], number, row, self._block_bytes)

    def named(self, names: Iterable[str]) -> dict[str, int]:
        """Numbers of those blocks that belong to these sets, by their names."""
        found = {}
        for name in names:
            key, _, span = name.partition("-")
            shard = self._of_key.get(key)
            if shard is None:
                continue
            begin = span.partition("-")[0]
            if not re.fullmatch("[0-9a-f]+", begin):
                continue  # somebody else's file
            first, rows = int(begin, 16), int(self._block_rows[shard])
            last = min(first + rows, int(self._samples[shard]))
            if first % rows == 0 and name == _name(key, first, last):
                found[name] = int(self._first[shard]) + first // rows
        return found


def _name(key: str, first: int, last: int) -> str:
    return f"{key}-{first:x}-{last:x}"
