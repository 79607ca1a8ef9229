"""Several weighted data sets behind one task, with exact counts.

Pairs of positions (2q, 2q + 1) are dealt to sources by a block cycle, so that partners stay in one
source, and after any number of cycles each source has given exactly its share. The n-th pair of a
source stands at the places 2n and 2n + 1 of that source's own order: each row of a source once per
epoch of that source, however often the others have been through.
"""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Self

import braceexpand
import numpy as np
from pydantic import Field, model_validator

from data_pipeline.expressions import ExpressionError
from data_pipeline.filters import Condition, select_rows
from data_pipeline.locations import is_url
from data_pipeline.mixture import BlockCycle
from data_pipeline.order import Order
from data_pipeline.reader import MAX_MEMBER_BYTES
from data_pipeline.remote import RemoteSettings
from data_pipeline.repeats import RepeatedOrder
from data_pipeline.rng import keyed_u64
from data_pipeline.selection import KeptOrder, Selection
from data_pipeline.settings import Settings
from data_pipeline.shards import ShardSet
from data_pipeline.tar_headers import ShardError


class SourceSettings(Settings):
    """One of several data sets of a task."""

    shards: list[str] = Field(min_length=1)
    """Folders with a manifest, tar files, globs or brace patterns; paths or URLs."""

    weight: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Share of the task's samples, relative to the weights of its other sources."""

    where: Condition | None = None
    """Only samples that meet this condition on index columns take part, as of a task's `where`."""


class StreamSettings(Settings):
    """Shards that have no addresses; see weak_stream.py for what reading them does not promise."""

    shards: list[str] = Field(min_length=1)
    """`pipe:` commands, URLs or paths of tars, plain or compressed, as the webdataset library opens
    them; with brace patterns."""

    samples: int | None = Field(default=None, ge=1)
    """How many samples there are in all, if you know: for the metric `epoch` and for
    `sampling.alpha`."""

    shuffle_samples: int = Field(default=1000, ge=1)
    """Samples that each worker process holds in memory to shuffle them."""

    def urls(self) -> list[str]:
        """The shards, brace patterns expanded. Raises FileNotFoundError for a missing path."""
        found = [url for spec in self.shards for url in braceexpand.braceexpand(spec)]
        for url in found:
            if not url.startswith("pipe:") and not is_url(url) and not os.path.exists(url):
                raise FileNotFoundError(f"{url}: there is no such file")
        return found


class ShardedData(Settings):
    """Base of every kind of data that is read from shards: `shards`, or weighted `sources`."""

    reads_text: ClassVar[bool] = False
    """Whether batches hold tokens."""

    shards: list[str] | None = Field(default=None, min_length=1)
    """Folders with a manifest, tar files, globs or brace patterns, read as one data set; paths or
    URLs."""

    sources: dict[str, SourceSettings] | None = Field(default=None, min_length=1)
    """Name -> data set, mixed by weight with exact counts; in place of `shards`."""

    stream: StreamSettings | None = None
    """In place of `shards`, for what cannot be indexed: commands, compressed tars, servers without
    byte ranges. A weaker mode: no fixed order, no exact resume, no equal epochs, no checksums."""

    where: Condition | None = None
    """Only samples of `shards` that meet this condition on index columns take part, for example
    "width >= 256 and captions.count > 0"; null = all."""

    max_member_bytes: int = Field(default=MAX_MEMBER_BYTES, ge=1)
    """Samples with a larger member are bad; nothing of such a member is read."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        given = [name for name in ("shards", "sources", "stream") if getattr(self, name)]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given; set one to null" if given else "none is given"
            raise ValueError(f"shards: exactly one of shards, sources and stream is needed, {what}")
        if self.stream is not None and self.where is not None:
            raise ValueError("where: a stream has no index columns that a condition could look at")
        if self.sources is not None and self.where is not None:
            raise ValueError("where: with several sources it is a key of each of them, not of data")
        for name in self.sources or ():
            if not re.fullmatch(r"\w+", name, flags=re.ASCII):
                raise ValueError(f"sources: the name {name!r} must be letters, digits and _ only")
        return self


class Source(NamedTuple):
    """One data set of a task, opened."""

    name: str
    shards: ShardSet
    weight: float
    selection: Selection | None = None
    """Rows that take part; None: all of them."""

    @property
    def samples(self) -> int:
        """Number of rows that take part."""
        return len(self.shards) if self.selection is None else self.selection.n_kept

    def plan(self, key: int, global_batch: int) -> "Order | KeptOrder":
        """Order of its own rows for steps of `global_batch` samples; `key` seeds it."""
        order = Order.plan(self.samples, key, global_batch)
        return order if self.selection is None else KeptOrder(order, self.selection)


def open_sources(data: ShardedData, remote: RemoteSettings | None = None) -> list[Source]:
    """The data sets that the settings name, sorted by name; with plain `shards` one without a name,
    with a `stream` none.

    Args: remote: how URLs are read.
    Raises as `open_source`.
    """
    if data.stream is not None:
        return []
    if data.shards is not None:
        return [open_source(data.shards, data.where, remote=remote)]
    return [
        open_source(source.shards, source.where, name, source.weight, remote)
        for name, source in sorted(data.sources.items())
    ]


def open_source(
    shards: Sequence[str],
    where: str | None = None,
    name: str = "",
    weight: float = 1.0,
    remote: RemoteSettings | None = None,
) -> Source:
    """One data set, and which of its samples meet the condition `where`.

    Args: remote: how URLs are read.
    Raises FileNotFoundError, ShardError; ExpressionError, also if none of the samples does; from
    servers PermissionError and TransientReadError.
    """
    opened = ShardSet.open(shards, remote)
    if where is None:
        return Source(name, opened, weight)
    try:
        selection = select_rows(opened, where)
    except ExpressionError as error:
        of_source = f"source {name}: " if name else ""
        raise type(error)(f"{of_source}where: {error}") from None
    return Source(name, opened, weight, None if selection.n_kept == len(opened) else selection)


def plan_order(
    sources: Sequence[Source], global_batch: int, seed: int, name: str, repeats: int = 1
) -> "Order | KeptOrder | MixedOrder | RepeatedOrder":
    """The order of a task's samples; rows count through the sources one behind the other.

    Args:
        sources: from `open_sources`; the concatenation of their shards is what rows refer to.
        global_batch: samples per step.
        seed, name: of the run and the task; two tasks on the same shards see different orders.
        repeats: how often each sample stands in a step; see `RepeatedOrder`.
    """
    if repeats > 1:
        once = plan_order(sources, global_batch // repeats, seed, name)
        return RepeatedOrder(once, global_batch, repeats)
    if len(sources) == 1:
        return sources[0].plan(keyed_u64(seed, "order", name) >> 1, global_batch)
    orders = {
        source.name: source.plan(keyed_u64(seed, "order", name, source.name) >> 1, global_batch)
        for source in sources
    }
    weights = [source.weight for source in sources]
    return MixedOrder(orders, weights, keyed_u64(seed, "sources", name) >> 1)


def concatenated(sources: Sequence[Source]) -> ShardSet:
    """All shards of all sources. A shard that several sources list stands there several times.

    Raises ShardError if there are none: the rows of a `stream` have no numbers.
    """
    if not sources:
        raise ShardError("data that is read as a stream has no rows that could be addressed")
    if len(sources) == 1:
        return sources[0].shards
    return ShardSet(
        (shard for source in sources for shard in source.shards.shards),
        storage=sources[0].shards.storage,
    )


class MixedOrder:
    """Position -> row over several sources; answers what an `Order` answers.

    Args:
        orders: name -> order of one source.
        weights: (K,) positive, in the order of `orders`.
        seed: key of the deal.

    Attributes:
        n_rows: rows of all sources that take part.
        stored_rows: rows of all sources; what `rows` points into.
        cycle: the deal of pairs of positions.
    """

    def __init__(
        self, orders: dict[str, Order | KeptOrder], weights: Sequence[float], seed: int
    ) -> None:
        self.orders = orders
        self.cycle = BlockCycle(weights, seed, "sources")
        self.n_rows = sum(order.n_rows for order in orders.values())
        sizes = [order.stored_rows for order in orders.values()]
        self.stored_rows = sum(sizes)
        self._first_row = np.cumsum([0, *sizes[:-1]])

    def rows(self, positions: np.ndarray, attempt: int = 0) -> np.ndarray:
        """Rows of the concatenated sources, as `Order.rows`; a substitute is of the same source.

        A call costs about 0.2 to 0.5 ms per source, whatever the number of positions.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"positions start at 0, got {positions.min()}")
        choices, places = self.locate(positions)
        rows = np.empty_like(positions)
        for choice, order in enumerate(self.orders.values()):
            mine = np.flatnonzero(choices == choice)
            if mine.size:
                rows[mine] = self._first_row[choice] + order.rows(places[mine], attempt)
        return rows

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the source of each position, and the place in that source's own order."""
        choices, pairs = self.cycle.locate(positions >> 1)
        return choices, 2 * pairs + (positions & 1)

    def can_avoid(self, batch: np.ndarray, position: int) -> bool:
        """As `Order.can_avoid`, judged by the source of `position` alone."""
        choices, places = self.locate(np.append(batch, position))
        own = places[:-1][choices[:-1] == choices[-1]]
        return list(self.orders.values())[choices[-1]].can_avoid(own, int(places[-1]))

    def passes(self, samples: int) -> float:
        """Samples per sample that there is."""
        return samples / self.n_rows

    def epochs(self, samples: int) -> dict[str, float]:
        """Passes over each source after `samples` samples of the task."""
        return {
            name: self.orders[name].passes(places) for name, places in self.taken(samples).items()
        }

    @property
    def taking_part(self) -> str:
        """As `Order.taking_part`."""
        return " ".join(f"{name}: {order.taking_part}" for name, order in self.orders.items())

    def describe(self) -> str:
        """One line for people: how pairs are dealt to sources."""
        return self.cycle.describe(list(self.orders), "pairs of samples")

    def taken(self, samples: int) -> dict[str, int]:
        """Samples of each source among the first `samples` of the task."""
        pairs = self.cycle.before(samples >> 1)
        counts = dict(zip(self.orders, (2 * pairs).tolist(), strict=True))
        if samples & 1:
            choice, _ = self.cycle.locate_one(samples >> 1)
            counts[list(self.orders)[choice]] += 1
        return counts

    def split(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Source -> its own numbers of those of (n,) rows that are its rows."""
        owners = np.searchsorted(self._first_row, rows, side="right") - 1
        return {
            name: rows[owners == number] - self._first_row[number]
            for number, name in enumerate(self.orders)
        }

    def first_row(self, source: str) -> int:
        """Row of all sources that is the first of one of them."""
        return int(self._first_row[list(self.orders).index(source)])

    def with_orders(self, orders: "Mapping[str, Order | KeptOrder]") -> "MixedOrder":
        """The same deal among the same sources, whose orders became others."""
        changed = copy.copy(self)
        changed.orders = {name: orders[name] for name in self.orders}
        return changed
