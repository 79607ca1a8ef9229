"""Which positions each rank loads in each step: arithmetic on (step, rank, world), no state."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np

Schedule = Callable[[int], tuple[str, int]]
"""step -> (task, visit): the task of the step, and how many steps it has had before.

A schedule whose steps may run several tasks also has `parts(step) -> [(task, visit), ...]` and
`most_parts`, the most of them; see `pretrain.sampler`.
"""


class MicroBatch(NamedTuple):
    """Request for one forward pass on one rank; what the sampler sends to a worker."""

    step: int
    """Optimizer step."""
    micro: int
    """Micro-step within the step, counted through all its parts."""
    task: str
    positions: tuple[int, ...]
    """Position of each row in the task's order; -1 for padding."""
    valid: tuple[bool, ...]
    """False for padding rows, which exist so that all ranks have equal shapes."""


class Batched(Protocol):
    """The part of a task that decides how its batches are dealt."""

    global_batch: int
    micro_batch: int


def deal(global_batch: int, micro_batch: int, rank: int, world: int) -> list[np.ndarray]:
    """Offsets into the global batch for each micro-step of one rank.

    Pairs of neighbours are dealt like cards, pair q to rank q mod world, so that partners share a
    micro-batch and a row lane of the order stays with one rank. All ranks have the same number of
    micro-steps of the same sizes; where a rank has too few samples -1 fills the row.

    Args:
        global_batch: samples per step over all ranks; micro_batch: most samples per forward pass,
            even or 1.

    Returns:
        one (b,) int64 array per micro-step.
    """
    shares = [_share(global_batch, other, world) for other in (rank, 0)]
    own, longest = shares[0], max(len(share) for share in shares)  # rank 0 never has fewer
    padded = np.full(longest, -1, dtype=np.int64)
    padded[: len(own)] = own
    return [padded[start : start + micro_batch] for start in range(0, longest, micro_batch)]


def check_batches(task: str, global_batch: int, micro_batch: int) -> None:
    """Raise ValueError for batch sizes that cannot be dealt."""
    if global_batch < 1 or micro_batch < 1:
        raise ValueError(f"task {task}: global_batch and micro_batch must be at least 1")
    if micro_batch > 1 and micro_batch % 2:
        raise ValueError(
            f"task {task}: micro_batch {micro_batch} would part neighbours that belong together; "
            "use an even number, or 1"
        )


class StepSampler:
    """Yields the MicroBatch requests of one rank, step after step; iterates any number of times."""

    def __init__(
        self,
        schedule: Schedule,
        tasks: Mapping[str, Batched],
        rank: int,
        world: int,
        start_step: int,
        stop_step: int,
    ) -> None:
        """Steps [start_step, stop_step) of `schedule` over `tasks` (name -> batch sizes)."""
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} does not exist in a world of {world}")
        for name, task in tasks.items():
            check_batches(name, task.global_batch, task.micro_batch)
        self.schedule, self.tasks = schedule, tasks
        self.rank, self.world = rank, world
        self.start_step, self.stop_step = start_step, stop_step

    def from_step(self, step: int) -> "StepSampler":
        """The same from another step on."""
        return StepSampler(self.schedule, self.tasks, self.rank, self.world, step, self.stop_step)

    def micro_steps(self, task: str) -> int:
        """Forward passes of one step of `task`, equal on all ranks."""
        batched = self.tasks[task]
        return len(deal(batched.global_batch, batched.micro_batch, self.rank, self.world))

    def parts(self, step: int) -> list[tuple[str, range]]:
        """Tasks of a step, in the order in which they run, and the positions of their global
        batches, over all ranks."""
        parts = self.schedule.parts(step) if self._has_parts() else [self.schedule(step)]
        sizes = {task: self.tasks[task].global_batch for task, _ in parts}
        return [(task, range(v * sizes[task], (v + 1) * sizes[task])) for task, v in parts]

    def most_micro_steps(self) -> int:
        """Most forward passes of one step."""
        most = self.schedule.most_parts if self._has_parts() else 1
        return sum(sorted(self.micro_steps(task) for task in self.tasks)[-most:])

    def _has_parts(self) -> bool:
        return hasattr(self.schedule, "parts")

    def __iter__(self) -> Iterator[MicroBatch]:
        dealt = {
            name: deal(task.global_batch, task.micro_batch, self.rank, self.world)
            for name, task in self.tasks.items()
        }
        for step in range(self.start_step, self.stop_step):
            shares = [(t, span, o) for t, span in self.parts(step) for o in dealt[t]]
            for micro, (task, span, offsets) in enumerate(shares):
                valid = offsets >= 0
                positions = np.where(valid, span.start + offsets, -1)
                yield MicroBatch(
                    step, micro, task, tuple(positions.tolist()), tuple(valid.tolist())
                )


def _share(global_batch: int, rank: int, world: int) -> np.ndarray:
    offsets = np.arange(global_batch)
    return offsets[offsets // 2 % world == rank]
