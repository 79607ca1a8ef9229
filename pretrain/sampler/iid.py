"""Steps that draw their task independently, with counts that need no counting.

Steps are grouped into leaves of `LEAF` steps and these into segments that double: leaf 0, leaf 1,
leaves 2-3, 4-7, 8-15, ... The counts of a segment are multinomial, independent of the others. A
segment splits into halves, these into quarters, down to leaves; given the counts of the whole,
those of its left half are multivariate hypergeometric. Within a leaf the counts are arranged in
uniformly random order. That is the law of independent draws, taken apart: not an approximation of
it (rounding: see `binomial`), yet the visits before any step are a sum over one path, O(tasks x
log step). What is drawn from depends on (seed, segment or node, task) only.
"""

from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from data_pipeline.order.mixture import arrange
from data_pipeline.rng import keyed_u64
from pretrain.sampler.binomial import binomial, hypergeometric
from pretrain.sampler.schedule import Schedule, checked_names, checked_step

LEAF = 1024

# Enough for every node above a few places that are read by turns.
_KEPT_NODES = 512
_KEPT_LEAVES = 4


class IidSchedule(Schedule):
    """Each step runs task k with probability weight_k / sum of weights, whatever ran before.

    Args:
        weights: task -> weight (> 0), in any unit and order.
        seed: key of all draws.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        self.names = checked_names(weights)
        self.seed = seed
        exact = [Fraction(weights[name]) for name in self.names]
        self._shares = [weight / sum(exact) for weight in exact]
        self._nodes: dict[tuple[int, int], list[int]] = {}
        self._leaves: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __call__(self, step: int) -> tuple[str, int]:
        leaf, place = divmod(checked_step(step), LEAF)
        before, tasks, earlier = self._leaf(leaf)
        task = int(tasks[place])
        return self.names[task], int(before[task] + earlier[place])

    def visits(self, step: int) -> dict[str, int]:
        leaf, place = divmod(checked_step(step), LEAF)
        before, tasks, _ = self._leaf(leaf)
        counts = before + np.bincount(tasks[:place], minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def ratio(self, step: int) -> dict[str, float]:
        return {name: float(share) for name, share in zip(self.names, self._shares, strict=True)}

    def describe(self) -> str:
        shares = ", ".join(f"{name} {share:.4g}" for name, share in self.ratio(0).items())
        return f"every step draws its task independently: {shares}"

    def _leaf(self, leaf: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Visits before the leaf (K,), its tasks (LEAF,), and how often each ran before in it."""
        if leaf not in self._leaves:
            if len(self._leaves) >= _KEPT_LEAVES:
                self._leaves.pop(next(iter(self._leaves)))
            before, counts = self._counts(leaf)
            key = np.array([keyed_u64(self.seed, "iid leaf", leaf)], dtype=np.uint64)
            tasks, earlier = arrange(np.array(counts), key)
            self._leaves[leaf] = np.array(before), tasks[0], earlier[0]
        return self._leaves[leaf]

    def _counts(self, leaf: int) -> tuple[list[int], list[int]]:
        """Visits before a leaf, and in it."""
        number = leaf.bit_length()
        before = [0] * len(self.names)
        for segment in range(number):
            before = _sum(before, self._segment(segment))
        counts = self._segment(number)
        first, leaves = 1 << number >> 1, max(1 << number >> 1, 1)
        while leaves > 1:
            left = self._left_half(first, leaves, counts)
            leaves //= 2
            if leaf < first + leaves:
                counts = left
            else:
                before = _sum(before, left)
                counts = [whole - part for whole, part in zip(counts, left, strict=True)]
                first += leaves
        return before, counts

    def _segment(self, number: int) -> list[int]:
        """Multinomial counts of segment 0 (leaf 0) or of leaves [2**(number-1), 2**number)."""

        def draw() -> list[int]:
            steps, share, counts = LEAF * max(1 << number >> 1, 1), Fraction(1), []
            for task, own in enumerate(self._shares[:-1]):
                count = binomial(steps, own / share, self.seed, "iid segment", number, task)
                counts.append(count)
                steps, share = steps - count, share - own
            return [*counts, steps]

        return self._keep((number, 0), draw)

    def _left_half(self, first: int, leaves: int, counts: list[int]) -> list[int]:
        """Counts of the first half of `leaves` leaves from `first` on that hold `counts`."""

        def draw() -> list[int]:
            others, taken, left = leaves * LEAF, leaves * LEAF // 2, []
            for task, count in enumerate(counts[:-1]):
                others -= count
                name = (self.seed, "iid half", first, leaves, task)
                left.append(hypergeometric(count, others, taken, *name))
                taken -= left[-1]
            return [*left, taken]

        return self._keep((first, leaves), draw)

    def _keep(self, name: tuple[int, int], draw) -> list[int]:
        if name not in self._nodes:
            if len(self._nodes) >= _KEPT_NODES:
                self._nodes.clear()
            self._nodes[name] = draw()
        return self._nodes[name]


def _sum(one: list[int], other: list[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]
