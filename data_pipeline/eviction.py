"""Which block to fetch next and which to let go, when the future is known.

The cache keeps what is needed soonest (Belady's rule), and reads ahead of the run by a few steps.
Reading further ahead than a fetch takes would cost downloads: room is made early then, by letting
go of blocks that are still to be used.
"""

import heapq
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from data_pipeline.future import NEVER, Future


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

    def __init__(self, future: Future, blocks: int, *, read_ahead_steps: int, known_uses: int):
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

    def holds(self, block: int) -> bool:
        """Whether a block is in the cache or on its way."""
        return bool(self._held[block])

    def advance(self, step: int) -> None:
        """Let all steps before `step` pass."""
        while self.future.now < step:
            if self.future.known_until <= self.future.now:
                self.look_ahead()
            self._file(*self.future.advance())
        self.front = max(self.front, step)

    def look_ahead(self) -> bool:
        """Look at some more steps; False if all are known that are to be known."""
        future = self.future
        if future.known_until >= future.stop_step or future.pending >= self.known_uses:
            return False
        self._file(*future.look_ahead())
        return True

    def add(self, block: int) -> None:
        """A block has come into the cache."""
        self._held[block] = True
        number = np.array([block])
        self._file(number, self.future.next_use(number))

    def drop(self, block: int) -> None:
        """A block has gone."""
        self._held[block] = False

    def last_needed(self, after: int) -> int | None:
        """The block in the cache whose next use is the last of all, and after step `after`."""
        while self._steps:
            step = -self._steps[0]
            if step <= after:
                return None
            filed = self._by_step[step]
            while filed:
                batch = filed[-1]
                still = self._held[batch] & (self.future.next_use(batch) == step)
                batch = batch[still]
                if batch.size:
                    filed[-1] = batch
                    return int(batch[-1])
                filed.pop()
            del self._by_step[heapq.heappop(self._steps) * -1]
        return None

    def missing(self) -> Iterator[tuple[int, int]]:
        """(step, block) that the read-ahead lacks, soonest first; add or leave each as it comes.

        Going on with the iteration means that the block was added, or is given up.
        """
        end = min(self.future.now + self.read_ahead_steps, self.future.stop_step)
        while self.front < end:
            while self.future.known_until <= self.front:
                self._file(*self.future.look_ahead())
            used = self.future.uses(self.front)
            for block in used[~self._held[used]].tolist():
                yield self.front, block
            self.front += 1

    def fill(self, store: Store) -> None:
        """Fetch what the read-ahead lacks, as far as there is room for it."""
        for step, block in self.missing():
            while not store.has_room(block):
                victim = self.last_needed(after=step)
                if victim is None:
                    return  # all that is here is needed before that block
                self.drop(victim)
                store.evict(victim)
            store.fetch(block)
            self.add(block)

    def _file(self, blocks: np.ndarray, steps: np.ndarray) -> None:
        """Note the next uses of those blocks that are in the cache."""
        held = self._held[blocks]
        blocks, steps = blocks[held], steps[held]
        order = np.argsort(steps, kind="stable")
        blocks, steps = blocks[order], steps[order]
        borders = np.flatnonzero(np.diff(steps)) + 1
        for batch, step in zip(
            np.split(blocks, borders), steps[np.concatenate([[0], borders])].tolist()
            if steps.size else [], strict=False,
        ):
            if step not in self._by_step:
                self._by_step[step] = []
                heapq.heappush(self._steps, -step)
            self._by_step[step].append(batch)
