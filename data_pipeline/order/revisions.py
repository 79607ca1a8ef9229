"""Orders that leave rows out, or take them back, from the border of an epoch on.

Which rows turn out to be bad is no function of (seed, step), so it is recorded: a `Revision` says
from which position on which rows take no part. Positions before it keep their rows. From there on
the order is another one, of the rows that are left, again in closed form and with every row once
per epoch; whoever knows the revisions computes the same.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_pipeline.filters.selection import Selection
from data_pipeline.order.kept_order import KeptOrder
from data_pipeline.order.order import Order, RowOrder
from data_pipeline.rng import keyed_u64

Ranges = list[list[int]]
"""Rows as [first, behind the last] each, in order."""


class Revision(NamedTuple):
    """A change of the rows that take part in one data set."""

    from_position: int
    """First position, in the order of that data set alone, that it holds for."""
    excluded: Ranges
    """Rows of the data set that take no part from there on."""
    released: Ranges
    """Rows that take part again."""


@dataclass(frozen=True, eq=False)
class _Segment:
    """Epochs from `start` on, over the rows of `base` without `excluded`."""

    start: int
    base: Order | KeptOrder
    excluded: np.ndarray
    """(n,) int64 rows of the data set, sorted."""

    @cached_property
    def n_rows(self) -> int:
        """Rows that take part."""
        return self.base.n_rows - len(self.excluded)

    @cached_property
    def order(self) -> Order | KeptOrder:
        """Order of these rows; position 0 is `start`. Made when needed: it holds a bit a row."""
        if not self.start:
            return self.base
        plan = self.base.order if isinstance(self.base, KeptOrder) else self.base
        key = keyed_u64(plan.seed, "revision", self.start) >> 1
        selection = _selection_of(self.base).without(self.excluded)
        return KeptOrder(replace(plan, n_rows=self.n_rows, seed=key), selection)


class RevisedOrder(RowOrder):
    """Position -> row through all revisions; a `RowOrder`.

    Attributes:
        base: the order before any revision.
        n_rows: rows that `base` has, whatever was excluded later.
        stored_rows: rows of the data set that `rows` points into.
    """

    def __init__(self, base: Order | KeptOrder, revisions: Iterable[Revision]) -> None:
        """Apply `revisions`, in the order in which they were made.

        Raises:
            ValueError: one holds from inside an epoch, before an earlier one, or leaves no row.
        """
        self.base = base
        self.n_rows, self.stored_rows = base.n_rows, base.stored_rows
        self._segments = [_Segment(0, base, np.empty(0, np.int64))]
        for revision in revisions:
            self._add(revision)
        self._starts = [segment.start for segment in self._segments]

    def rows(self, positions: np.ndarray, attempt: int = 0) -> np.ndarray:
        """As `RowOrder.rows`; substitutes are rows that take part at their position, too."""
        positions = np.asarray(positions, dtype=np.int64)
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        rows = np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            segment, mine = self._segments[number], np.flatnonzero(numbers == number)
            rows[mine] = segment.order.rows(positions[mine] - segment.start, attempt)
        return rows

    def can_avoid(self, batch: np.ndarray, position: int) -> bool:
        """As `RowOrder.can_avoid`."""
        return self._at(position).order.can_avoid(batch, position)

    def epochs(self, samples: int) -> float:
        """Epochs that `samples` samples are, each over the rows that took part in it."""
        ends = [*self._starts[1:], samples]
        return sum(
            max(min(end, samples) - segment.start, 0) / segment.n_rows
            for segment, end in zip(self._segments, ends, strict=True)
        )

    @property
    def selection_fingerprint(self) -> str:
        """As `RowOrder.selection_fingerprint`, before any revision: these belong to the run, not
        to its data."""
        return self.base.selection_fingerprint

    def next_border(self, position: int) -> int:
        """First position at or behind `position` where a new revision may begin."""
        return _next_border(self._segments[-1], position)

    @property
    def excluded(self) -> np.ndarray:
        """(n,) int64: rows that the last revision leaves out, sorted."""
        return self._segments[-1].excluded

    def describe(self) -> dict[str, int]:
        """As `Order.describe`, of the last revision."""
        return self._segments[-1].order.describe() | {"excluded_rows": len(self.excluded)}

    def _at(self, position: int) -> _Segment:
        return self._segments[bisect_right(self._starts, position) - 1]

    def _add(self, revision: Revision) -> None:
        last, start = self._segments[-1], revision.from_position
        if start < 1 or start != _next_border(last, start):
            raise ValueError(f"a revision from position {start} on, which is no border of an epoch")
        rows = np.union1d(last.excluded, expand(revision.excluded))
        rows = np.setdiff1d(rows, expand(revision.released), assume_unique=True)
        if isinstance(self.base, KeptOrder):
            rows = rows[self.base.selection.contains(rows)]
        if len(rows) >= self.base.n_rows:
            raise ValueError(f"a revision from position {start} on leaves no row")
        if start == last.start:
            self._segments.pop()
        self._segments.append(_Segment(start, self.base, rows))


def revise(order: RowOrder, revisions: Mapping[str, Sequence[Revision]]) -> RowOrder:
    """The order with all revisions of a run, whatever revisions it had before.

    Args:
        order: of a task.
        revisions: source ("" without named sources) -> its revisions, in the order of the ledger.

    Raises:
        ValueError: a revision of a source that the task does not have, or an impossible one.
    """
    orders = dict(order.by_source())
    if unknown := sorted(revisions.keys() - orders.keys()):
        raise ValueError(f"revisions of the sources {unknown}, but there are {sorted(orders)} only")
    for source, own in revisions.items():
        before = orders[source]
        orders[source] = RevisedOrder(
            before.base if isinstance(before, RevisedOrder) else before, own
        )
    return order.with_sources(orders)


def next_border(order: RowOrder, position: int) -> int:
    """First border of an epoch at or behind `position` of a data set's own order, above 0."""
    if not isinstance(order, RevisedOrder):
        order = RevisedOrder(order, [])
    return order.next_border(position)


def excluded_rows(order: RowOrder) -> np.ndarray:
    """(n,) int64: rows that revisions leave out in the end."""
    return order.excluded if isinstance(order, RevisedOrder) else np.empty(0, np.int64)


def expand(ranges: Ranges) -> np.ndarray:
    """(n,) int64 rows of ranges."""
    parts = [np.arange(first, stop, dtype=np.int64) for first, stop in ranges]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def to_ranges(rows: Iterable[int]) -> Ranges:
    """Rows, in any order, as ranges."""
    found = np.unique(np.fromiter(rows, np.int64))
    if not found.size:
        return []
    cuts = np.flatnonzero(np.diff(found) > 1)
    firsts, lasts = found[[0, *(cuts + 1)]], found[[*cuts, -1]]
    return [[first, last + 1] for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]


def _selection_of(order: Order | KeptOrder) -> Selection:
    if isinstance(order, KeptOrder):
        return order.selection
    return Selection.everything(order.n_rows)


def _next_border(segment: _Segment, position: int) -> int:
    epochs = max(-(-(position - segment.start) // segment.n_rows), 0 if segment.start else 1)
    return segment.start + epochs * segment.n_rows
