"""The ByteSource for a set of shards: local files or remote ones; and what a source may also do."""

from typing import Protocol, runtime_checkable

from data_pipeline.reading.local_files import LocalFiles
from data_pipeline.reading.remote_ranges import RemoteRanges
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.locations import is_url
from data_pipeline.storage.storage import ByteSource


@runtime_checkable
class ReadsAhead(Protocol):
    """A ByteSource that can fetch in the background what will be read soon."""

    def expect(self, number: int, begin: int, end: int) -> None:
        """Start to fetch the bytes [begin, end) of a shard; returns at once and never raises."""


@runtime_checkable
class KeepsCopies(Protocol):
    """A ByteSource whose bytes can be wrong though the shard is sound: it reads from a copy that
    may be damaged, or over a network that may alter them."""

    def renew(self, number: int, begin: int, end: int) -> bool:
        """Drop the copies of these bytes, so that the next read fetches them again. False if there
        are none, or if reading again would give the same."""


def byte_source_of(shards: ShardSet) -> ByteSource:
    """The source that needs no cache on disk."""
    if any(is_url(shard.path) for shard in shards.shards):
        return RemoteRanges(shards)
    return LocalFiles(shards)
