"""Where the bytes of shards come from: what readers ask of local disks, servers and caches."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class TransientReadError(RuntimeError):
    """Storage could not be read, also after waiting and trying again.

    It says nothing about the data, so nothing may be substituted: it ends the run.
    """


class FileState(NamedTuple):
    """What identifies the content of a file as it was when first seen."""

    size: int
    """Bytes."""
    version: str
    """Entity tag or modification time as the storage tells it; "" if it tells neither."""


class Storage(Protocol):
    """Files by URL, read without state; for any number of threads.

    Implementations wait and retry on transient faults, going on at the byte where they were cut
    off, and give up with TransientReadError after their deadline. What will never be readable is
    a FileNotFoundError (absent), PermissionError (forbidden) or `errors.ShardError` (changed
    since `expected`, shorter than asked for) that names the URL. An `expected` without a version
    is compared by its size.
    """

    retries: int
    """Failed attempts so far that were followed by another one."""

    def state(self, url: str, patient: bool = True) -> FileState:
        """Size and version, without reading the content. Unless `patient`, the first refusal (403)
        counts: for files that may not be there, which some stores refuse."""

    def read(self, url: str, begin: int, end: int, expected: FileState | None = None) -> bytes:
        """Exactly the bytes [begin, end)."""

    def chunks(
        self, url: str, begin: int, end: int, expected: FileState | None = None
    ) -> Iterator[bytes]:
        """The bytes [begin, end) as they arrive, in pieces of at most 1 MiB."""


class ByteSource(Protocol):
    """Bytes of the shards of one ShardSet, by shard number; what a SampleReader reads from.

    Survives fork and pickle; not for several threads at once.
    """

    counters: dict[str, int]
    """What was done since the start, by name: bytes_read, retries (of the storage, and of readers
    that asked again for bytes that were wrong), cache_hits, cache_misses."""

    def pread(self, number: int, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a shard.

        Raises:
            ShardError: the shard is not the one that was indexed.
            OSError, TransientReadError: storage failed.
        """

    def close(self) -> None:
        """Let go of files and connections; reading again opens them again."""
