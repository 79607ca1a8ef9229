"""Read single samples by row number: one range each, and no byte that was not checked."""

import os
import time
from collections.abc import Collection
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32  # about eight times the speed of zlib's

from data_pipeline import activity
from data_pipeline.reading.byte_sources import KeepsCopies, ReadsAhead, byte_source_of
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.shard_set import MAX_MEMBER_BYTES, ShardSet, stored_index
from data_pipeline.shards.tar import parse_header
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.locations import is_url
from data_pipeline.storage.storage import ByteSource, TransientReadError

# Unwanted bytes up to this many are read along rather than skipped by a second system call.
_LARGEST_GAP_BYTES = 64 * 1024

# A shard that is not there, or that this user may not read, will hardly come back by itself. So
# many looks at it, then its samples are bad: storage that fails says something else, or lacks the
# whole folder.
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_LOOKS = 3


class Sample(NamedTuple):
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


class SampleReader:
    """Reads samples of a ShardSet. Not for use by several threads at once.

    Safe across fork and pickle, as its source is.
    """

    def __init__(
        self,
        shards: ShardSet,
        source: ByteSource | None = None,
        *,
        retries: int = 5,
        first_wait_s: float = 0.5,
        max_member_bytes: int = MAX_MEMBER_BYTES,
    ) -> None:
        """Read from `source`, by default from where the shards lie (`byte_sources.byte_source_of`).

        Reads that the operating system fails are tried again, doubling the wait each time: the
        defaults wait 15.5 s in all before a TransientReadError. Remote storage has its own
        patience. A shard that is missing from a folder that is there is looked for three times,
        once; members of more than `max_member_bytes` are not read. Both make bad samples.
        """
        self.shards = shards
        self.source = byte_source_of(shards) if source is None else source
        self.retries = retries
        self.first_wait_s = first_wait_s
        self.max_member_bytes = max_member_bytes
        self._lost: dict[int, tuple[str, ShardIndex | None]] = {}

    def read(self, row: int, extensions: Collection[str] | None = None) -> Sample:
        """Return a sample with all its members, or those of `extensions` that it has.

        Every tar header (size and name of the member) and every payload that is returned matches
        its crc32 in the index; payloads have none in an index of headers alone.

        Errors: IndexError for a row that does not exist; BadSample for a permanent fault of the
        data; TransientReadError if storage fails.
        """
        number, local = self.shards.locate(row)
        attempt = -1
        while True:
            attempt += 1
            if number in self._lost:
                raise self._lost_sample(number, local, row)
            try:
                return self._read_once(number, local, row, extensions)
            except OSError as error:
                self.close()  # a stale handle heals only if the file is opened again
                if isinstance(error, PermissionError) and is_url(self.shards.shards[number].path):
                    # A server refuses the index: access is no property of a sample.
                    raise TransientReadError(str(error)) from error
                if self._is_lost(number, error, attempt):
                    self._lose(number, error)
                    continue
                if attempt == self.retries:
                    path = self.shards.shards[number].label
                    raise TransientReadError(
                        f"{path}: {error.strerror or error} (tried {attempt + 1} times)"
                    ) from error
                self.source.counters["retries"] += 1
                activity.retrying(attempt + 1, str(error))
            time.sleep(self.first_wait_s * 2**attempt)

    def expect(self, rows: Collection[int], extensions: Collection[str] | None = None) -> None:
        """Announce what will be read next; a remote source fetches it with several requests.

        Changes nothing but the time that reading takes; faults of the data wait for `read`.
        """
        self.shards.fetch_indices(self.shards.locate(row)[0] for row in rows)
        if not isinstance(self.source, ReadsAhead):
            return
        for row in rows:
            try:
                number, local = self.shards.locate(row)
                if number in self._lost:
                    continue
                wanted = self._wanted(self.shards.index(number), local, extensions)
            except (ShardError, OSError):
                continue
            for begin, end, _ in _runs(wanted):
                self.source.expect(number, begin, end)

    def close(self) -> None:
        """Close all shards; reading again opens them again."""
        self.source.close()

    def __enter__(self) -> "SampleReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read_once(
        self, number: int, local: int, row: int, extensions: Collection[str] | None
    ) -> Sample:
        shard, key = self.shards.shards[number], "?"
        members: dict[str, bytes] = {}
        try:
            index = self.shards.index(number)
            key = index.key(local)
            for begin, end, run in _runs(self._wanted(index, local, extensions)):
                try:
                    self._read_run(number, begin, end, run, index, members)
                except ShardError:
                    if not self._renew(number, begin, end):
                        raise
                    self.source.counters["retries"] += 1
                    self._read_run(number, begin, end, run, index, members)
        except ShardError as error:
            raise BadSample(str(error), shard.label, key, row) from error
        return Sample(row, shard.label, key, members)

    def _read_run(
        self,
        number: int,
        begin: int,
        end: int,
        run: list["_Placed"],
        index: ShardIndex,
        members: dict[str, bytes],
    ) -> None:
        """Add the members of one run, which are checked, from the bytes [begin, end) of a shard."""
        activity.reading_bytes(number, begin, end)
        data = self.source.pread(number, begin, end)
        hashed = index.payloads_hashed
        for first, behind, extension, offset, size, payload_crc32, header_crc32 in run:
            header = data[first - begin : behind - begin]
            if crc32(header) != header_crc32:
                raise ShardError(_header_fault(header, first, index.bundled))
            members[extension] = payload = data[offset - begin : offset - begin + size]
            if hashed and crc32(payload) != payload_crc32:
                raise ShardError(
                    f"member .{extension} ({size} bytes at byte {offset}) is damaged: its "
                    "crc32 is not that of the index"
                )

    def _renew(self, number: int, begin: int, end: int) -> bool:
        """Whether the fault may lie in a copy of the bytes, which will now be fetched again."""
        return isinstance(self.source, KeepsCopies) and self.source.renew(number, begin, end)

    def _wanted(
        self, index: ShardIndex, row: int, extensions: Collection[str] | None
    ) -> list["_Placed"]:
        """Members of a sample that are to be read. Raises ShardError for one that is too large."""
        placed = index.placed(row, extensions)
        for member in placed:
            if member[4] > self.max_member_bytes:
                raise ShardError(
                    f"member .{member[2]} has {member[4]} bytes, more than max_member_bytes "
                    f"({self.max_member_bytes})"
                )
        return placed

    # ---- shards that are not there ---------------------------------------------------------------

    def _is_lost(self, number: int, error: OSError, attempt: int) -> bool:
        """Whether the shard itself is gone, and not the storage that it lies on."""
        path = self.shards.shards[number].path
        if not isinstance(error, _LASTING):
            return False
        if is_url(path):
            return True  # the server said so, and remote storage has asked it again already
        looks = min(_LOOKS, self.retries + 1)
        return attempt + 1 >= looks and not _is_empty(os.path.dirname(path) or ".")

    def _lose(self, number: int, error: OSError) -> None:
        shard = self.shards.shards[number]
        try:
            index = stored_index(shard.path)  # its keys name the samples that are lost
        except (ShardError, OSError):
            index = None
        if index is not None and index.digest != shard.index_digest:
            index = None
        self._lost[number] = f"the shard cannot be opened: {error.strerror or error}", index

    def _lost_sample(self, number: int, local: int, row: int) -> BadSample:
        reason, index = self._lost[number]
        key = "?" if index is None else index.key(local)
        return BadSample(reason, self.shards.shards[number].label, key, row)


def _is_empty(folder: str) -> bool:
    """Whether nothing is there: the mount point of a file system that is away."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


_Placed = tuple[int, int, str, int, int, int, int]
"""Begin and end of the header of a member, then what ShardIndex.members says about it."""


def _runs(members: list[_Placed]) -> list[tuple[int, int, list[_Placed]]]:
    """Group members into byte ranges (begin, end, members) that are worth one read each."""
    if members and (end := members[-1][3] + members[-1][4]) - members[0][0] <= _LARGEST_GAP_BYTES:
        return [(members[0][0], end, members)]  # most samples of small members
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
