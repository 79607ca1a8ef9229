"""Read single samples by row number: one pread each, and no byte that was not checked."""

import itertools
import os
import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from zlib_ng.zlib_ng import crc32  # about eight times the speed of zlib's

from data_pipeline.shards import ShardSet
from data_pipeline.tar_headers import ShardError, parse_header

# Unwanted bytes up to this many are read along rather than skipped by a second system call.
_LARGEST_GAP_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: `members` maps lower-case extension -> bytes."""

    row: int
    shard: str
    key: str
    members: dict[str, bytes]


class BadSample(ValueError):
    """A sample that will never be readable: damaged, truncated, or not the one in the index."""

    def __init__(self, reason: str, shard: str, key: str, row: int) -> None:
        super().__init__(reason, shard, key, row)
        self.reason, self.shard, self.key, self.row = reason, shard, key, row

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key!r} (row {self.row}): {self.reason}"


class TransientReadError(RuntimeError):
    """The operating system could not read a shard, also after waiting and trying again.

    It says nothing about the data, so nothing may be substituted: it ends the run.
    """


class SampleReader:
    """Reads samples of a ShardSet. Not for use by several threads at once.

    Safe across fork (pread shares no file position) and pickle (file descriptors stay behind).
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        open_files: int = 256,
        retries: int = 5,
        first_wait_s: float = 0.5,
    ) -> None:
        """Keep at most `open_files` shards open; retry failed reads, doubling the wait each time.

        The defaults wait 15.5 s in all before a TransientReadError.
        """
        self.shards = shards
        self.open_files = open_files
        self.retries = retries
        self.first_wait_s = first_wait_s
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, row: int, extensions: Collection[str] | None = None) -> Sample:
        """Return a sample with all its members, or those of `extensions` that it has.

        Every tar header (size and name of the member) and every payload that is returned matches
        its crc32 in the index.

        Errors: IndexError for a row that does not exist; BadSample for a permanent fault of the
        data; TransientReadError if the file system fails.
        """
        for attempt in itertools.count():
            try:
                return self._read_once(row, extensions)
            except OSError as error:
                self.close()  # a stale handle heals only if the file is opened again
                if attempt == self.retries:
                    path = self.shards.shards[self.shards.locate(row)[0]].path
                    raise TransientReadError(
                        f"{path}: {error.strerror or error} (tried {attempt + 1} times)"
                    ) from error
            time.sleep(self.first_wait_s * 2**attempt)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close all shards; reading again opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> "SampleReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def _read_once(self, row: int, extensions: Collection[str] | None) -> Sample:
        number, local = self.shards.locate(row)
        path, key = self.shards.shards[number].path, "?"
        members: dict[str, bytes] = {}
        try:
            index = self.shards.index(number)
            key = index.key(local)
            wanted = index.members(local)
            if extensions is not None:
                wanted = [member for member in wanted if member[0] in extensions]
            placed = [(*index.header_span(local, member[1]), *member) for member in wanted]
            for begin, end, run in _runs(placed):
                data = self._pread(number, begin, end)
                view = memoryview(data)
                for first, behind, extension, offset, size, payload_crc32, header_crc32 in run:
                    at = offset - begin
                    if crc32(view[first - begin : behind - begin]) != header_crc32:
                        header = data[first - begin : behind - begin]
                        raise ShardError(_header_fault(header, first, index.bundled))
                    members[extension] = payload = data[at : at + size]
                    if crc32(payload) != payload_crc32:
                        raise ShardError(
                            f"member .{extension} ({size} bytes at byte {offset}) is damaged: its "
                            "crc32 is not that of the index"
                        )
        except ShardError as error:
            raise BadSample(str(error), path, key, row) from error
        return Sample(row, path, key, members)

    def _descriptor(self, number: int) -> int:
        descriptors = self._descriptors
        if number in descriptors:
            descriptors.move_to_end(number)
            return descriptors[number]
        path = self.shards.shards[number].path
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.shards.index(number).check_shard_size(path, os.fstat(descriptor).st_size)
        except BaseException:
            os.close(descriptor)
            raise
        descriptors[number] = descriptor
        if len(descriptors) > self.open_files:
            os.close(descriptors.popitem(last=False)[1])
        return descriptor

    def _pread(self, number: int, begin: int, end: int) -> bytes:
        descriptor = self._descriptor(number)
        data = os.pread(descriptor, end - begin, begin)
        while len(data) < end - begin:  # at 2 GiB, or at the end of a file that shrank
            more = os.pread(descriptor, end - begin - len(data), begin + len(data))
            if not more:
                raise ShardError(f"the shard ends at byte {begin + len(data)}: truncated")
            data += more
        return data


_Placed = tuple[int, int, str, int, int, int, int]
"""Begin and end of the header of a member, then what ShardIndex.members says about it."""


def _runs(members: list[_Placed]) -> list[tuple[int, int, list[_Placed]]]:
    """Group members into byte ranges (begin, end, members) that are worth one read each."""
    runs: list[tuple[int, int, list[_Placed]]] = []
    for member in members:
        begin, end = member[0], member[3] + member[4]
        # Members of a bundled sample share a header, so that they begin before the last one ends.
        if runs and runs[-1][0] <= begin and begin - runs[-1][1] <= _LARGEST_GAP_BYTES:
            first, last, together = runs[-1]
            together.append(member)
            runs[-1] = (first, max(last, end), together)
        else:
            runs.append((begin, end, [member]))
    return runs


def _header_fault(block: bytes, at: int, bundled: bool) -> str:
    """Say what stands at byte `at` where the index expects the header of a member."""
    if bundled:
        return (
            f"byte {at} holds {block[:60]!r}, which is not the line of the sample in its bundle: "
            "the shard was replaced or damaged"
        )
    try:
        found = parse_header(block, "the shard", at)
    except ShardError as error:
        return str(error)
    return (
        f"byte {at} holds the header of {found.name!r} ({found.size} bytes), which is not the one "
        "in the index: the shard was replaced or damaged"
    )
