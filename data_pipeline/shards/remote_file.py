"""A file by URL that can be read and sought in, for one pass over a shard or over its headers."""

import io

from data_pipeline.storage.storage import FileState, Storage

# What one request brings after a jump: usually all small members of a sample and the next header.
_LEAST_BYTES = 8 * 1024
_MOST_BYTES = 4 << 20


class RemoteFile(io.RawIOBase):
    """Reads a URL by ranges: small ones where the reader jumps, growing ones where it goes on."""

    def __init__(self, storage: Storage, url: str, state: FileState) -> None:
        """`state` is what every answer must belong to."""
        self._storage, self._url, self._state = storage, url, state
        self._position = 0
        self._begin, self._window = 0, b""
        self._request_bytes = _LEAST_BYTES

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position; nothing is read."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._state.size}
        self._position = start[whence] + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, fewer only at the end of the file; raises as Storage.read."""
        end = self._state.size if size < 0 else min(self._position + size, self._state.size)
        parts = []
        while self._position < end:
            at = self._position - self._begin
            if not 0 <= at < len(self._window):
                self._load(end)
                at = 0
            part = self._window[at : at + end - self._position]
            parts.append(part)
            self._position += len(part)
        return b"".join(parts)

    def _load(self, end: int) -> None:
        """Ask for the bytes from the position on, up to `end` or as many as are worth it."""
        goes_on = self._window and self._position == self._begin + len(self._window)
        larger = min(2 * self._request_bytes, _MOST_BYTES)
        self._request_bytes = larger if goes_on else _LEAST_BYTES
        begin = self._position
        stop = begin + min(max(self._request_bytes, end - begin), _MOST_BYTES)
        self._window = self._storage.read(
            self._url, begin, min(stop, self._state.size), self._state
        )
        self._begin = begin
