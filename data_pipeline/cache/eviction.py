"""Which block to fetch next and which to evict, when future reads are known.

The cache keeps what is needed soonest (Belady's rule), and reads ahead of the run by a few steps.
Reading further ahead than fetches take would cost downloads: to make room early, it would evict
blocks that will still be used.
"""

import heapq
from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import numpy as np

from data_pipeline.cache.future import BlockFuture

KNOWN_USES = 1 << 23
"""Future uses that are kept in memory: 200 MB. An epoch of eight million samples on a node."""


class Store(Protocol):
    """Where blocks are put; `cache_plan.Tally` in a simulation, a folder in a run."""

    def has_room(self, block: int) -> bool:
        """Whether a block can be put in without evicting another one."""

    def fetch(self, block: int) -> None:
        """Put a block in."""

    def evict(self, block: int) -> None:
        """Remove a block."""


class CachePlan:
    """The blocks that a cache holds, ordered by the step that reads them next."""

    def __init__(
        self,
        future: BlockFuture,
        blocks: int,
        *,
        read_ahead_steps: int,
        known_uses: int = KNOWN_USES,
    ) -> None:
        """Start with nothing in the cache.

        Args:
            future: at the step where the run starts.
            blocks: how many there are.
            read_ahead_steps: a block is fetched at most so many steps before it is read.
            known_uses: do not look further ahead than so many uses (they cost memory).
        """
        self.future = future
        self.read_ahead_steps, self.known_uses = read_ahead_steps, known_uses
        self.front = future.now
        """First step whose blocks were not all offered: those of earlier steps are in the cache,
        being fetched, or given up."""
        self._held = np.zeros(blocks, dtype=bool)
        # Blocks by the step of their next use. An entry becomes stale when its block is used or
        # evicted; that is noticed when it is read.
        self._by_step: dict[int, list[np.ndarray]] = {}
        self._steps: list[int] = []  # heap of the keys above, negated

    def held(self, blocks: np.ndarray) -> np.ndarray:
        """(n,) bool: which blocks are in the cache or being fetched."""
        return self._held[blocks]

    def advance(self, step: int) -> None:
        """Tell the plan that all steps before `step` are done."""
        while self.future.now < step:
            self._know(self.future.now)
            self._by_step.pop(self.future.now, None)
            self._file(*self.future.advance())
        self.front = max(self.front, step)
        if len(self._steps) > 2 * len(self._by_step) + 1024:  # most are of steps that are done
            self._steps = [-key for key in self._by_step]
            heapq.heapify(self._steps)

    def look_ahead(self) -> bool:
        """Compute the uses of some more future steps; False if `sees_all`."""
        if self.sees_all:
            return False
        self._file(*self.future.look_ahead())
        return True

    @property
    def sees_all(self) -> bool:
        """Whether all uses are known, up to the run's end or to `known_uses`."""
        future = self.future
        return future.known_until >= future.stop_step or future.pending >= self.known_uses

    def add(self, blocks: np.ndarray) -> None:
        """Blocks, (n,) int64, have come into the cache."""
        self._held[blocks] = True
        self._file(blocks, self.future.next_use(blocks))

    def drop(self, block: int) -> None:
        """A block has gone."""
        self._held[block] = False

    def last_needed(self, after: int) -> int | None:
        """The cached block that is used last, if its next use comes after step `after`."""
        while self._steps:
            step = -self._steps[0]
            if step <= after:
                return None
            filed = self._by_step.get(step, [])
            while filed:
                block = int(filed[-1][-1])
                if self._held[block] and self.future.next_use(filed[-1][-1:])[0] == step:
                    return block
                filed[-1] = filed[-1][:-1]
                if not len(filed[-1]):
                    filed.pop()
            self._by_step.pop(step, None)
            heapq.heappop(self._steps)
        return None

    def missing(self) -> Iterator[tuple[int, int]]:
        """Yield (step, block) of each block to fetch, in the order in which they are needed.

        The caller adds each block, or leaves it, before it asks for the next one: a block that is
        left is not offered again.
        """
        end = min(self.future.now + self.read_ahead_steps, self.future.stop_step)
        while self.front < end:
            self._know(self.front)
            used = self.future.uses(self.front)
            for block in used[~self._held[used]].tolist():
                yield self.front, block
            self.front += 1

    def fill(self, store: Store, most: int | None = None) -> int:
        """Fetch the blocks that the next steps need and the cache lacks, as far as there is room.

        Args: most: blocks to fetch in this call; the rest is left for the next one.
        Returns: how many blocks were fetched.
        """
        fetched = 0
        for step, block in self.missing():
            if fetched == most:
                break
            while not store.has_room(block):
                victim = self.last_needed(after=step) if self.sees_all else None
                if victim is None:
                    return fetched  # every cached block is, or may be, needed sooner
                self.drop(victim)
                store.evict(victim)
            self.add(np.array([block]))
            store.fetch(block)
            fetched += 1
        return fetched

    def _know(self, step: int) -> None:
        """Look ahead until the uses of `step` are known."""
        while self.future.known_until <= step:
            self._file(*self.future.look_ahead())

    def _file(self, blocks: np.ndarray, steps: np.ndarray) -> None:
        """Record the next use, at `steps`, of those of `blocks` that are in the cache."""
        held = self._held[blocks]
        blocks, steps = blocks[held], steps[held]
        order = np.argsort(steps, kind="stable")
        blocks, steps = blocks[order], steps[order]
        begins = np.flatnonzero(np.diff(steps, prepend=-1))
        for begin, end in pairwise([*begins, len(steps)]):
            step = int(steps[begin])
            if step not in self._by_step:
                self._by_step[step] = []
                heapq.heappush(self._steps, -step)
            self._by_step[step].append(blocks[begin:end])
