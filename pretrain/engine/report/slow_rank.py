"""Which rank the others wait for, judged by the time that each needs for itself (`own_time`)."""

import statistics
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

from pretrain.engine.launch.peers import Place

REPORTS = 100
"""So many of the last reports are looked at."""
_LEAST_REPORTS = 20
FACTOR, LEAST_S = 1.2, 0.002
"""A rank counts as slow in a report where its own time is `FACTOR` times the median of the others',
and by `LEAST_S` more: between equal ranks chance decides who is the slowest."""


class SlowRank(NamedTuple):
    """A rank that was the slowest in most reports."""

    rank: int
    host: str
    share: float
    """Of the reports looked at: where it was the slowest, by `FACTOR` at least."""
    factor: float
    """Its own time by the median of the others', in the middle one of these reports."""

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} was the slowest in {self.share:.0%} of the last "
            f"reports: it needs {self.factor:.1f} times what the others need for their data "
            "and a forward pass, and they wait for it"
        )


class SlowRanks:
    """Looks at the reports of a run, the same on every rank."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._found: deque[tuple[int, float] | None] = deque(maxlen=REPORTS)

    def observe(self, own: Sequence[float]) -> int:
        """A report came in; `own` are the seconds of each rank. Returns the slowest."""
        slowest = max(range(len(own)), key=own.__getitem__)
        others = [*own[:slowest], *own[slowest + 1 :]]
        middle = statistics.median(others) if others else own[slowest]
        slow = own[slowest] > max(FACTOR * middle, middle + LEAST_S)
        self._found.append((slowest, own[slowest] / max(middle, 1e-9)) if slow else None)
        return slowest

    def named(self) -> SlowRank | None:
        """The rank that was slow in most of the last reports, if there is one."""
        factors = [found for found in self._found if found is not None]
        if len(self._found) < _LEAST_REPORTS or not factors:
            return None
        (rank, count), *_ = Counter(rank for rank, _ in factors).most_common(1)
        if 2 * count <= len(self._found):
            return None
        host = self._places[rank].host if self._places else "?"
        factor = statistics.median(by for of, by in factors if of == rank)
        return SlowRank(rank, host, round(count / len(self._found), 2), round(factor, 2))
