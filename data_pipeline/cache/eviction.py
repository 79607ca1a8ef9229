"""Which block to fetch next and which to let go, when the future is known.

The cache keeps what is needed soonest (Belady's rule), and reads ahead of the run by a few steps.
Reading further ahead than a fetch takes would cost downloads: room is made early then, by letting
go of blocks that are still to be used.
"""

import heapq
from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import numpy as np

from data_pipeline.cache.future import BlockFuture

KNOWN_USES = 1 << 23
"""Uses to come that are remembered: 200 MB. An epoch of eight million samples on a node."""


class Store(Protocol):
    """Where blocks are put; `cache_plan.Tally` in a simulation, a folder in a run."""

    def has_room(self, block: int) -> bool:
        """Whether a block can be put in without letting go of another one."""

    def fetch(self, block: int) -> None:
        """Put a block in."""

    def evict(self, block: int) -> None:
        """Let go of a block."""


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
        """Whatever is read before this step is in the cache, on its way, or given up."""
        self._held = np.zeros(blocks, dtype=bool)
        # Blocks by next use. Never cleaned up: an entry that no longer holds is passed over.
        self._by_step: dict[int, list[np.ndarray]] = {}
        self._steps: list[int] = []  # heap of the keys above, negated

    def held(self, blocks: np.ndarray) -> np.ndarray:
        """(n,) bool: which blocks are in the cache or on their way."""
        return self._held[blocks]

    def advance(self, step: int) -> None:
        """Let all steps before `step` pass."""
        while self.future.now < step:
            self._know(self.future.now)
            self._by_step.pop(self.future.now, None)
            self._file(*self.future.advance())
        self.front = max(self.front, step)
        if len(self._steps) > 2 * len(self._by_step) + 1024:  # most of them lie behind
            self._steps = [-key for key in self._by_step]
            heapq.heapify(self._steps)

    def look_ahead(self) -> bool:
        """Look at some more steps; False if `sees_all`."""
        if self.sees_all:
            return False
        self._file(*self.future.look_ahead())
        return True

    @property
    def sees_all(self) -> bool:
        """Whether as much of the future is known as is to be known."""
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
        """The block in the cache whose next use is the last of all, and after step `after`."""
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
        """(step, block) that the read-ahead lacks, soonest first; add or leave each as it comes.

        Going on with the iteration means that the block was added, or is given up.
        """
        end = min(self.future.now + self.read_ahead_steps, self.future.stop_step)
        while self.front < end:
            self._know(self.front)
            used = self.future.uses(self.front)
            for block in used[~self._held[used]].tolist():
                yield self.front, block
            self.front += 1

    def fill(self, store: Store, most: int | None = None) -> int:
        """Fetch what the read-ahead lacks, as far as there is room for it.

        Args: most: leave the rest for the next time after so many blocks.
        Returns: how many blocks were fetched.
        """
        fetched = 0
        for step, block in self.missing():
            if fetched == most:
                break
            while not store.has_room(block):
                victim = self.last_needed(after=step) if self.sees_all else None
                if victim is None:
                    return fetched  # all that is here is, or may be, needed before that block
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
        """Note the next uses of those blocks that are in the cache."""
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
