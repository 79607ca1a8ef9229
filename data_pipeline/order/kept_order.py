"""The order of the rows of a data set that a selection keeps."""

import numpy as np

from data_pipeline.filters.selection import Selection
from data_pipeline.order.order import Order, RowOrder


class KeptOrder(RowOrder):
    """Position -> row over kept rows only; a `RowOrder`.

    Args:
        order: of `selection.n_kept` rows; its rows are numbers among the kept ones.
        selection: which rows of the data set those are.
    """

    def __init__(self, order: Order, selection: Selection) -> None:
        if order.n_rows != selection.n_kept:
            raise ValueError(f"an order of {order.n_rows} rows for {selection.n_kept} kept ones")
        self.order, self.selection = order, selection
        self.n_rows, self.stored_rows = selection.n_kept, selection.n_rows

    def rows(self, positions: np.ndarray, attempt: int = 0) -> np.ndarray:
        """As `RowOrder.rows`: (n,) int64 rows of the data set, all of them kept ones."""
        return self.selection.select(self.order.rows(positions, attempt))

    def can_avoid(self, batch: np.ndarray, position: int) -> bool:
        """As `RowOrder.can_avoid`."""
        return self.order.can_avoid(batch, position)

    def epochs(self, samples: int) -> float:
        """As `RowOrder.epochs`."""
        return self.order.epochs(samples)

    @property
    def selection_fingerprint(self) -> str:
        """As `RowOrder.selection_fingerprint`."""
        return self.selection.digest

    def describe(self) -> dict[str, int]:
        """As `Order.describe`; `rows` are the kept ones."""
        return self.order.describe() | {"stored_rows": self.stored_rows}
