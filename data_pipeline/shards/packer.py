"""Write WebDataset tars whose bytes depend on their samples only, with index and manifest.

with ShardWriter("out/train", "train", max_samples=10_000) as writer:
    writer.write("000000042", {"jpg": jpeg_bytes, "json": json_bytes})
"""

import contextlib
import os
import re
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipeline.files import sync_folder, temporary_name
from data_pipeline.shards import bundles
from data_pipeline.shards.index import ShardIndex, index_path, split_name
from data_pipeline.shards.index_builder import IndexBuilder, wants_payload
from data_pipeline.shards.index_file import save_index
from data_pipeline.shards.manifest import FILE_NAME, Manifest, ShardRecord
from data_pipeline.shards.tar import BLOCK, Member, padded

END_OF_ARCHIVE = bytes(2 * BLOCK)
# Bundles are for tiny samples: one is held in memory while it is written and when it is indexed.
_LARGEST_BUNDLE = 1 << 24
_EXTENSION = re.compile(r"[^./\0A-Z][^/\0A-Z]*")


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A finished shard: its entry in the manifest, and its index."""

    record: ShardRecord
    index: ShardIndex


class ShardFile:
    """One shard being written; nobody sees it before `commit`.

    Members lie in the order in which they are given, with time, owner and group zeroed, so that
    equal samples give equal bytes.
    """

    def __init__(self, path: str | os.PathLike[str], bundle: int = 1) -> None:
        """Start the shard `path` under a temporary name beside it.

        Args: bundle: store so many samples in one member of the tar, see bundles.py; 1: plainly.
        """
        if bundle < 1:
            raise ValueError(f"bundle {bundle}: must be at least 1")
        self.path = Path(path)
        self._per_bundle = bundle
        self._waiting: list[bytes] = []
        """Samples of the bundle in work: a line and the members of each."""
        self._waiting_bytes = 0
        self._bundles = 0
        self._temporary = temporary_name(self.path)
        self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115
        self._digest = sha256()
        self._builder = IndexBuilder(os.fspath(path))
        self._keys: set[str] = set()
        self.bytes = 0
        """Bytes written so far, without the bundle in work and the end-of-archive marker."""

    @property
    def samples(self) -> int:
        """Samples written so far."""
        return len(self._keys)

    @property
    def bytes_at_most(self) -> int:
        """Bytes of the samples added so far, with room for what a bundle in work adds to them."""
        own = 2 * BLOCK + bundles.LONGEST_HEAD if self._per_bundle > 1 else 0
        return self.bytes + self._waiting_bytes + own

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample.

        Errors: ValueError for a key or extension that WebDataset readers would understand
        differently, a key that was used before, or a sample without members.
        """
        check_sample(key, members)
        if key in self._keys:
            raise ValueError(f"{self.path}: the key {key!r} appears twice")
        self._keys.add(key)
        if self._per_bundle == 1:
            for extension, payload in members.items():
                self._add_member(f"{key}.{extension}", extension, payload)
            return
        self._waiting.append(b"".join([bundles.sample_line(key, members), *members.values()]))
        self._waiting_bytes += len(self._waiting[-1])
        if len(self._waiting) == self._per_bundle or self._waiting_bytes >= _LARGEST_BUNDLE:
            self._finish_bundle()

    def commit(self) -> WrittenShard:
        """Finish the shard: it appears whole, with its index, under its final name."""
        if self._waiting:
            self._finish_bundle()
        self._write(END_OF_ARCHIVE)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = self._builder.finish(self.bytes)
        # The index comes first, so that a shard that exists always has one.
        save_index(index, index_path(self.path))
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)
        record = ShardRecord(
            self.path.name, len(index), self.bytes, self._digest.hexdigest(), index.digest
        )
        return WrittenShard(record, index)

    def discard(self) -> None:
        """Give up an unfinished shard and remove its temporary file."""
        with contextlib.suppress(OSError):  # a full disk refuses what is still in the buffer, too
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _add_member(self, name: str, extension: str, payload: bytes) -> None:
        header = _tar_header(name, len(payload))
        member = Member(
            name=name,
            begin=self.bytes,
            offset=self.bytes + len(header),
            size=len(payload),
            header_crc32=zlib.crc32(header[-BLOCK:]),
        )
        self._write(header)
        self._write(payload)
        self._write(bytes(member.end - self.bytes))
        kept = payload if wants_payload(extension, len(payload)) else None
        self._builder.add(member, zlib.crc32(payload), kept)

    def _finish_bundle(self) -> None:
        payload = b"".join([bundles.head_line(len(self._waiting)), *self._waiting])
        name = f"{self._bundles:06d}.{bundles.EXTENSION}"
        self._waiting, self._waiting_bytes = [], 0
        self._bundles += 1
        self._add_member(name, bundles.EXTENSION, payload)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


class ShardWriter:
    """Writes a stream of samples to numbered shards, then the manifest.

    As a context manager it closes at the end of the block, or, after an error, drops the shard in
    work and leaves no manifest: a half-written set cannot be mistaken for a whole one. Long jobs
    over lists of files resume and run in parallel through data_pipeline.shards.packing instead.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        prefix: str = "shard",
        *,
        max_samples: int = 10_000,
        max_bytes: int | None = None,
        bundle: int = 1,
        licence: str = "",
        command: str = "",
        classes: list[str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Start writing `<out_dir>/<prefix>-000000.tar` and so on.

        Args: max_samples, max_bytes: a new shard begins before either would be exceeded; a single
        sample larger than max_bytes gets a shard of its own; bundle: samples that share a member of
        the tar, see bundles.py. The rest goes into the manifest.
        Errors: FileExistsError if the folder already holds a manifest or shards of this prefix.
        """
        if max_samples < 1 or (max_bytes is not None and max_bytes < 1):
            raise ValueError(
                f"max_samples {max_samples} and max_bytes {max_bytes} must be positive"
            )
        self.folder = Path(out_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        present = [*self.folder.glob(f"{prefix}-*.tar"), *self.folder.glob(FILE_NAME)]
        if present:
            raise FileExistsError(f"{present[0]}: exists; write shards to an empty folder")
        self._prefix = prefix
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        self._bundle = bundle
        self._about = {
            "licence": licence,
            "command": command,
            "classes": classes,
            "details": dict(details or {}),
        }
        self._written: list[WrittenShard] = []
        self._shard: ShardFile | None = None

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample: extension -> bytes, stored in this order.

        Errors: ValueError as ShardFile.add.
        """
        if self._shard is not None and self._is_full(
            sample_bytes(key, {e: len(p) for e, p in members.items()}, self._bundle)
        ):
            self._finish_shard()
        if self._shard is None:
            path = self.folder / shard_name(self._prefix, len(self._written))
            self._shard = ShardFile(path, self._bundle)
        self._shard.add(key, members)

    def close(self) -> Manifest:
        """Finish the last shard and write the manifest."""
        if self._shard is not None:
            self._finish_shard()
        manifest = make_manifest(self._written, **self._about)
        manifest.save(self.folder)
        return manifest

    def __enter__(self) -> "ShardWriter":
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Close, or after an error drop the shard in work."""
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.discard()

    def _is_full(self, coming_bytes: int) -> bool:
        after = self._shard.bytes_at_most + coming_bytes + len(END_OF_ARCHIVE)
        too_large = self._max_bytes is not None and after > self._max_bytes
        return self._shard.samples >= self._max_samples or too_large

    def _finish_shard(self) -> None:
        self._written.append(self._shard.commit())
        self._shard = None


def make_manifest(written: list[WrittenShard], **about: Any) -> Manifest:
    """Return the manifest of finished shards; `about`: further fields of Manifest."""
    fields: dict[str, int] = {}
    for shard in written:
        for extension, count in shard.index.extension_counts().items():
            fields[extension] = fields.get(extension, 0) + count
    return Manifest(
        shards=[shard.record for shard in written],
        fields=dict(sorted(fields.items())),
        columns=sorted({name for shard in written for name in _columns(shard.index)}),
        **about,
    )


def _columns(index: ShardIndex) -> list[str]:
    """Names of the columns in an index."""
    texts = [name for name, column in index.derived.texts.items() if column is not None]
    return [*index.columns, *index.derived.columns, *texts]


def shard_name(prefix: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{prefix}-{number:06d}.tar"


def sample_bytes(key: str, sizes: Mapping[str, int], bundle: int = 1) -> int:
    """Return how many bytes a sample takes in a tar, from the payload size of each extension.

    Args: bundle: samples per bundle; above 1 the result is an upper bound.
    """
    if bundle > 1:
        return bundles.bundled_bytes(key, sizes, bundle)
    return sum(
        len(_tar_header(f"{key}.{extension}", size)) + padded(size)
        for extension, size in sizes.items()
    )


def check_sample(key: str, members: Mapping[str, bytes]) -> None:
    """Raise ValueError unless every WebDataset reader gets this key and these extensions back."""
    if not members:
        raise ValueError(f"sample {key!r} has no members")
    if not key or key.startswith("/") or ".." in key.split("/"):
        raise ValueError(f"unsafe key {key!r}: empty, absolute or with '..'")
    for extension in members:
        if extension == bundles.EXTENSION:
            raise ValueError(f"sample {key!r}: the extension {extension!r} is for bundles")
        if not _EXTENSION.fullmatch(extension):
            raise ValueError(f"sample {key!r}: {extension!r} is not a lower-case extension")
        if split_name(f"{key}.{extension}") != (key, extension):
            raise ValueError(
                f"key {key!r} would not be read back: its last part must have no dot, and it must "
                "not begin like '__meta__'"
            )


def _tar_header(name: str, size: int) -> bytes:
    """Return the header blocks of a plain file: ustar, with pax blocks for long or other names."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o444
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
