"""The data sets of a task, as settings and opened."""

import os
import re
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import braceexpand
from pydantic import Field, model_validator

from data_pipeline.filters.expressions import ExpressionError
from data_pipeline.filters.select import Condition, select_rows
from data_pipeline.filters.selection import Selection
from data_pipeline.order.kept_order import KeptOrder
from data_pipeline.order.order import Order, RowOrder
from data_pipeline.settings import Settings
from data_pipeline.shards.shard_set import MAX_MEMBER_BYTES, ShardSet
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.locations import is_url
from data_pipeline.storage.remote import RemoteSettings


class SourceSettings(Settings):
    """One of several data sets of a task."""

    shards: list[str] = Field(min_length=1)
    """Folders with a manifest, tar files, globs or brace patterns; paths or URLs."""

    weight: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Share of the task's samples, relative to the weights of its other sources."""

    where: Condition | None = None
    """Only samples that meet this condition on index columns take part, as of a task's `where`."""


class StreamSettings(Settings):
    """Shards without addresses; sequential_stream.py says what reading them does not promise."""

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

    def plan(self, key: int, global_batch: int) -> RowOrder:
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
