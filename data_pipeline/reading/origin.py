"""Byte ranges of shards from where they lie, for whoever keeps copies of them."""

from collections.abc import Iterator

from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.locations import is_url
from data_pipeline.storage.storage import FileState, TransientReadError

_PIECE = 1 << 20


class Origin:
    """Shards of a set, by number; for any number of threads, and across fork and pickle."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._states: dict[int, FileState] = {}

    def chunks(self, number: int, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end) of a shard as it was when it was opened, piece by piece.

        Raises:
            ShardError: the shard is gone, or is not the one that was indexed.
            TransientReadError: a server stays away, or refuses access.
            OSError: a local file cannot be read.
        """
        shard = self._shards.shards[number]
        if not is_url(shard.path):
            return self._local(shard.path, shard.bytes, begin, end)
        return self._remote(number, begin, end)

    def read(self, number: int, begin: int, end: int) -> bytes:
        """As `chunks`, in one piece."""
        return b"".join(self.chunks(number, begin, end))

    def _remote(self, number: int, begin: int, end: int) -> Iterator[bytes]:
        shard, storage = self._shards.shards[number], self._shards.storage
        try:
            found = self._states.get(number)
            if found is None:
                known = FileState(shard.bytes, shard.version or "")
                found = known if known.version else storage.state(shard.path)
                _check_size(shard.label, found.size, shard.bytes)
                # Kept once it is right: a page that a proxy sent in its place is not.
                self._states[number] = found
            yield from storage.chunks(shard.path, begin, end, found)
        except FileNotFoundError as error:
            raise ShardError(str(error)) from error
        except PermissionError as error:
            raise TransientReadError(str(error)) from error

    @staticmethod
    def _local(path: str, size: int, begin: int, end: int) -> Iterator[bytes]:
        with open(path, "rb", buffering=0) as file:
            _check_size(path, file.seek(0, 2), size)
            file.seek(begin)
            while begin < end:
                piece = file.read(min(end - begin, _PIECE))
                if not piece:
                    raise ShardError(f"the shard ends at byte {begin}: truncated")
                begin += len(piece)
                yield piece


def _check_size(label: str, found: int, expected: int) -> None:
    if found != expected:
        raise ShardError(
            f"{label}: has {found} bytes, but its index describes {expected}: the shard was "
            "truncated or replaced"
        )
