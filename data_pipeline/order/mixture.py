"""Exact proportions by a closed form: which of several things stands at position n.

Positions are cut into cycles of equal length. Each cycle holds every thing exactly as often as its
share says, in an order drawn by (seed, cycle). Nothing is counted or saved: position 10**9 costs
what position 0 costs. The tasks of a run (steps) and the data sets of a task (pairs of samples) are
dealt by the same code.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import isfinite, lcm

import numpy as np

from data_pipeline.rng import keyed_u64, mix64

MAX_CYCLE = 4096
"""Longest cycle that real weights are apportioned to; a share is then off by at most 1/4096."""

GOOD_ERROR = 1e-3
"""The shortest cycle whose shares are all this close (relatively) is taken."""

# Cycles that are kept: readers move forward together, so that a few are enough.
_KEPT_CYCLES = 4

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class BlockCycle:
    """Deals positions 0, 1, 2, ... to choices 0 .. K - 1 in exact proportion to weights.

    Args:
        weights: (K,) positive numbers in any unit.
        seed, purpose: key of the permutation of every cycle.

    Attributes:
        counts: (K,) positions of each choice in every cycle, at least 1.
        length: positions of a cycle, the sum of `counts`.
        error: largest relative deviation of a share from its weight's share; 0 if exact.
    """

    def __init__(self, weights: Sequence[float], seed: int, purpose: str) -> None:
        counts, self.error = apportion(list(weights))
        self.counts = np.array(counts, dtype=np.int64)
        self.length = int(self.counts.sum())
        self.seed, self.purpose = seed, purpose
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Choice of each position, and how many positions before it have the same choice.

        Args:
            positions: (n,) int64, 0 or more, any order. Neighbours are cheap: what costs is the
                number of distinct cycles.

        Returns:
            (n,) int64 choices and (n,) int64 places.
        """
        cycles, places = np.divmod(np.asarray(positions, dtype=np.int64), self.length)
        distinct, which = np.unique(cycles, return_inverse=True)
        choices, earlier = self._cycles(distinct)
        found = choices[which, places]
        return found, cycles * self.counts[found] + earlier[which, places]

    def locate_one(self, position: int) -> tuple[int, int]:
        """`locate` for one position, without the cost of arrays."""
        cycle, place = divmod(position, self.length)
        choices, earlier = self._cycle(cycle)
        choice = int(choices[place])
        return choice, cycle * int(self.counts[choice]) + int(earlier[place])

    def before(self, position: int) -> np.ndarray:
        """(K,) int64: positions of each choice among the first `position` ones."""
        cycle, place = divmod(position, self.length)
        choices, _ = self._cycle(cycle)
        return cycle * self.counts + np.bincount(choices[:place], minlength=len(self.counts))

    def describe(self, names: Sequence[str], unit: str) -> str:
        """One line for people: the cycle, each share of it, and the error."""
        shares = ", ".join(
            f"{name} {count}/{self.length}" for name, count in zip(names, self.counts, strict=True)
        )
        return f"cycle of {self.length} {unit}: {shares}; largest error of a share {self.error:.2%}"

    def _cycles(self, cycles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(m, length) choices and earlier occurrences within each of m distinct cycles."""
        if len(cycles) > _KEPT_CYCLES:
            return self._draw(cycles)
        rows = [self._cycle(cycle) for cycle in cycles.tolist()]
        if not rows:
            return self._draw(cycles)
        return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])

    def _cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        if cycle not in self._kept:
            if len(self._kept) >= _KEPT_CYCLES:
                self._kept.pop(next(iter(self._kept)))
            choices, earlier = self._draw(np.array([cycle]))
            self._kept[cycle] = choices[0], earlier[0]
        return self._kept[cycle]

    def _draw(self, cycles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keys = [keyed_u64(self.seed, self.purpose, cycle) for cycle in cycles.tolist()]
        return arrange(self.counts, np.array(keys, dtype=np.uint64))


def arrange(counts: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Uniformly random orders of counts[0] zeros, counts[1] ones, ..., one order per key.

    Args:
        counts: (K,) int64, sum N; zeros are allowed.
        keys: (m,) uint64.

    Returns:
        (m, N) int64 choices, and (m, N) int64: how often each stood earlier in its row.
    """
    # Sorting keyed 64-bit hashes gives a uniform permutation that, unlike numpy's own shuffle, is
    # the same under every version of numpy.
    counter = np.arange(1, int(counts.sum()) + 1, dtype=np.uint64)
    order = np.argsort(mix64(counter * _GOLDEN + keys[:, None]), axis=1, kind="stable")
    choices = np.repeat(np.arange(len(counts)), counts)[order]
    earlier = np.zeros(choices.shape, dtype=np.int64)
    for choice in range(len(counts)):
        same = choices == choice
        earlier[same] = (np.cumsum(same, axis=1) - 1)[same]
    return choices, earlier


def apportion(weights: list[float], max_cycle: int = MAX_CYCLE) -> tuple[list[int], float]:
    """Whole numbers in proportion to `weights`, each at least 1, whose sum is at most `max_cycle`.

    Shares that are fractions of a common denominator (1 : 3, or 0.1, 0.2, 0.7) are met exactly.
    Otherwise largest remainders give the counts of the shortest cycle within `GOOD_ERROR`, or of
    the best one. Only sums, products and quotients are used, so every machine finds the same.

    Returns:
        (counts, largest relative error of a share).

    Raises:
        ValueError: no weights, more than `max_cycle`, or one that is not positive and finite.
    """
    if not weights or not all(isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights must be positive and finite, not {weights}")
    if len(weights) > max_cycle:
        raise ValueError(f"{len(weights)} weights do not fit into a cycle of {max_cycle}")
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
