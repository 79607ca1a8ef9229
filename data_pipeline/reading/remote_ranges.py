"""Remote shards, read by byte ranges, each chunk of the order a few blocks ahead of its reader.

The order (order.py) walks through thousands of lanes at a time, each over chunks of neighbouring
rows: the first row of a chunk costs a request, those behind it lie in memory when they are wanted.
"""

import os
from collections import OrderedDict
from concurrent.futures import Future

import numpy as np

from data_pipeline.order.order import Order
from data_pipeline.reading.fetch_pool import FetchPool
from data_pipeline.reading.local_files import LocalFiles
from data_pipeline.reading.origin import Origin
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.locations import is_url

_LEAST_BLOCK_BYTES = 32 * 1024
# What lies between the members of neighbouring samples that are wanted is read along up to here.
_LARGEST_GAP_BYTES = 64 * 1024


class _Stretch:
    """Bytes of one shard that are read in sequence: the chunk that a lane walks through."""

    def __init__(self, number: int, begin: int, limit: int) -> None:
        self.number, self.limit = number, limit
        self.begin, self.data = begin, b""
        """What was fetched and may still be wanted: the bytes from `begin` on."""
        self.coming: Future[bytes] | None = None
        self.end = begin
        """First byte behind what was fetched and what is coming."""
        self.used = begin

    @property
    def bytes(self) -> int:
        """Memory that it takes, or will take."""
        return self.end - self.begin


class RemoteRanges:
    """A ByteSource for shards by URL, without a cache on disk; local ones among them are read too.

    A file that was replaced since it was opened is a ShardError, and so is one that is gone;
    refused access and servers that stay away are TransientReadErrors, which end the run. Survives
    fork and pickle: each process fetches for itself.
    """

    def __init__(self, shards: ShardSet) -> None:
        """Block size, memory and number of requests are those of `shards.storage.settings`."""
        settings = shards.storage.settings
        self.counters = {"bytes_read": 0, "retries": 0, "cache_hits": 0, "cache_misses": 0}
        self._shards, self._local = shards, LocalFiles(shards)
        self._block_bytes = settings.block_kib * 1024
        self._memory_bytes = settings.read_ahead_mib * 2**20
        self._start()

    def pread(self, number: int, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a shard; raises ShardError, TransientReadError."""
        self._leave_parent()
        if not is_url(self._shards.shards[number].path):
            data = self._local.pread(number, begin, end)
            self.counters["bytes_read"] += len(data)
            return data
        stretch = self._stretch(number, begin, end)
        is_there = stretch.begin <= begin and end <= stretch.begin + len(stretch.data)
        self.counters["cache_hits" if is_there else "cache_misses"] += 1
        try:
            while stretch.begin + len(stretch.data) < end:
                self._receive(stretch, begin, end)
        except BaseException:
            self._drop(stretch)
            raise
        finally:
            before, self._retries = self._retries, self._shards.storage.retries
            self.counters["retries"] += self._retries - before
        data = stretch.data[begin - stretch.begin : end - stretch.begin]
        stretch.used = max(stretch.used, end)
        self._go_on(stretch)
        return data

    def expect(self, number: int, begin: int, end: int) -> None:
        """Begin to fetch the bytes [begin, end) of a shard; never waits, never raises."""
        self._leave_parent()
        if is_url(self._shards.shards[number].path):
            stretch = self._stretch(number, begin, end)
            if stretch.coming is None and stretch.end < end:
                self._fetch(stretch, end)

    def renew(self, number: int, begin: int, end: int) -> bool:
        """Forget these bytes, which do not match their checksums, so that they are fetched again.

        A server or proxy may have sent wrong ones, once. Returns False for a local shard, where
        reading again would give the same.
        """
        if not is_url(self._shards.shards[number].path):
            return False
        for stretch in list(self._by_shard.get(number, ())):
            if stretch.begin < end and begin < stretch.end:
                self._drop(stretch)
        return True

    def close(self) -> None:
        """Forget what was read ahead; reading again fetches again."""
        self._pool.close()
        self._local.close()
        self._start()

    def __del__(self) -> None:
        if hasattr(self, "_pool") and self._process == os.getpid():
            self._pool.close()

    def __getstate__(self) -> dict:
        return {"shards": self._shards}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["shards"])

    def _start(self) -> None:
        self._process, self._retries = os.getpid(), self._shards.storage.retries
        self._pool = FetchPool(self._shards.storage.settings.requests_per_host)
        self._stretches: OrderedDict[_Stretch, None] = OrderedDict()
        self._by_shard: dict[int, list[_Stretch]] = {}
        self._in_memory = 0
        self._origin = Origin(self._shards)

    def _leave_parent(self) -> None:
        """In a forked process: the threads of the parent are not here."""
        if self._process != os.getpid():
            self._start()

    def _stretch(self, number: int, begin: int, end: int) -> _Stretch:
        """The stretch that has these bytes, or will; a new one if there is none."""
        for stretch in self._by_shard.get(number, ()):
            is_next = stretch.begin <= begin <= stretch.end + _LARGEST_GAP_BYTES
            if is_next and end <= max(stretch.limit, stretch.end):
                self._stretches.move_to_end(stretch)
                return stretch
        stretch = _Stretch(number, begin, max(self._limit(number, begin), end))
        self._stretches[stretch] = None
        self._by_shard.setdefault(number, []).append(stretch)
        return stretch

    def _limit(self, number: int, begin: int) -> int:
        """End of the chunk that may start at `begin`: what follows belongs to another lane."""
        index = self._shards.index(number)
        row = int(np.searchsorted(index.arrays["sample_end"], begin, side="right"))
        last = min(row + Order.chunk_rows, len(index)) - 1
        return max(offset + size for _, offset, size, _, _ in index.members(last))

    def _fetch(self, stretch: _Stretch, end: int) -> None:
        """Ask for the next block of a stretch, at least up to byte `end`."""
        begin = stretch.end
        stretch.end = max(min(begin + self._block_bytes, stretch.limit), end)
        self._in_memory += stretch.end - begin
        number, stop = stretch.number, stretch.end
        stretch.coming = self._pool.submit(lambda: self._origin.read(number, begin, stop))
        self._make_room(stretch)

    def _receive(self, stretch: _Stretch, begin: int, end: int) -> None:
        """Wait for the next block of a stretch, and drop its bytes before `begin`."""
        if stretch.coming is None:
            self._fetch(stretch, end)
        coming, stretch.coming = stretch.coming, None
        data = coming.result()
        self.counters["bytes_read"] += len(data)
        passed = min(max(begin - stretch.begin, 0), len(stretch.data))
        stretch.data = stretch.data[passed:] + data
        stretch.begin += passed
        self._in_memory -= passed

    def _go_on(self, stretch: _Stretch) -> None:
        """Ask for the next block when half of this one is used; drop what was read to its end."""
        if stretch.used >= stretch.limit:
            self._drop(stretch)
        elif (
            stretch.coming is None
            and stretch.end < stretch.limit
            and stretch.end - stretch.used < (self._block_bytes // 2)
        ):
            self._fetch(stretch, stretch.end)

    def _make_room(self, newest: _Stretch) -> None:
        while self._in_memory > self._memory_bytes and len(self._stretches) > 1:
            oldest = next(iter(self._stretches))
            if oldest is newest:
                self._stretches.move_to_end(newest)
                continue
            unread = oldest.end - max(oldest.used, oldest.begin)
            if unread > self._block_bytes // 2 and self._block_bytes > _LEAST_BLOCK_BYTES:
                # More stretches are open than there is memory for: with smaller blocks, none has to
                # be dropped unread and fetched twice.
                self._block_bytes //= 2
            self._drop(oldest)

    def _drop(self, stretch: _Stretch) -> None:
        if stretch in self._stretches:
            del self._stretches[stretch]
            self._by_shard[stretch.number].remove(stretch)
            self._in_memory -= stretch.bytes
            if stretch.coming is not None:
                stretch.coming.cancel()
