"""Bytes of shards on a mounted file system."""

import os
from collections import OrderedDict

from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.errors import ShardError


class LocalFiles:
    """A ByteSource of local shards: one pread each, with the last files kept open.

    Safe across fork (pread shares no file position) and pickle (descriptors stay behind).
    """

    def __init__(self, shards: ShardSet, open_files: int = 256) -> None:
        """Keep at most `open_files` shards open."""
        self.counters = {"bytes_read": 0, "retries": 0, "cache_hits": 0, "cache_misses": 0}
        self._shards, self._open_files = shards, open_files
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def pread(self, number: int, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a shard; raises ShardError, OSError."""
        descriptor = self._descriptor(number)
        data = os.pread(descriptor, end - begin, begin)
        while len(data) < end - begin:  # at 2 GiB, or at the end of a file that shrank
            more = os.pread(descriptor, end - begin - len(data), begin + len(data))
            if not more:
                raise ShardError(f"the shard ends at byte {begin + len(data)}: truncated")
            data += more
        self.counters["bytes_read"] += len(data)
        return data

    def close(self) -> None:
        """Close all shards; reading again opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def _descriptor(self, number: int) -> int:
        descriptors = self._descriptors
        if number in descriptors:
            descriptors.move_to_end(number)
            return descriptors[number]
        path = self._shards.shards[number].path
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            self._shards.index(number).check_shard_size(path, size)
        except BaseException:
            os.close(descriptor)
            raise
        descriptors[number] = descriptor
        if len(descriptors) > self._open_files:
            os.close(descriptors.popitem(last=False)[1])
        return descriptor
