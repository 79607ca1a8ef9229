"""Whether images that a model is shown are those that it was trained on, told by their shards."""

import fnmatch
import os
from collections.abc import Iterable, Sequence
from typing import Literal

import braceexpand

from data_pipeline.order.sources import ShardedData
from data_pipeline.settings import Settings
from data_pipeline.shards.names import Catalogue
from data_pipeline.shards.shard_set import Shard, ShardSet
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.locations import folder_of, identity, is_url
from data_pipeline.storage.remote import UrlStorage

Seen = Literal["held-out", "training", "partly training", "unknown"]
"""What images are; "partly training" also where a condition makes part of the shards training
data; "unknown" of exports that do not say what they were trained on."""
NAMED: dict[Seen, str] = {
    "held-out": "held-out images",
    "training": "training images",
    "partly training": "images, of shards that were trained on in part",
    "unknown": "images",
}


class TrainingShards(Settings):
    """One of the data sets of a run."""

    shards: list[str]
    """As the recipe names them, without credentials and query in URLs."""
    where: str | None = None
    """The condition that its samples meet."""


def training_shards(tasks: Iterable[ShardedData]) -> list[TrainingShards]:
    """What a run with tasks of such data reads; of streams what has a name of its own."""
    found = []
    for data in tasks:
        if data.stream is not None:
            found.append(([one for one in data.stream.shards if not one.startswith("pipe:")], None))
        elif data.shards is not None:
            found.append((data.shards, data.where))
        else:
            found += [(source.shards, source.where) for source in data.sources.values()]
    return [
        TrainingShards(shards=[identity(s) if is_url(s) else s for s in shards], where=where)
        for shards, where in found
    ]


def seen_in_training(
    shown: ShardSet, where: str | None, trained: Sequence[TrainingShards] | None
) -> Seen:
    """What the samples of `shown` that meet `where` are to a model that was trained on `trained`.

    A shard is known by its path, or by its content where a manifest lists the training shards.
    """
    if trained is None:
        return "unknown"
    digests = [_digests(one) for one in trained]
    whole = some = 0
    for shard in shown.shards:
        reading = [
            one
            for one, known in zip(trained, digests, strict=True)
            if shard.index_digest in known or any(_names(spec, shard) for spec in one.shards)
        ]
        some += bool(reading)
        whole += any(one.where in (None, where) for one in reading)
    if not some:
        return "held-out"
    return "training" if whole == len(shown.shards) else "partly training"


def _names(spec: str, shard: Shard) -> bool:
    """Whether a path, folder, glob or brace expression stands for a shard; nothing is opened."""
    path = identity(shard.path) if is_url(shard.path) else os.path.realpath(shard.path)
    patterns = [spec, *braceexpand.braceexpand(spec)]
    if not is_url(spec):
        patterns += [os.path.realpath(pattern) for pattern in patterns]
    return any(
        path == pattern or folder_of(path) == pattern.rstrip("/") or fnmatch.fnmatch(path, pattern)
        for pattern in patterns
    )


def _digests(one: TrainingShards) -> set[str]:
    """Digests of the training shards that lie on this machine, in folders with a manifest."""
    catalogue = Catalogue(UrlStorage())
    digests = set()
    for spec in one.shards:
        if is_url(spec):
            continue
        try:
            records = map(catalogue.record, catalogue.expand([spec]))
            digests |= {record.index_digest for record in records if record is not None}
        except (OSError, ShardError):
            continue  # gone since
    return digests
