"""Remote shards read by ranges, in blocks ahead of where each lane of the order stands.

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


class _Lane:
    """A piece of one shard that is read from its begin to its end."""

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


class RemoteLanes:
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
        lane = self._lane(number, begin, end)
        is_there = lane.begin <= begin and end <= lane.begin + len(lane.data)
        self.counters["cache_hits" if is_there else "cache_misses"] += 1
        try:
            while lane.begin + len(lane.data) < end:
                self._receive(lane, begin, end)
        except BaseException:
            self._drop(lane)
            raise
        finally:
            before, self._retries = self._retries, self._shards.storage.retries
            self.counters["retries"] += self._retries - before
        data = lane.data[begin - lane.begin : end - lane.begin]
        lane.used = max(lane.used, end)
        self._go_on(lane)
        return data

    def expect(self, number: int, begin: int, end: int) -> None:
        """Begin to fetch the bytes [begin, end) of a shard; never waits, never raises."""
        self._leave_parent()
        if is_url(self._shards.shards[number].path):
            lane = self._lane(number, begin, end)
            if lane.coming is None and lane.end < end:
                self._fetch(lane, end)

    def renew(self, number: int, begin: int, end: int) -> bool:
        """Forget these bytes, which do not match their checksums, so that they are fetched again.

        A server or proxy may have sent wrong ones, once. Returns False for a local shard, where
        reading again would give the same.
        """
        if not is_url(self._shards.shards[number].path):
            return False
        for lane in list(self._by_shard.get(number, ())):
            if lane.begin < end and begin < lane.end:
                self._drop(lane)
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
        self._lanes: OrderedDict[_Lane, None] = OrderedDict()
        self._by_shard: dict[int, list[_Lane]] = {}
        self._in_memory = 0
        self._origin = Origin(self._shards)

    def _leave_parent(self) -> None:
        """In a forked process: the threads of the parent are not here."""
        if self._process != os.getpid():
            self._start()

    def _lane(self, number: int, begin: int, end: int) -> _Lane:
        """The lane that has, or will have, these bytes; a new one if none has."""
        for lane in self._by_shard.get(number, ()):
            is_next = lane.begin <= begin <= lane.end + _LARGEST_GAP_BYTES
            if is_next and end <= max(lane.limit, lane.end):
                self._lanes.move_to_end(lane)
                return lane
        lane = _Lane(number, begin, max(self._limit(number, begin), end))
        self._lanes[lane] = None
        self._by_shard.setdefault(number, []).append(lane)
        return lane

    def _limit(self, number: int, begin: int) -> int:
        """Where the chunk that may start at byte `begin` ends: what follows is another lane's."""
        index = self._shards.index(number)
        row = int(np.searchsorted(index.arrays["sample_end"], begin, side="right"))
        last = min(row + Order.chunk_rows, len(index)) - 1
        return max(offset + size for _, offset, size, _, _ in index.members(last))

    def _fetch(self, lane: _Lane, end: int) -> None:
        """Ask for the next block of a lane, at least up to byte `end`."""
        begin = lane.end
        lane.end = max(min(begin + self._block_bytes, lane.limit), end)
        self._in_memory += lane.end - begin
        number, stop = lane.number, lane.end
        lane.coming = self._pool.submit(lambda: self._origin.read(number, begin, stop))
        self._make_room(lane)

    def _receive(self, lane: _Lane, begin: int, end: int) -> None:
        """Wait for the next block of a lane; let go of what lies before `begin`."""
        if lane.coming is None:
            self._fetch(lane, end)
        coming, lane.coming = lane.coming, None
        data = coming.result()
        self.counters["bytes_read"] += len(data)
        passed = min(max(begin - lane.begin, 0), len(lane.data))
        lane.data = lane.data[passed:] + data
        lane.begin += passed
        self._in_memory -= passed

    def _go_on(self, lane: _Lane) -> None:
        """Ask for the next block when half of this one is used up; end a lane that is through."""
        if lane.used >= lane.limit:
            self._drop(lane)
        elif (
            lane.coming is None
            and lane.end < lane.limit
            and lane.end - lane.used < (self._block_bytes // 2)
        ):
            self._fetch(lane, lane.end)

    def _make_room(self, newest: _Lane) -> None:
        while self._in_memory > self._memory_bytes and len(self._lanes) > 1:
            oldest = next(iter(self._lanes))
            if oldest is newest:
                self._lanes.move_to_end(newest)
                continue
            unread = oldest.end - max(oldest.used, oldest.begin)
            if unread > self._block_bytes // 2 and self._block_bytes > _LEAST_BLOCK_BYTES:
                # More lanes are open than the memory has blocks for: smaller ones are not fetched
                # twice.
                self._block_bytes //= 2
            self._drop(oldest)

    def _drop(self, lane: _Lane) -> None:
        if lane in self._lanes:
            del self._lanes[lane]
            self._by_shard[lane.number].remove(lane)
            self._in_memory -= lane.bytes
            if lane.coming is not None:
                lane.coming.cancel()
