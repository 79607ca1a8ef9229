"""What a node's cache will do, found without reading anything."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.cache.eviction import KNOWN_USES, CachePlan
from data_pipeline.cache.future import BlockFuture, NodeReads


class Tally:
    """A cache that only counts. Samples of one shard count as equally large."""

    def __init__(self, sizes: np.ndarray, capacity: float) -> None:
        """`sizes` of the blocks, (n,) float64 bytes; `capacity` in bytes."""
        self._sizes, self.capacity = sizes, capacity
        self.held = self.most_held = self.fetched_bytes = 0.0
        self.fetched = self.passed = 0

    def has_room(self, block: int) -> bool:
        """As `eviction.Store`."""
        return self.held + self._sizes[block] <= self.capacity

    def fetch(self, block: int) -> None:
        """As `eviction.Store`."""
        self.held += self._sizes[block]
        self.most_held = max(self.most_held, self.held)
        self._download(block)

    def evict(self, block: int) -> None:
        """As `eviction.Store`."""
        self.held -= self._sizes[block]

    def pass_by(self, block: int) -> None:
        """Download a block and not keep it."""
        self.passed += 1
        self._download(block)

    def outcome(self, uses: int) -> "Outcome":
        """What has been counted, with so many uses."""
        return Outcome(uses, self.fetched, self.fetched_bytes, self.most_held, self.passed)

    def _download(self, block: int) -> None:
        self.fetched += 1
        self.fetched_bytes += float(self._sizes[block])


@dataclass(frozen=True)
class Outcome:
    """What a policy makes of a cache, on one node."""

    uses: int
    """Blocks that steps read, each once a step."""
    fetched: int
    """Blocks that were downloaded."""
    fetched_bytes: float
    most_held_bytes: float
    passed_by: int = 0
    """Downloads that were not kept, as the cache was full of what is needed sooner."""

    @property
    def hit_rate(self) -> float:
        """Part of the uses that needed no download of their own."""
        return 1 - self.fetched / max(self.uses, 1)


def simulate(
    reads: NodeReads,
    capacity: float,
    start_step: int,
    stop_step: int,
    *,
    read_ahead_steps: int,
    known_uses: int = KNOWN_USES,
) -> Outcome:
    """The cache as it is: known future, read-ahead.

    Args:
        reads: what a node reads.
        capacity: bytes.
        start_step, stop_step: of the run; the cache is empty at first.
        read_ahead_steps, known_uses: as `CachePlan`.
    """
    blocks = reads.blocks
    tally = Tally(blocks.sizes(), capacity)
    future = BlockFuture(reads, start_step, stop_step)
    plan = CachePlan(future, len(blocks), read_ahead_steps=read_ahead_steps, known_uses=known_uses)
    uses = 0
    for step in range(start_step, stop_step):
        plan.advance(step)
        while plan.look_ahead():
            pass
        plan.fill(tally)
        used = future.uses(step)
        uses += len(used)
        for block in used[~plan.held(used)].tolist():
            tally.pass_by(block)  # there was no room for it
    return tally.outcome(uses)
