"""Which task runs at which step: a pure function of (seed, step, weights).

Steps are cut into cycles of equal length. Each cycle runs every task exactly as often as its share
says, in an order drawn by (seed, cycle). No rank asks another, nothing is saved, and step 10**9
costs what step 0 costs.
"""

from collections.abc import Mapping
from fractions import Fraction
from math import isfinite, lcm

import numpy as np

from data_pipeline.rng import keyed_u64, mix64

MAX_CYCLE = 4096
"""Longest cycle that real weights are apportioned to; a share is then off by at most 1/4096."""

GOOD_ERROR = 1e-3
"""The shortest cycle whose shares are all this close (relatively) is taken."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Schedule:
    """`schedule(step) -> (task, visit)`: the step is the task's visit number `visit`, both from 0.

    Visits of a task are consecutive, so that visit v of a task reads the positions
    [v * global_batch, (v + 1) * global_batch) of its own data order.

    Args:
        tasks: name -> weight (> 0), in any unit and order.
        seed: the run's seed.

    Attributes:
        cycle: steps of a cycle.
        slots: task -> its steps in every cycle, at least 1.
        error: largest relative deviation of a task's share from its weight's share; 0 if exact.
    """

    def __init__(self, tasks: Mapping[str, float], seed: int) -> None:
        if not tasks:
            raise ValueError("a schedule needs at least one task")
        for name, weight in tasks.items():
            if not (isfinite(weight) and weight > 0):
                raise ValueError(f"task {name}: weight must be positive and finite, not {weight}")
        # Sorted, so that the order of a recipe's lines does not matter.
        self.names = sorted(tasks)
        counts, self.error = apportion([tasks[name] for name in self.names])
        self.slots = dict(zip(self.names, counts, strict=True))
        self.cycle = sum(counts)
        self.seed = seed
        self._counts = np.array(counts, dtype=np.int64)
        self._drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, step: int) -> tuple[str, int]:
        """Task of a step and how many steps before it ran the same task. O(cycle) at most."""
        cycle, place = self._locate(step)
        tasks, earlier = self._draw(cycle)
        task = int(tasks[place])
        return self.names[task], cycle * int(self._counts[task]) + int(earlier[place])

    def visits(self, step: int) -> dict[str, int]:
        """Visits of every task in the steps before `step`."""
        cycle, place = self._locate(step)
        tasks, _ = self._draw(cycle)
        here = np.bincount(tasks[:place], minlength=len(self.names))
        return {
            name: int(count)
            for name, count in zip(self.names, cycle * self._counts + here, strict=True)
        }

    def describe(self) -> str:
        """One line for people: the cycle, each task's share of it, and the error."""
        shares = ", ".join(f"{name} {count}/{self.cycle}" for name, count in self.slots.items())
        return f"cycle of {self.cycle} steps: {shares}; largest error of a share {self.error:.2%}"

    def _locate(self, step: int) -> tuple[int, int]:
        if step < 0:
            raise ValueError(f"step must be 0 or more, not {step}")
        return divmod(step, self.cycle)

    def _draw(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Tasks of one cycle's steps, and how often each ran before within the cycle."""
        if cycle not in self._drawn:
            if len(self._drawn) >= 4:  # readers move forward together; a few cycles are enough
                self._drawn.pop(next(iter(self._drawn)))
            # Sorting keyed 64-bit hashes gives a uniform permutation that, unlike numpy's own
            # shuffle, is the same under every version of numpy.
            key = np.uint64(keyed_u64(self.seed, "schedule", cycle))
            counter = np.arange(1, self.cycle + 1, dtype=np.uint64)
            order = np.argsort(mix64(counter * _GOLDEN + key), kind="stable")
            tasks = np.repeat(np.arange(len(self.names)), self._counts)[order]
            earlier = np.zeros(self.cycle, dtype=np.int64)
            for task, count in enumerate(self._counts):
                earlier[tasks == task] = np.arange(count)
            self._drawn[cycle] = (tasks, earlier)
        return self._drawn[cycle]


def apportion(weights: list[float], max_cycle: int = MAX_CYCLE) -> tuple[list[int], float]:
    """Whole numbers in proportion to `weights`, each at least 1, whose sum is at most `max_cycle`.

    Shares that are fractions of a common denominator (1 : 3, or 0.1, 0.2, 0.7) are met exactly.
    Otherwise largest remainders give the counts of the shortest cycle within `GOOD_ERROR`, or of
    the best one.

    Returns:
        (counts, largest relative error of a share).
    """
    if len(weights) > max_cycle:
        raise ValueError(f"{len(weights)} tasks do not fit into a cycle of {max_cycle} steps")
    total = sum(Fraction(weight) for weight in weights)
    shares = [Fraction(weight) / total for weight in weights]
    near = [share.limit_denominator(max_cycle) for share in shares]
    cycle = lcm(*(share.denominator for share in near))
    # The tolerance forgives binary fractions: 0.1 is not exactly a tenth.
    is_exact = all(abs(a - b) < b * Fraction(1, 10**12) for a, b in zip(near, shares, strict=True))
    if is_exact and cycle <= max_cycle and sum(near) == 1:
        return [int(share * cycle) for share in near], 0.0
    target = np.array([float(share) for share in shares])
    best: tuple[float, np.ndarray] | None = None
    for cycle in range(len(weights), max_cycle + 1):
        counts = _largest_remainders(target, cycle)
        error = float(np.max(np.abs(counts / cycle - target) / target))
        if best is None or error < best[0]:
            best = (error, counts)
        if error <= GOOD_ERROR:
            break
    assert best is not None
    return best[1].tolist(), best[0]


def _largest_remainders(shares: np.ndarray, total: int) -> np.ndarray:
    """Counts that sum to `total`: each quota's floor, at least 1; the rest by remainder."""
    counts = np.maximum(np.floor(shares * total).astype(np.int64), 1)
    missing = total - int(counts.sum())
    if missing >= 0:
        order = np.argsort(counts - shares * total, kind="stable")
        counts[order[:missing]] += 1
    while counts.sum() > total:  # the tasks that were lifted to 1 took from the others
        surplus = np.where(counts > 1, counts - shares * total, -np.inf)
        counts[int(np.argmax(surplus))] -= 1
    return counts
