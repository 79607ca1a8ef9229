"""A node's copy of what its ranks read: blocks of shards in a folder on its own disk.

Reading through it is correct whatever else happens: a block that is missing is fetched, by one
process while the others wait, and where the folder fails or is full the bytes come from where the
shards lie. `prefetch` fills it ahead of the run, and alone decides what to let go.
"""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial

from pydantic import Field

from data_pipeline.cache.blocks import WHOLE_SHARD, Extent, extent_of_byte
from data_pipeline.cache.cache_folder import CacheError, CacheFolder
from data_pipeline.reading.byte_sources import KeepsCopies, byte_source_of
from data_pipeline.reading.fetch_pool import FetchPool
from data_pipeline.reading.origin import Origin
from data_pipeline.settings import Settings
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.storage import ByteSource

log = logging.getLogger("omnipretrain.data")


class CacheSettings(Settings):
    """A cache of shards on each node's own disk."""

    folder: str = Field(min_length=1)
    """On a local disk, the same path on every node; runs may share it."""
    max_gib: float = Field(gt=0.0)
    """Disk space that it may take, files being written included."""
    block_mib: float | None = Field(default=1.0, gt=0.0)
    """What is fetched at a time: a block of up to 64 neighbouring samples of about this size; null:
    whole shards, which pay only if `max_gib` is more than the data set has."""
    read_ahead_steps: int = Field(default=32, ge=1)
    """Steps before its use that a block is fetched."""

    @property
    def max_bytes(self) -> int:
        """`max_gib` in bytes."""
        return int(self.max_gib * 2**30)

    @property
    def block_bytes(self) -> float:
        """`block_mib` in bytes."""
        return WHOLE_SHARD if self.block_mib is None else self.block_mib * 2**20


class CachedShards:
    """A ByteSource that keeps what it reads in a cache folder."""

    def __init__(self, shards: ShardSet, settings: CacheSettings) -> None:
        """Read the shards of a set; the folder is created when the first block comes."""
        self.counters = {"bytes_read": 0, "retries": 0, "cache_hits": 0, "cache_misses": 0}
        self._shards, self._settings = shards, settings
        self._folder = CacheFolder(settings.folder, settings.max_bytes)
        self._origin, self._direct = Origin(shards), byte_source_of(shards)
        self._gave_up = False
        self._distrusted: set[str] = set()  # damaged copies that cannot be removed
        self._start()

    def pread(self, number: int, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a shard; raises as ByteSource.pread."""
        self._leave_parent()
        try:
            pieces = [self._piece(*part) for part in self._parts(number, begin, end)]
        finally:
            before, self._retries = self._retries, self._shards.storage.retries
            self.counters["retries"] += self._retries - before
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def expect(self, number: int, begin: int, end: int) -> None:
        """Begin to fetch the bytes [begin, end) of a shard; never waits, never raises."""
        self._leave_parent()
        for extent, _, _ in () if self._gave_up else self._parts(number, begin, end):
            if extent.name not in self._coming and not self._folder.has(extent.name):
                self._coming[extent.name] = self._pool.submit(
                    partial(fetch_block, self._folder, self._origin, extent)
                )

    def renew(self, number: int, begin: int, end: int) -> bool:
        """Drop the copies of these bytes, which do not match their checksums.

        Returns False if there are none and they come from a local shard, so that reading again
        would give the same.
        """
        dropped, what_now = False, "fetching it again"
        for extent, _, _ in self._parts(number, begin, end):
            try:
                dropped |= self._folder.remove(extent.name)
            except CacheError as error:
                self._give_up(error)
                if extent.name not in self._distrusted and self._folder.has(extent.name):
                    self._distrusted.add(extent.name)
                    dropped, what_now = True, "reading past it"
        if dropped:
            label = self._shards.shards[number].label
            log.warning(
                "cache %s: a copy of bytes %d-%d of %s does not match its checksums; %s",
                self._folder.folder,
                begin,
                end - 1,
                label,
                what_now,
            )
        past = self._direct  # what the cap left no room for
        return dropped or (isinstance(past, KeepsCopies) and past.renew(number, begin, end))

    def close(self) -> None:
        """Let go of files and connections."""
        self._pool.close()
        self._direct.close()
        self._start()

    def __del__(self) -> None:
        if hasattr(self, "_pool") and self._process == os.getpid():
            self._pool.close()

    def __getstate__(self) -> dict:
        return {"shards": self._shards, "settings": self._settings}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["shards"], state["settings"])

    def _start(self) -> None:
        self._process, self._retries = os.getpid(), self._shards.storage.retries
        self._pool = FetchPool(self._shards.storage.settings.requests_per_host)
        self._coming: dict[str, Future[int | None]] = {}

    def _leave_parent(self) -> None:
        """In a forked process: the threads of the parent are not here."""
        if self._process != os.getpid():
            self._start()

    def _parts(self, number: int, begin: int, end: int) -> Iterator[tuple[Extent, int, int]]:
        """The blocks that hold the bytes [begin, end), and which of them each holds."""
        while begin < end:
            extent = extent_of_byte(self._shards, number, begin, self._settings.block_bytes)
            yield extent, begin, min(end, extent.end)
            begin = extent.end

    def _piece(self, extent: Extent, begin: int, end: int) -> bytes:
        """The bytes [begin, end) of a shard, which lie in one block."""
        counters = self.counters
        try:
            coming = self._coming.pop(extent.name, None)
            downloaded = coming.result() if coming is not None else 0
            found = self._copy(extent, begin, end)
            if found is None and coming is None and not self._gave_up:
                downloaded = fetch_block(self._folder, self._origin, extent)
                found = self._copy(extent, begin, end) if downloaded is not None else None
        except CacheError as error:
            self._give_up(error)
            found, downloaded = None, None
        counters["bytes_read"] += downloaded or 0
        if found is None or downloaded:
            counters["cache_misses"] += 1
        else:
            counters["cache_hits"] += 1
        return self._read_direct(extent.number, begin, end) if found is None else found

    def _copy(self, extent: Extent, begin: int, end: int) -> bytes | None:
        if extent.name in self._distrusted:
            return None
        first = extent.begin
        return self._folder.read(extent.name, extent.size, begin - first, end - first)

    def _read_direct(self, number: int, begin: int, end: int) -> bytes:
        """Past the cache."""
        before = self._direct.counters["bytes_read"]
        try:
            return self._direct.pread(number, begin, end)
        finally:
            self.counters["bytes_read"] += self._direct.counters["bytes_read"] - before

    def _give_up(self, error: CacheError) -> None:
        """Write no more; what is there is still read."""
        if not self._gave_up:
            log.warning("%s: this process reads on without adding to the cache", error)
        self._gave_up = True


def fetch_block(folder: CacheFolder, origin: Origin, extent: Extent) -> int | None:
    """Download a block unless it is there; for any number of threads and processes.

    Returns: bytes that were downloaded: 0 if another one did it, None if the cap leaves no room.
    Raises: CacheError: the folder failed. ShardError, TransientReadError, OSError: the shard did.
    """
    with folder.fetching(extent.name):
        if folder.has(extent.name):
            return 0
        reservation = folder.reserve(extent.name, extent.size)
        if reservation is None:
            return None
        folder.fill(reservation, origin.chunks(extent.number, extent.begin, extent.end))
        return extent.size


def source_of(shards: ShardSet, cache: CacheSettings | None) -> ByteSource:
    """What reads a set of shards: through a cache, or from where they lie."""
    return byte_source_of(shards) if cache is None else CachedShards(shards, cache)
