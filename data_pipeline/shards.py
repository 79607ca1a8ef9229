"""A data set as a list of shards, addressed by one row number from 0 to N - 1.

shards = ShardSet.open("photos/train")           # folder with a manifest.json: one read
shards = ShardSet.open("laion/{00000..00099}.tar")
shard_number, row_in_shard = shards.locate(123_456)
"""

import bisect
import errno
import glob
import itertools
import logging
import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import braceexpand
import numpy as np

from data_pipeline import manifest as manifests
from data_pipeline.files import exclusive, leftovers, temporary_name
from data_pipeline.index import SUFFIX, ShardIndex, index_path
from data_pipeline.index_builder import build_index
from data_pipeline.tar_headers import ShardError

CACHE_VARIABLE = "OMNIPRETRAIN_CACHE"
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}

Progress = Callable[[int], None]
_Records = dict[str, dict[str, manifests.ShardRecord] | None]
"""Manifests read so far: folder -> shard name -> record; None for folders without a manifest."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file of a data set."""

    path: str
    samples: int
    bytes: int
    index_digest: str

    @property
    def name(self) -> str:
        """File name without folders."""
        return os.path.basename(self.path)


class ShardSet:
    """An ordered, immutable set of shards; indices are mapped into memory when first needed.

    Copies for worker processes (fork or pickle) are cheap: they carry the shard list only.
    """

    def __init__(self, shards: Iterable[Shard], *, cached_indices: int = 4096) -> None:
        """Take shards in their order; `cached_indices` bounds how many indices stay mapped."""
        self.shards: list[Shard] = list(shards)
        if not any(shard.samples for shard in self.shards):
            raise ShardError(f"no samples in {len(self.shards)} shards")
        # array, not list: workers share its pages, since reading it touches no reference counts.
        self._ends = array("q", itertools.accumulate(shard.samples for shard in self.shards))
        self._cached_indices = cached_indices
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()
        self._faults: dict[int, str] = {}

    @classmethod
    def open(cls, specs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> "ShardSet":
        """Open folders, tar paths, globs and brace expressions, in the order given.

        A folder with a manifest.json stands for its shards; one without for its `*.tar`, sorted.
        Shards that no manifest covers are indexed now if they have no index yet: one pass over
        their bytes, kept beside them or, if that folder is read-only, under $OMNIPRETRAIN_CACHE
        (default ~/.cache/omnipretrain).

        Errors: FileNotFoundError if a spec matches nothing; ShardError naming the damaged file.
        """
        known: _Records = {}
        shards: dict[str, Shard] = {}
        for path in _expand_all(specs, known):
            if path in shards:
                raise ShardError(f"{path}: is listed twice")
            shards[path] = _open_shard(path, known)
        return cls(shards.values())

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

    def column(self, name: str) -> np.ndarray:
        """Return a numeric column of all samples: (N,) int64, or float64 with NaN for missing.

        Errors: KeyError listing the columns if no shard has it.
        """
        parts: list[np.ndarray | None] = []
        known: set[str] = set()
        for number in range(len(self.shards)):
            columns = self.index(number).columns
            known.update(columns)
            parts.append(columns.get(name))
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
        return {"shards": self.shards, "cached_indices": self._cached_indices}

    def __setstate__(self, state: dict) -> None:
        """Restore from the shard list."""
        self.__init__(state["shards"], cached_indices=state["cached_indices"])

    @staticmethod
    def _checked_index(shard: Shard) -> ShardIndex:
        index = load_or_build_index(shard.path)
        if (index.digest, len(index)) != (shard.index_digest, shard.samples):
            raise ShardError(
                f"{shard.path}: its index does not belong to the shard that was opened (another "
                f"digest; {len(index)} samples, not {shard.samples}): files were swapped or "
                "replaced. Restore them, or pack again"
            )
        return index


def expand_specs(specs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """Turn folders, globs and brace expressions into tar paths, in order; duplicates are kept.

    Errors: FileNotFoundError if one matches nothing; ShardError for URLs and unfinished folders.
    """
    return _expand_all(specs, {})


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
    place = next((place for place in places if _can_write_beside(place)), None)
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
        _log.info("indexing %s", shard_path)
        index = build_index(shard_path, progress)
        index.save(place)
        return index


def stored_index(shard_path: str) -> ShardIndex | None:
    """Return the index that lies beside a shard or in the cache folder, if there is one.

    Errors: ShardError if the index file is damaged. The shard itself is not looked at.
    """
    for place in _index_places(shard_path):
        try:
            return ShardIndex.load(place)
        except FileNotFoundError:
            continue
    return None


def _index_places(shard_path: str) -> list[Path]:
    return [index_path(shard_path), _cache_path(shard_path)]


def _cache_path(shard_path: str) -> Path:
    """Where the index of a shard in a read-only folder lies; equal names do not collide."""
    home = os.environ.get(CACHE_VARIABLE) or os.path.expanduser("~/.cache/omnipretrain")
    real = os.path.realpath(shard_path)
    digest = sha256(os.fsencode(real)).hexdigest()[:24]
    return Path(home) / "indices" / f"{digest}-{os.path.basename(real)}{SUFFIX}"


def _expand_all(
    specs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], known: _Records
) -> list[str]:
    if isinstance(specs, str | os.PathLike):
        specs = [specs]
    paths: list[str] = []
    for spec in map(os.fspath, specs):
        if spec.startswith("pipe:") or "://" in spec:
            raise ShardError(f"{spec}: only local shards are read; copy them to a disk first")
        path = os.path.expanduser(spec)
        for pattern in [path] if os.path.exists(path) else braceexpand.braceexpand(path):
            for path in _glob(pattern, spec):
                paths += _shards_of_folder(path, known) if os.path.isdir(path) else [path]
    return paths


def _glob(pattern: str, spec: str) -> list[str]:
    if os.path.exists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    found = sorted(path for path in glob.glob(pattern) if not path.endswith(SUFFIX))
    if not found:
        raise FileNotFoundError(f"{spec}: no file matches")
    return found


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


def _shards_of_folder(folder: str, known: _Records) -> list[str]:
    if os.path.exists(os.path.join(folder, manifests.PLAN_NAME)):
        raise ShardError(f"{folder}: its packing is not finished: run the same command again")
    records = _records(folder, known)
    if records is not None:
        return [os.path.join(folder, name) for name in records]
    found = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
    if not found:
        raise FileNotFoundError(f"{folder}: holds neither a manifest.json nor a *.tar")
    return found


def _records(folder: str, known: _Records) -> dict[str, manifests.ShardRecord] | None:
    """Return the manifest records of a folder by shard name; None without a manifest."""
    folder = os.path.normpath(folder or ".")
    if folder not in known:
        try:
            loaded = manifests.Manifest.load(folder)
            known[folder] = {record.name: record for record in loaded.shards}
        except FileNotFoundError:
            known[folder] = None
    return known[folder]


def _open_shard(path: str, known: _Records) -> Shard:
    records = _records(os.path.dirname(path), known) or {}
    record = records.get(os.path.basename(path))
    if record is not None:
        return Shard(path, record.samples, record.bytes, record.index_digest)
    index = load_or_build_index(path)
    return Shard(path, len(index), index.shard_bytes, index.digest)
