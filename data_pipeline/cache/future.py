"""Which blocks the ranks of one node will read, step by step; computed, not observed."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from data_pipeline.cache.blocks import Blocks
from data_pipeline.order.step_sampler import StepSampler, deal

RowsOf = Callable[[np.ndarray], np.ndarray]
"""Positions of a task, (n,) int64 -> rows, (n,) int64."""

NEVER = np.iinfo(np.int64).max
"""Next use of a block that is not read again as far as is known."""

# Positions that are worth one evaluation of the order.
_BATCH_POSITIONS = 1 << 15


class NodeReads:
    """The blocks that some ranks read at each step.

    Args:
        sampler: steps, tasks and batch sizes of the run; its own rank does not matter.
        rows: task -> what turns positions into rows.
        blocks: the numbering, with a set for each task.
        ranks: of this node.
    """

    def __init__(
        self, sampler: StepSampler, rows: Mapping[str, RowsOf], blocks: Blocks, ranks: Sequence[int]
    ) -> None:
        self.sampler, self.rows, self.blocks = sampler, rows, blocks
        self._offsets = {name: self._offsets_of(name, ranks) for name in rows}

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Go through steps [start, stop) in batches.

        Yields:
            (end, steps, blocks): everything that is read before step `end` and was not yielded
            before, as (n,) int64 pairs, each once, sorted by step and then by block.
        """
        while start < stop:
            end, spans = self._batch(start, stop)
            parts = [
                self._uses(name, np.array(steps), np.array(firsts))
                for name, (steps, firsts) in spans.items()
            ]
            steps = np.concatenate([part[0] for part in parts] or [np.empty(0, np.int64)])
            blocks = np.concatenate([part[1] for part in parts] or [np.empty(0, np.int64)])
            pairs = np.unique((steps - start) * len(self.blocks) + blocks)
            yield end, start + pairs // len(self.blocks), pairs % len(self.blocks)
            start = end

    def _batch(self, start: int, stop: int) -> tuple[int, dict[str, tuple[list, list]]]:
        """As many steps as are worth one evaluation: (end, task -> (steps, first positions))."""
        spans: dict[str, tuple[list[int], list[int]]] = {}
        step, positions = start, 0
        while step < stop and positions < _BATCH_POSITIONS:
            for name, span in self.sampler.parts(step):
                if name in self._offsets:
                    steps, firsts = spans.setdefault(name, ([], []))
                    steps.append(step)
                    firsts.append(span.start)
                    positions += len(self._offsets[name])
            step, positions = step + 1, positions + 1
        return step, spans

    def _uses(
        self, name: str, steps: np.ndarray, firsts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        offsets = self._offsets[name]
        rows = self.rows[name]((firsts[:, None] + offsets).reshape(-1))
        return np.repeat(steps, len(offsets)), self.blocks.of_rows(name, rows)

    def _offsets_of(self, name: str, ranks: Sequence[int]) -> np.ndarray:
        task, world = self.sampler.tasks[name], self.sampler.world
        dealt = [deal(task.global_batch, task.micro_batch, rank, world) for rank in ranks]
        offsets = np.concatenate([places for shares in dealt for places in shares])
        return offsets[offsets >= 0]


class BlockFuture:
    """When each block is read next, as a run goes on; knows as far ahead as it has looked.

    A use costs 24 bytes while it lies ahead, a block 16 bytes (of memory that is touched only once
    the block has been seen).
    """

    def __init__(self, reads: NodeReads, start_step: int, stop_step: int) -> None:
        """Start before `start_step`, having seen nothing; the run ends at `stop_step`."""
        self.now = start_step
        self.known_until = start_step
        """Uses before this step are known."""
        self.stop_step = stop_step
        self._scan = reads.steps(start_step, stop_step)
        self._next = np.zeros(len(reads.blocks), dtype=np.int64)  # step + 1; 0: not known
        self._last = np.zeros(len(reads.blocks), dtype=np.int64)  # number of the last use, from 1
        self._blocks = np.empty(0, dtype=np.int64)  # of every use that lies ahead
        self._following = np.empty(0, dtype=np.int64)  # step of the same block's next use
        self._steps = np.empty(0, dtype=np.int64)
        self._gone = 0  # uses that lie behind and are forgotten
        self._begin = 0  # first use of the arrays that lies ahead

    @property
    def pending(self) -> int:
        """Uses that are known and lie ahead."""
        return len(self._blocks) - self._begin

    def next_use(self, blocks: np.ndarray) -> np.ndarray:
        """(n,) int64: the next step at or after `now` that reads each block, or NEVER."""
        steps = self._next[blocks] - 1
        return np.where(steps < 0, NEVER, steps)

    def look_ahead(self) -> tuple[np.ndarray, np.ndarray]:
        """Look at some more steps.

        Returns:
            (blocks, steps): blocks that had no known next use, and the one that they have now.
        """
        end, steps, blocks = next(self._scan)
        first_number = self._gone + len(self._blocks) + 1
        order = np.lexsort((steps, blocks))
        ordered, ordered_steps = blocks[order], steps[order]
        same = ordered[1:] == ordered[:-1]
        following = np.full(len(blocks), NEVER)
        following[order[:-1][same]] = ordered_steps[1:][same]
        firsts = np.flatnonzero(np.concatenate([[True], ~same])[: len(blocks)])
        lasts = np.flatnonzero(np.concatenate([~same, [True]])[: len(blocks)])

        distinct, first_steps = ordered[firsts], ordered_steps[firsts]
        before = self._last[distinct]
        ahead = before > self._gone + self._begin  # the use before lies ahead: the chain goes on
        self._following[before[ahead] - self._gone - 1] = first_steps[ahead]
        self._next[distinct[~ahead]] = first_steps[~ahead] + 1
        self._last[distinct] = first_number + order[lasts]

        keep = slice(self._begin, None)
        self._gone, self._begin = self._gone + self._begin, 0
        self._blocks = np.concatenate([self._blocks[keep], blocks])
        self._following = np.concatenate([self._following[keep], following])
        self._steps = np.concatenate([self._steps[keep], steps])
        self.known_until = end
        return distinct[~ahead], first_steps[~ahead]

    def uses(self, step: int) -> np.ndarray:
        """Blocks that are read at a step in [now, known_until), ascending."""
        begin, end = np.searchsorted(self._steps, (step, step + 1))
        return self._blocks[begin:end]

    def advance(self) -> tuple[np.ndarray, np.ndarray]:
        """Let the step `now` pass.

        Returns:
            (blocks, steps): the blocks that it read, and when each is read next (NEVER: unknown).
        """
        while self.known_until <= self.now < self.stop_step:
            self.look_ahead()
        end = int(np.searchsorted(self._steps, self.now + 1))
        blocks, following = self._blocks[self._begin : end], self._following[self._begin : end]
        self._next[blocks] = np.where(following == NEVER, 0, following + 1)
        self._begin = end
        self.now += 1
        return blocks, following
