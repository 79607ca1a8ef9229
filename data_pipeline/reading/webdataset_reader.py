"""One shard from begin to end through the webdataset library, with what it lets pass in silence.

Python's tarfile, which webdataset reads with, takes a damaged header or a cut between two members
for the end of the archive, and nobody asks how a command ended. Here each of them is an error.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_pipeline.reading.reader import Sample
from data_pipeline.shards import bundles
from data_pipeline.shards.tar import BLOCK
from data_pipeline.storage.locations import without_secrets

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_PIECE = 1 << 20


class ShardFault(Exception):
    """A shard could not be read to its end."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason


def label_of(url: str, number: int) -> str:
    """A name for messages: commands may hold secrets, so only their first word is told."""
    if url.startswith("pipe:"):
        return f"pipe:{url[5:].split(maxsplit=1)[0] if url[5:].strip() else ''} (shard {number})"
    return without_secrets(url)


def streamed_samples(url: str, number: int) -> Iterator[Sample]:
    """Yield the samples of a shard, with the bytes of all their members.

    Args:
        url: what webdataset opens; number: of the shard, for messages.

    Raises:
        ShardFault: it cannot be opened, or ends early; samples before that were yielded.
    """
    label, key = label_of(url, number), "?"
    try:
        with contextlib.closing(_Watched(webdataset.gopen(url))) as stream:
            members = tar_file_expander([{"url": url, "stream": stream}], eof_value=None)
            for found in group_by_keys(members):
                key = found["__key__"]
                content = {
                    name: value for name, value in found.items() if not name.startswith("__")
                }
                if bundles.is_bundle(*next(iter(content.items()), ("", b""))):
                    yield from _unbundled(content[bundles.EXTENSION], label)
                else:
                    yield Sample(0, label, key, content)
            stream.check_end()
    except Exception as error:  # whatever commands, tarfile and decompressors raise
        raise ShardFault(label, key, _reason(error, url, label)) from error


def _unbundled(payload: bytes, label: str) -> Iterator[Sample]:
    for key, _, _, members in bundles.iter_samples(payload, label):
        content = {m.extension: payload[m.offset : m.offset + m.size] for m in members}
        yield Sample(0, label, key, content)


class _Watched:
    """A stream that knows whether what follows the end of its archive is empty."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._begin = self._last = b""
        self._ended = False

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        data = self._stream.read(size)
        if len(self._begin) < 8:
            self._begin = (self._begin + data)[:8]
        self._last = (self._last + data)[-BLOCK:] if len(data) < BLOCK else data[-BLOCK:]
        return data

    def check_end(self) -> None:
        """Read what is left. Raises ValueError if there is more than zeros; OSError of a command
        that failed."""
        plain = not self._begin.startswith(_COMPRESSED)
        while data := self.read(_PIECE):
            if plain and data.strip(b"\0"):
                raise ValueError(
                    "there are data behind the end of the archive: a damaged header, or archives "
                    "that were concatenated"
                )
        self._ended = True
        self._stream.close()
        if not self._begin or (plain and self._last.strip(b"\0")):
            raise ValueError("it ends without an end-of-archive marker: truncated or not a tar")

    def close(self) -> None:
        """Let go of the stream; a command that still runs is ended."""
        if self._ended:
            return
        process = getattr(self._stream, "proc", None)
        if process is not None:
            process.kill()
        with contextlib.suppress(OSError):
            self._stream.close()


def _reason(error: Exception, url: str, label: str) -> str:
    """What went wrong, without the text of commands."""
    first = error.args[0] if error.args else ""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(first)
    if " exit " in text and url.startswith("pipe:"):
        text = "the command ended with status " + text.split(" exit ")[1].split()[0]
    return f"{type(error).__name__}: {text}".replace(url, label)
