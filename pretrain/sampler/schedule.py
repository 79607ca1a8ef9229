"""What a schedule answers; the two whose arithmetic is a line or two.

Visits of a task are consecutive whatever the schedule, so that visit v of a task reads the
positions [v * global_batch, (v + 1) * global_batch) of its own data order.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import isfinite
from types import MappingProxyType

from data_pipeline.order.mixture import BlockCycle


class Schedule(ABC):
    """Which tasks run at which step.

    Attributes:
        names: all tasks, sorted, so that the order of a recipe's lines does not matter.
        most_parts: most tasks of one step.
        own_weights: task -> factor of its loss besides the schedule's own; 1 where none is named.
    """

    names: list[str]
    most_parts: int = 1
    own_weights: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def __call__(self, step: int) -> tuple[str, int]:
        """Task of a step, and how many steps before it ran the same task.

        Raises:
            ValueError: the step is negative, or runs several tasks (ask `parts`).
        """

    @abstractmethod
    def visits(self, step: int) -> dict[str, int]:
        """Visits of every task in the steps before `step`."""

    @abstractmethod
    def ratio(self, step: int) -> dict[str, float]:
        """Share of the steps that run each task, as in force at `step`: the s_k of MT-AdamW.

        0 for a task that is off. In mode mixed every step runs every task, so it is 1.
        """

    @abstractmethod
    def describe(self) -> str:
        """Lines for people: cycle, shares, error."""

    def parts(self, step: int) -> list[tuple[str, int]]:
        """(task, visit) of everything that one step runs."""
        return [self(step)]

    def loss_weights(self, step: int) -> dict[str, float]:
        """Factor of each part's loss in the loss of the step."""
        shares = self.loss_shares(step)
        return {task: share * self.own_weights.get(task, 1.0) for task, share in shares.items()}

    def loss_shares(self, step: int) -> dict[str, float]:
        """The schedule's own part of these factors; they sum to 1."""
        return {task: 1.0 for task, _ in self.parts(step)}


class BlockSchedule(Schedule):
    """Cycles of equal length that run every task exactly as often as its share says.

    Args:
        weights: task -> weight (> 0), in any unit and order.
        seed: key of the order inside each cycle.

    Attributes:
        cycle: steps of a cycle.
        slots: task -> its steps in every cycle, at least 1.
        error: largest relative deviation of a task's share from its weight's share; 0 if exact.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        self.names = checked_names(weights)
        self._cycle = BlockCycle([weights[name] for name in self.names], seed, "schedule")
        self.cycle, self.error = self._cycle.length, self._cycle.error
        self.slots = dict(zip(self.names, self._cycle.counts.tolist(), strict=True))

    def __call__(self, step: int) -> tuple[str, int]:
        task, visit = self._cycle.locate_one(checked_step(step))
        return self.names[task], visit

    def visits(self, step: int) -> dict[str, int]:
        counts = self._cycle.before(checked_step(step))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def ratio(self, step: int) -> dict[str, float]:
        return {name: slots / self.cycle for name, slots in self.slots.items()}

    def describe(self) -> str:
        return self._cycle.describe(self.names, "steps")


class MixedSchedule(Schedule):
    """Every step runs all tasks: the baseline that unmixed steps are compared with.

    The gradient of a step is that of sum_k w_k loss_k, with the weights w normalised to 1.

    Args:
        weights: task -> weight (> 0) of its loss.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.names = checked_names(weights)
        self.most_parts = len(self.names)
        total = sum(weights[name] for name in self.names)
        self._shares = {name: weights[name] / total for name in self.names}

    def __call__(self, step: int) -> tuple[str, int]:
        if self.most_parts > 1:
            raise ValueError("a mixed step runs several tasks: ask parts(step)")
        return self.names[0], checked_step(step)

    def parts(self, step: int) -> list[tuple[str, int]]:
        return [(name, checked_step(step)) for name in self.names]

    def visits(self, step: int) -> dict[str, int]:
        return dict.fromkeys(self.names, checked_step(step))

    def ratio(self, step: int) -> dict[str, float]:
        return dict.fromkeys(self.names, 1.0)

    def loss_shares(self, step: int) -> dict[str, float]:
        return dict(self._shares)

    def describe(self) -> str:
        shares = ", ".join(f"{name} {share:.4g}" for name, share in self._shares.items())
        return f"every step runs all tasks; weights of their losses: {shares}"


def checked_names(weights: Mapping[str, float]) -> list[str]:
    """The tasks, sorted. Raises ValueError for a weight that is not positive and finite."""
    if not weights:
        raise ValueError("a schedule needs at least one task")
    for name, weight in weights.items():
        if not (isfinite(weight) and weight > 0):
            raise ValueError(f"task {name}: weight must be positive and finite, not {weight}")
    return sorted(weights)


def checked_step(step: int) -> int:
    """The step. Raises ValueError if it is negative."""
    if step < 0:
        raise ValueError(f"step must be 0 or more, not {step}")
    return step
