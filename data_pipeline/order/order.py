"""Which row stands at which position: a closed form, so the state of a stream is one integer.

The rows of a data set are cut into chunks of K neighbours. L = J * T lanes read chunks side by
side: position p goes to row lane j = p mod J in phase t = (p div J) mod T, and every lane walks
through its chunks row by row. L consecutive positions therefore come from L chunks that a keyed
permutation chose: shuffled like single rows, read like files. With L of about 4,096 any window of
1,024 positions is as diverse as a full permutation, even over shards sorted by class and for any
batch size, and no shuffle buffer exists. Nothing here knows ranks, workers or micro-batches.

An epoch has three parts:

* first pass: r whole chunks per lane;
* second pass: what is left (between L and 2L chunks, or everything if the data set is smaller), cut
  into L runs of almost equal length, one run per lane. r is one less than it could be, because a
  second pass over a few chunks would draw thousands of neighbours from a few places;
* tail: one row of each run that is longer than the others, in a flat permutation.

A data set of fewer rows than lanes is all tail: a plain keyed permutation.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data_pipeline.rng import keyed_u64, mix64, permute

# Substitutes of one batch's positions do not meet before this many attempts.
SUBSTITUTE_STRIDES = 16

TARGET_LANES = 4096
DEFAULT_PHASES = 8


class RowOrder(ABC):
    """Which row stands at which position, for one task or one data set: a pure function."""

    n_rows: int
    """Rows that take part."""
    stored_rows: int
    """Rows of the data set that `rows` points into."""

    @abstractmethod
    def rows(self, positions: np.ndarray, attempt: int = 0) -> np.ndarray:
        """Rows at `positions`; evaluate many at once (a call has a fixed cost).

        Args:
            positions: (n,) int64, samples consumed since the start of the run; any order.
            attempt: 0 for the order itself; 1, 2, ... for substitutes of a sample that cannot be
                used: other rows, equally well shuffled, and different for every position and
                attempt of one batch (up to 15 attempts, in batches of up to n_rows / 16).

        Returns:
            (n,) int64 rows in [0, stored_rows).

        Raises:
            ValueError: a negative position or attempt.
        """

    @abstractmethod
    def can_avoid(self, batch: np.ndarray, position: int) -> bool:
        """Whether substitutes of `position` can differ from all rows of its batch, an (n,) array
        of positions. A batch of more than half the data set cannot avoid repetitions."""

    @abstractmethod
    def epochs(self, samples: int) -> float:
        """How many epochs the first `samples` samples are."""

    @property
    @abstractmethod
    def selection_fingerprint(self) -> str:
        """A text that two orders share exactly if the same rows of the data set take part."""

    def epochs_by_source(self, samples: int) -> dict[str, float]:
        """Source -> epochs of that source after `samples` samples; empty without named sources."""
        return {}

    @property
    def images(self) -> "RowOrder":
        """The order of images, each once in a step, behind one of views."""
        return self

    def by_source(self) -> "Mapping[str, RowOrder]":
        """Source -> its own order; "" for a task without named sources."""
        return {"": self}

    def with_sources(self, orders: "Mapping[str, RowOrder]") -> "RowOrder":
        """The same order, with other orders within its sources."""
        return orders[""]

    def taken(self, samples: int) -> dict[str, int]:
        """Source -> how many of the first `samples` samples of the task come from it."""
        return {"": samples}

    def split(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Source -> those of (n,) rows that belong to it, as row numbers of that source."""
        return {"": rows}

    def first_row(self, source: str) -> int:
        """Number of the first row of `source`, where rows of all sources are counted through."""
        return 0


@dataclass(frozen=True)
class Order(RowOrder):
    """Order of `n_rows` rows, epoch after epoch, each row once per epoch.

    The plan constants are part of the data state of a run: choose them when the run starts (see
    `plan`) and never from the number of ranks or workers.
    """

    n_rows: int
    """Rows in the data set, N."""
    seed: int
    """Key of every permutation here."""
    row_lanes: int = TARGET_LANES // DEFAULT_PHASES
    """J: lanes that stand side by side in consecutive positions."""
    phases: int = DEFAULT_PHASES
    """T: groups of J lanes that take turns; a multiple of the worker counts to be used."""
    chunk_rows: int = 64
    """K: neighbouring rows that one lane reads in sequence."""

    def __post_init__(self) -> None:
        for name in ("n_rows", "row_lanes", "phases", "chunk_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"Order: {name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def plan(cls, n_rows: int, seed: int, global_batch: int) -> "Order":
        """Order whose lanes stay with one rank for batches of `global_batch` positions.

        J becomes a multiple of the batch (small batches) or a divisor of it (large ones), so that a
        lane always stands at the same place of the batch.
        """
        low, high = cls.row_lanes, 2 * cls.row_lanes
        if global_batch < low:
            lanes = -(-low // global_batch) * global_batch
        else:
            fits = [j for j in range(low, high + 1) if global_batch % j == 0]
            lanes = global_batch if global_batch <= high else (fits or [low])[-1]
        return cls(n_rows, seed, row_lanes=lanes)

    @property
    def lanes(self) -> int:
        """L = J * T."""
        return self.row_lanes * self.phases

    @property
    def stored_rows(self) -> int:
        """Rows of the data set that `rows` points into: here all of them take part."""
        return self.n_rows

    @property
    def _chunks(self) -> int:
        return self.n_rows // self.chunk_rows

    @property
    def _first_chunks_per_lane(self) -> int:
        return max(self._chunks // self.lanes - 1, 0)

    @property
    def _listed_rows(self) -> int:
        return self.n_rows - self._first_chunks_per_lane * self.lanes * self.chunk_rows

    def epoch(self, position: int) -> int:
        """Completed passes over the data set before `position`."""
        return position // self.n_rows

    def can_avoid(self, batch: np.ndarray, position: int) -> bool:
        """As `RowOrder.can_avoid`."""
        return self.n_rows >= 2 * len(batch)

    def epochs(self, samples: int) -> float:
        """As `RowOrder.epochs`."""
        return samples / self.n_rows

    @property
    def selection_fingerprint(self) -> str:
        """As `RowOrder.selection_fingerprint`."""
        return f"all {self.n_rows}"

    def describe(self) -> dict[str, int]:
        """Plan constants and the rows in each part of an epoch, for logs and the data state."""
        listed, lanes = self._listed_rows, self.lanes
        return {
            "rows": self.n_rows,
            "seed": self.seed,
            "row_lanes": self.row_lanes,
            "phases": self.phases,
            "chunk_rows": self.chunk_rows,
            "first_pass_rows": self.n_rows - listed,
            "second_pass_rows": listed // lanes * lanes,
            "tail_rows": listed % lanes,
        }

    def rows(self, positions: np.ndarray, attempt: int = 0) -> np.ndarray:
        """As `RowOrder.rows`."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size == 0:
            return positions.copy()
        if attempt < 0 or positions.min() < 0:
            raise ValueError(f"positions and attempts start at 0, got {positions.min()}, {attempt}")
        epochs, p = np.divmod(positions, self.n_rows)
        if attempt:
            return self._substitutes(p, epochs, attempt)

        first_rows = self.n_rows - self._listed_rows
        in_first = p < first_rows
        if in_first.all():
            return self._first_pass(p, epochs)
        if not in_first.any():
            return self._listed(p - first_rows, epochs)
        rows = np.empty_like(p)
        rows[in_first] = self._first_pass(p[in_first], epochs[in_first])
        rows[~in_first] = self._listed(p[~in_first] - first_rows, epochs[~in_first])
        return rows

    def _keys(self, epochs: np.ndarray, purpose: str) -> np.ndarray:
        """(n,) or, inside one epoch, (1,) uint64 keys of `purpose`."""
        first, last = int(epochs.min()), int(epochs.max())
        if first == last:
            return np.array([keyed_u64(self.seed, first, purpose)], dtype=np.uint64)
        distinct, which = np.unique(epochs, return_inverse=True)
        keys = [keyed_u64(self.seed, int(epoch), purpose) for epoch in distinct]
        return np.array(keys, dtype=np.uint64)[which]

    def _walk(self, p: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Lane of each position of a pass, and how far the lane has walked, in [0, length)."""
        steps, j = np.divmod(p, self.row_lanes)
        turns, t = np.divmod(steps, self.phases)
        lanes = t * self.row_lanes + j
        # Lanes start at different offsets: otherwise all would open their next chunk at once.
        salt = np.uint64(keyed_u64(self.seed, "stagger"))
        delays = mix64(lanes.astype(np.uint64) + salt) % np.uint64(self.chunk_rows)
        return lanes, (turns + delays.astype(np.int64)) % length

    def _first_pass(self, p: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        lanes, walked = self._walk(p, self._first_chunks_per_lane * self.chunk_rows)
        ordinals, offsets = np.divmod(walked, self.chunk_rows)
        chunks = permute(ordinals * self.lanes + lanes, self._chunks, self._keys(epochs, "chunks"))
        return chunks * self.chunk_rows + offsets

    def _listed(self, p: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Second pass and tail. `p` counts from the start of the second pass.

        Run l has `length` rows, or one more: the extra rows are the tail. It starts at
        l * length + floor(l * tail / L) of the list of left-over rows.
        """
        length, tail = divmod(self._listed_rows, self.lanes)
        in_second = p < length * self.lanes
        listed = np.empty_like(p)
        if in_second.any():
            lanes, walked = self._walk(p[in_second], length)
            runs = permute(lanes, self.lanes, self._keys(epochs[in_second], "runs"))
            listed[in_second] = runs * length + runs * tail // self.lanes + walked
        in_tail = ~in_second
        if in_tail.any():
            extra = permute(
                p[in_tail] - length * self.lanes, tail, self._keys(epochs[in_tail], "tail")
            )
            runs = ((extra + 1) * self.lanes - 1) // tail  # the run that owns this extra row
            listed[in_tail] = (runs + 1) * length + extra
        return self._listed_to_rows(listed, epochs)

    def _listed_to_rows(self, listed: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The list: chunks that the first pass left over, in permuted order, then the short piece
        of fewer than K rows at the end of the data set."""
        used = self._first_chunks_per_lane * self.lanes
        ordinals, offsets = np.divmod(listed, self.chunk_rows)
        ordinals += used
        rows = ordinals * self.chunk_rows + offsets  # right already for the short piece
        whole = np.flatnonzero(ordinals < self._chunks)
        if whole.size:
            keys = self._keys(epochs[whole], "chunks")
            chunks = permute(ordinals[whole], self._chunks, keys)
            rows[whole] = chunks * self.chunk_rows + offsets[whole]
        return rows

    def _substitutes(self, p: np.ndarray, epochs: np.ndarray, attempt: int) -> np.ndarray:
        """Attempt a at p is the row that a keyed permutation gives to p + a * stride (mod N).

        Those arguments differ for all positions of a batch shorter than the stride and all a below
        SUBSTITUTE_STRIDES, so two ranks can replace samples of one batch without asking each other
        and never choose the same row.
        """
        key_number, strides = divmod(attempt, SUBSTITUTE_STRIDES)
        shifted = (p + strides * (self.n_rows // SUBSTITUTE_STRIDES)) % self.n_rows
        return permute(shifted, self.n_rows, self._keys(epochs, f"substitutes {key_number}"))
