"""The unit of the node cache: a block, a few neighbouring samples of one shard.

Whole shards are the wrong unit for the order (order.py): thousands of lanes stand in as many
places of the data set, so that all shards are in use at the same time. What a lane needs next is
the next few samples, and what it has left behind is not needed again before the next epoch.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.shards import Shard


class Block(NamedTuple):
    """Samples [begin, end) of a shard."""

    shard: Shard
    begin: int
    end: int


def block_rows(shard: Shard, block_bytes: float) -> int:
    """Samples in a block of `shard`: the power of two whose bytes are nearest to `block_bytes`.

    It depends on the shard alone, so that all tasks and runs that read a shard share its blocks. A
    power of two, because the order walks through 64 neighbours, mostly from a multiple of 64 on:
    smaller blocks end where the walk ends.
    """
    mean = max(shard.bytes, 1) / max(shard.samples, 1)
    whole = 2 ** max(shard.samples - 1, 0).bit_length()
    if block_bytes >= mean * whole:
        return whole
    return int(2 ** round(np.log2(max(block_bytes / mean, 1.0))))


class Blocks:
    """All blocks of several sets of shards, numbered; a shard in two sets has one range of numbers.

    Args:
        sets: name -> shards in the order of the set's rows.
        block_bytes: what a block is to hold.
    """

    def __init__(self, sets: dict[str, Sequence[Shard]], block_bytes: float) -> None:
        numbers: dict[str, int] = {}
        self._shards: list[Shard] = []
        self._sets: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, shards in sets.items():
            for shard in shards:
                if shard.index_digest not in numbers:
                    numbers[shard.index_digest] = len(self._shards)
                    self._shards.append(shard)
            ends = np.cumsum([shard.samples for shard in shards], dtype=np.int64)
            self._sets[name] = ends, np.array([numbers[s.index_digest] for s in shards])
        self._rows = np.array([block_rows(s, block_bytes) for s in self._shards], dtype=np.int64)
        samples = np.array([shard.samples for shard in self._shards], dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(-(-samples // self._rows))])
        self._sample_bytes = np.array([s.bytes / max(s.samples, 1) for s in self._shards])
        self._samples = samples

    def __len__(self) -> int:
        """Return the number of blocks."""
        return int(self._first[-1])

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards, each counted once."""
        return sum(shard.bytes for shard in self._shards)

    def of_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Numbers of the blocks that hold `rows`, (n,) int64, of the set `name`: (n,) int64."""
        ends, shards = self._sets[name]
        places = np.searchsorted(ends, rows, side="right")
        starts = np.concatenate([[0], ends[:-1]])
        within = shards[places]
        return self._first[within] + (rows - starts[places]) // self._rows[within]

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Bytes of each block, (n,) float64, if all samples of a shard were equally large."""
        shards, begins, ends = self._spans(numbers)
        return (ends - begins) * self._sample_bytes[shards]

    def block(self, number: int) -> Block:
        """What block `number` holds."""
        (shard,), (begin,), (end,) = self._spans(np.array([number]))
        return Block(self._shards[shard], int(begin), int(end))

    def numbers(self, blocks: Iterable[tuple[str, int, int]]) -> list[int]:
        """Numbers of blocks given as (index digest, begin, end); -1 for those of other sets."""
        shards = {shard.index_digest: number for number, shard in enumerate(self._shards)}
        found = []
        for digest, begin, end in blocks:
            shard = shards.get(digest, -1)
            rows = int(self._rows[shard])
            fits = shard >= 0 and begin % rows == 0
            fits = fits and end == min(begin + rows, int(self._samples[shard]))
            found.append(int(self._first[shard]) + begin // rows if fits else -1)
        return found

    def _spans(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shards = np.searchsorted(self._first, numbers, side="right") - 1
        begins = (numbers - self._first[shards]) * self._rows[shards]
        ends = np.minimum(begins + self._rows[shards], self._samples[shards])
        return shards, begins, ends
