"""Which ByteSource reads a set of shards, by where they lie."""

from typing import Protocol, runtime_checkable

from data_pipeline.reading.local_files import LocalFiles
from data_pipeline.reading.remote_lanes import RemoteLanes
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.locations import is_url
from data_pipeline.storage.storage import ByteSource


@runtime_checkable
class ReadsAhead(Protocol):
    """A ByteSource that can begin to fetch what is wanted soon."""

    def expect(self, number: int, begin: int, end: int) -> None:
        """Begin to fetch the bytes [begin, end) of a shard; never waits, never raises."""


@runtime_checkable
class KeepsCopies(Protocol):
    """A ByteSource that may give wrong bytes of a sound shard: of a damaged copy, or as sent."""

    def renew(self, number: int, begin: int, end: int) -> bool:
        """Drop the copies of these bytes; False if there are none, or reading would not help."""


def byte_source_of(shards: ShardSet) -> ByteSource:
    """The source without a cache: files of this machine, or lanes of remote ranges."""
    if any(is_url(shard.path) for shard in shards.shards):
        return RemoteLanes(shards)
    return LocalFiles(shards)
