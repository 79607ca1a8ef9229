"""Repeated augmentation: every image several times in a batch, with different draws.

A global batch of B positions, or views, has B / R images, R times each. Its first B / R positions
show each of them once, in the order of the images, and so does every further B / R. Copies of an
image thus stand B / R apart, and partners, the positions P and P xor 1, are different images, as
long as B / R is even. Draws are keyed by position, so that every copy has its own.
"""

import copy
from collections.abc import Mapping

import numpy as np

from data_pipeline.order.order import RowOrder


class RepeatedOrder(RowOrder):
    """Position of a view -> row; a `RowOrder`.

    Args:
        images: order of the images, each once; quarantine and ledger speak of its positions.
        global_batch: views per step, B.
        repeats: views of each image in a batch, R.

    Attributes:
        n_rows, stored_rows: as of `images`.
    """

    def __init__(self, images: RowOrder, global_batch: int, repeats: int) -> None:
        if problem := repeats_problem(global_batch, repeats):
            raise ValueError(problem)
        self._images, self.global_batch, self.repeats = images, global_batch, repeats
        self.n_rows, self.stored_rows = images.n_rows, images.stored_rows

    def rows(self, positions: np.ndarray, attempt: int = 0) -> np.ndarray:
        """As `RowOrder.rows`; copies of an image also have the same substitutes."""
        return self.images.rows(self.places(positions), attempt)

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the order of the images, (n,) int64, at positions of views, (n,) int64."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"positions start at 0, got {positions.min()}")
        own = self.global_batch // self.repeats
        batches, offsets = np.divmod(positions, self.global_batch)
        return batches * own + offsets % own

    def images_of(self, samples: int) -> int:
        """Images of which the first `samples` views are."""
        own = self.global_batch // self.repeats
        batches, begun = divmod(samples, self.global_batch)
        return batches * own + min(begun, own)

    def can_avoid(self, batch: np.ndarray, position: int) -> bool:
        """As `RowOrder.can_avoid`."""
        (place,) = self.places(np.array([position])).tolist()
        return self.images.can_avoid(np.unique(self.places(batch)), place)

    def epochs_by_source(self, samples: int) -> dict[str, float]:
        """As `RowOrder.epochs`, over images."""
        return self.images.epochs_by_source(self.images_of(samples))

    def epochs(self, samples: int) -> float:
        """Epochs over images that `samples` views are."""
        return self.images.epochs(self.images_of(samples))

    @property
    def selection_fingerprint(self) -> str:
        """As `RowOrder.selection_fingerprint`, and how often: a run cannot go on with another
        number, since a step would then stand for other images."""
        return f"{self.images.selection_fingerprint}, {self.repeats} times"

    @property
    def images(self) -> RowOrder:
        """As `RowOrder.images`."""
        return self._images

    def by_source(self) -> Mapping[str, RowOrder]:
        """As `RowOrder.by_source`, of the images."""
        return self._images.by_source()

    def with_sources(self, orders: Mapping[str, RowOrder]) -> "RepeatedOrder":
        """The same views of images whose order became another."""
        changed = copy.copy(self)
        changed._images = self._images.with_sources(orders)
        return changed

    def taken(self, samples: int) -> dict[str, int]:
        """As `RowOrder.taken`: images, of which the first `samples` views are."""
        return self._images.taken(self.images_of(samples))

    def split(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """As `RowOrder.split`."""
        return self._images.split(rows)

    def first_row(self, source: str) -> int:
        """As `RowOrder.first_row`."""
        return self._images.first_row(source)


def repeats_problem(global_batch: int, repeats: int) -> str | None:
    """Why so many views of each image do not go with a batch, as one line; None if they do."""
    step = 2 * repeats
    if repeats == 1 or not global_batch % step:
        return None
    below = global_batch // step * step
    return (
        f"global_batch={global_batch} is not a multiple of {step}, as data.repeats={repeats} needs "
        f"(pairs of neighbours, {repeats} times): use {f'{below} or ' if below else ''}"
        f"{below + step}"
    )
