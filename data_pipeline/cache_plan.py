"""What a node cache will do, found without reading anything: hits, downloads, and against LRU."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from data_pipeline.blocks import Blocks
from data_pipeline.eviction import CachePlan
from data_pipeline.future import Future, NodeReads


@dataclass
class Tally:
    """A cache that only counts; sizes are the mean of a shard's samples."""

    sizes: np.ndarray
    """(blocks,) float64 bytes."""
    capacity: float
    """Bytes."""
    held: float = 0.0
    most_held: float = 0.0
    fetched: int = 0
    fetched_bytes: float = 0.0

    def has_room(self, block: int) -> bool:
        """As `eviction.Store`."""
        return self.held + self.sizes[block] <= self.capacity

    def fetch(self, block: int) -> None:
        """As `eviction.Store`."""
        self.held += self.sizes[block]
        self.most_held = max(self.most_held, self.held)
        self.count(block)

    def evict(self, block: int) -> None:
        """As `eviction.Store`."""
        self.held -= self.sizes[block]

    def count(self, block: int) -> None:
        """A block was downloaded."""
        self.fetched += 1
        self.fetched_bytes += self.sizes[block]


def simulate(future, blocks, capacity, ahead, known=8_000_000):
    sizes = blocks.sizes(np.arange(len(blocks)))
    tally = Tally(sizes, capacity)
    plan = CachePlan(future, len(blocks), read_ahead_steps=ahead, known_uses=known)
    uses = 0
    for step in range(future.now, future.stop_step):
        plan.advance(step)
        while plan.look_ahead():
            pass
        plan.fill(tally)
        used = future.uses(step)
        uses += len(used)
        for block in used[~plan._held[used]].tolist():
            tally.count(block)
    return uses, tally


def simulate_lru(future, blocks, capacity):
    sizes = blocks.sizes(np.arange(len(blocks))).tolist()
    tally = Tally(sizes, capacity)
    held = OrderedDict()
    uses = 0
    for step in range(future.now, future.stop_step):
        used = future.advance()[0].tolist()
        uses += len(used)
        for block in used:
            if block in held:
                held.move_to_end(block)
                continue
            while held and not tally.has_room(block):
                tally.evict(held.popitem(last=False)[0])
            if tally.has_room(block):
                held[block] = None
                tally.fetch(block)
            else:
                tally.count(block)
    return uses, tally
