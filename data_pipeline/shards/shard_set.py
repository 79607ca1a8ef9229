"""A data set as a list of shards, addressed by one row number from 0 to N - 1.

shards = ShardSet.open("photos/train")           # folder with a manifest.json: one read
shards = ShardSet.open("laion/{00000..00099}.tar")
shards = ShardSet.open("https://host/laion/{00000..00099}.tar")
shard_number, row_in_shard = shards.locate(123_456)
"""

import bisect
import contextlib
import errno
import itertools
import logging
import os
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from data_pipeline.files import CACHE_VARIABLE, cache_folder, exclusive, leftovers, temporary_name
from data_pipeline.shards.columns import column_names, column_of
from data_pipeline.shards.index import SUFFIX, ShardIndex, index_path
from data_pipeline.shards.index_builder import build_index
from data_pipeline.shards.index_file import headers_digest, is_foreign, load_index, save_index
from data_pipeline.shards.names import Catalogue, Specs
from data_pipeline.shards.remote_index import foreign_index, remote_index
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.locations import base_name, is_url, without_secrets
from data_pipeline.storage.remote import RemoteSettings, UrlStorage
from data_pipeline.storage.storage import FileState

MAX_MEMBER_BYTES = 1 << 28
"""Larger members are refused before they are read, unless a reader is told otherwise."""
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_REPORT_EVERY_S = 10.0
_NAMED = 10

Progress = Callable[[int], None]
_log = logging.getLogger("omnipretrain.data")


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file of a data set."""

    path: str
    """Or URL."""
    samples: int
    bytes: int
    index_digest: str
    version: str | None = None
    """Of a remote file without a manifest, as FileState has it; None where it was not asked for."""
    payloads_hashed: bool = True
    """False: its index was built from its headers alone."""

    @property
    def name(self) -> str:
        """File name without folders."""
        return base_name(self.path)

    @property
    def label(self) -> str:
        """The path for messages: a URL without what may be secret in it."""
        return without_secrets(self.path)


class ShardSet:
    """An ordered, immutable set of shards; indices are mapped into memory when first needed.

    Copies for worker processes (fork or pickle) are cheap: they carry the shard list only.
    """

    def __init__(
        self,
        shards: Iterable[Shard],
        *,
        storage: UrlStorage | None = None,
        cached_indices: int = 4096,
    ) -> None:
        """Take shards in their order; `cached_indices` bounds how many indices stay mapped."""
        self.shards: list[Shard] = list(shards)
        self.storage = UrlStorage() if storage is None else storage
        if not any(shard.samples for shard in self.shards):
            raise ShardError(f"no samples in {len(self.shards)} shards")
        # array, not list: workers share its pages, since reading it touches no reference counts.
        self._ends = array("q", itertools.accumulate(shard.samples for shard in self.shards))
        self._cached_indices = cached_indices
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()
        self._faults: dict[int, str] = {}

    @classmethod
    def open(cls, specs: Specs, remote: RemoteSettings | None = None) -> "ShardSet":
        """Open folders, tar paths, globs, URLs and brace expressions, in the order given.

        A folder with a manifest.json stands for its shards; one without for its `*.tar`, sorted.
        Shards that no manifest covers are indexed now if they have no index yet: one pass over
        their bytes, kept beside them or, if that folder is read-only, under $OMNIPRETRAIN_CACHE
        (default ~/.cache/omnipretrain). Indices of remote shards are kept there too.

        Args: remote: how URLs are read.
        Errors: FileNotFoundError if a spec matches nothing; ShardError naming the damaged file;
        PermissionError and TransientReadError from servers.
        """
        catalogue = Catalogue(UrlStorage(remote))
        paths = catalogue.expand(specs)
        for path, count in Counter(paths).items():
            if count > 1:
                raise ShardError(f"{without_secrets(path)}: is listed twice")
        return cls(_open_shards(paths, catalogue), storage=catalogue.storage)

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._ends[-1]

    def locate(self, row: int) -> tuple[int, int]:
        """Return (number of the shard, row inside it) of a row of the whole set.

        Errors: IndexError if the row does not exist.
        """
        if not 0 <= row < self._ends[-1]:
            raise IndexError(f"row {row} of a data set with {len(self)} samples")
        number = bisect.bisect_right(self._ends, row)
        return number, row - (self._ends[number - 1] if number else 0)

    @property
    def fingerprint(self) -> str:
        """sha256 of shard names, counts and index digests, in order; folders do not count."""
        lines = (f"{s.name}\0{s.samples}\0{s.index_digest}\n" for s in self.shards)
        return sha256("".join(lines).encode()).hexdigest()

    @property
    def known_by_headers(self) -> list[int]:
        """Numbers of the shards whose indices were built from their headers alone."""
        return [number for number, shard in enumerate(self.shards) if not shard.payloads_hashed]

    def fingerprint_by_headers(self, numbers: Collection[int] | None = None) -> str:
        """`fingerprint` as it was when shards had no index but one of their headers: the same
        samples, of which less was known. Reads the indices of these shards.

        numbers: which shards; None: all remote ones that no manifest covers.
        """
        if numbers is None:
            numbers = {n for n, shard in enumerate(self.shards) if shard.version is not None}
        lines = (
            f"{s.name}\0{s.samples}\0"
            f"{headers_digest(self.read_index(n)) if n in numbers else s.index_digest}\n"
            for n, s in enumerate(self.shards)
        )
        return sha256("".join(lines).encode()).hexdigest()

    def index(self, number: int) -> ShardIndex:
        """Return the index of a shard; built if it does not exist yet.

        Errors: ShardError if the shard is not the one that was indexed or listed in the manifest;
        OSError if it cannot be read.
        """
        if number in self._indices:
            self._indices.move_to_end(number)
            return self._indices[number]
        if number in self._faults:
            raise ShardError(self._faults[number])
        try:
            index = self._checked_index(self.shards[number])
        except ShardError as error:
            self._faults[number] = str(error)  # do not read a damaged shard again for each sample
            raise
        self._indices[number] = index
        if len(self._indices) > self._cached_indices:
            self._indices.popitem(last=False)
        return index

    def read_index(self, number: int) -> ShardIndex:
        """As `index`, but kept nowhere: for one pass over all shards, also by several threads."""
        return self._checked_index(self.shards[number])

    def fetch_indices(self, numbers: Iterable[int]) -> None:
        """Get the indices of remote shards that are not at hand yet, several at a time.

        What is wrong with a shard is left for `index` to say. Errors: TransientReadError.
        """
        missing = [
            number
            for number in dict.fromkeys(numbers)
            if number not in self._indices
            and number not in self._faults
            and is_url(self.shards[number].path)
        ]
        if len(missing) < 2:
            return

        def fetch(number: int) -> None:
            with contextlib.suppress(ShardError, OSError):
                self.read_index(number)

        threads = min(len(missing), self.storage.settings.requests_per_host)
        with ThreadPoolExecutor(threads) as executor:
            for _ in executor.map(fetch, missing):
                pass  # now they lie in the cache folder, whence `index` maps them

    def column(self, name: str) -> np.ndarray:
        """Return a numeric column of all samples: (N,) int64, or float64 with NaN for missing.

        Errors: KeyError listing the columns if no shard has it.
        """
        parts: list[np.ndarray | None] = []
        known: set[str] = set()
        for number in range(len(self.shards)):
            index = self.index(number)
            known.update(column_names(index))
            parts.append(column_of(index, name))
        if name not in known:
            raise KeyError(f"no column {name!r}; there are {', '.join(sorted(known)) or 'none'}")
        return np.concatenate(
            [
                np.full(shard.samples, np.nan) if part is None else part
                for shard, part in zip(self.shards, parts, strict=True)
                if shard.samples
            ]
        )

    def __getstate__(self) -> dict:
        """Pickle without mapped indices."""
        return {
            "shards": self.shards,
            "storage": self.storage,
            "cached_indices": self._cached_indices,
        }

    def __setstate__(self, state: dict) -> None:
        """Restore from the shard list."""
        self.__init__(**state)

    def _checked_index(self, shard: Shard) -> ShardIndex:
        if is_url(shard.path):
            # Of a shard whose manifest told the digest, the version is not known: it is not asked.
            digest = shard.index_digest if shard.version is None else ""
            state = FileState(shard.bytes, shard.version or "")
            full = self.storage.settings.foreign_index == "full"
            index = remote_index(shard.path, state, self.storage, digest=digest, full=full)
        else:
            index = load_or_build_index(shard.path)
        same = index.digest == shard.index_digest
        if not same and shard.version is not None:
            # Opened with an index of headers; another run has found a full one since.
            same = headers_digest(index) == shard.index_digest
        if not same or len(index) != shard.samples:
            raise ShardError(
                f"{shard.label}: its index does not belong to the shard that was opened (another "
                f"digest; {len(index)} samples, not {shard.samples}): files were swapped or "
                "replaced. Restore them, or pack again"
            )
        return index


def load_or_build_index(
    shard_path: str, *, force: bool = False, progress: Progress | None = None
) -> ShardIndex:
    """Return the ShardIndex of a tar, building and storing it if there is none (or `force`).

    Several processes may ask at once: one builds, the others wait for it. Where the folder cannot
    be written, the index is kept in the cache folder instead.

    Errors: OSError; ShardError if the shard is damaged, or is not the one that was indexed.
    """
    size = os.stat(shard_path).st_size
    if not force and (index := stored_index(shard_path)) is not None:
        index.check_shard_size(shard_path, size)
        return index
    places = _index_places(shard_path)
    own = (place for place in places if not is_foreign(place))
    place = next((place for place in own if _can_write_beside(place)), None)
    if place is None:
        raise ShardError(
            f"{shard_path}: has no index, and neither its folder nor {places[1].parent} can be "
            f"written: set {CACHE_VARIABLE} to a folder that can"
        )
    with exclusive(place) as locked:
        if not force and (index := stored_index(shard_path)) is not None:
            return index  # another process built it while this one waited
        if locked:
            for leftover in leftovers(place):
                leftover.unlink(missing_ok=True)
        _log.debug("indexing %s", shard_path)
        index = build_index(shard_path, progress)
        save_index(index, place)
        return index


def stored_index(shard_path: str) -> ShardIndex | None:
    """Return the index that lies beside a shard or in the cache folder, if there is one.

    Errors: ShardError if the index file is damaged. The shard itself is not looked at.
    """
    for place in _index_places(shard_path):
        if is_foreign(place):
            continue  # left alone; ours lies in the cache folder
        try:
            return load_index(place)
        except FileNotFoundError:
            continue
    return None


def _index_places(shard_path: str) -> list[Path]:
    return [index_path(shard_path), _cache_path(shard_path)]


def _cache_path(shard_path: str) -> Path:
    """Where the index of a shard in a read-only folder lies; equal names do not collide."""
    real = os.path.realpath(shard_path)
    digest = sha256(os.fsencode(real)).hexdigest()[:24]
    return cache_folder() / "indices" / f"{digest}-{os.path.basename(real)}{SUFFIX}"


def _can_write_beside(place: Path) -> bool:
    probe = temporary_name(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno in _UNWRITABLE:
            return False
        raise
    return True


def _reported(shards: Iterable[Shard], total: int) -> Iterator[Shard]:
    """The shards as they come; says now and then how many have, if that takes long."""
    told = time.monotonic()
    for number, shard in enumerate(shards, 1):
        yield shard
        if (now := time.monotonic()) - told >= _REPORT_EVERY_S:
            told = now
            _log.info(
                "opened %d of %d shards (an index that is missing is built, once)", number, total
            )


def _changed_beside(path: str, paths: list[str]) -> str:
    """Names of the other local shards that are gone or do not fit their index; "" if none is."""
    changed = []
    for other in paths:
        if other == path or is_url(other):
            continue
        try:
            size = os.stat(other).st_size
            if (index := stored_index(other)) is not None:
                index.check_shard_size(other, size)
        except (ShardError, OSError):
            changed.append(other)
    more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
    return ", ".join(changed[:_NAMED]) + more


def _open_shards(paths: list[str], catalogue: Catalogue) -> list[Shard]:
    """Shards by manifest or by their indices; those of servers several at a time."""
    records = {path: catalogue.record(path) for path in paths}

    def open_one(path: str) -> Shard:
        record = records[path]
        if record is not None:
            return Shard(path, record.samples, record.bytes, record.index_digest)
        if not is_url(path):
            try:
                index, version = load_or_build_index(path), None
            except (ShardError, FileNotFoundError) as error:
                others = _changed_beside(path, [p for p in paths if records[p] is None])
                if not others:
                    raise
                raise ShardError(f"{error}; and so it is with {others}") from error
        else:
            index, version = foreign_index(path, catalogue.storage)
        hashed = index.payloads_hashed
        return Shard(path, len(index), index.shard_bytes, index.digest, version, hashed)

    if not any(is_url(path) and records[path] is None for path in paths):
        return list(_reported(map(open_one, paths), len(paths)))
    with ThreadPoolExecutor(catalogue.storage.settings.requests_per_host) as executor:
        try:
            return list(_reported(executor.map(open_one, paths), len(paths)))
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
