"""Indices of shards that are read by URL: fetched from beside the shard, or built from afar.

They are kept in the cache folder ($OMNIPRETRAIN_CACHE), under a name made of the URL, size and
version of the file: another content is another entry, and what is stored is never out of date.
"""

import logging
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from data_pipeline.files import cache_folder, exclusive, leftovers, temporary_name
from data_pipeline.index import SUFFIX, ShardIndex
from data_pipeline.index_builder import index_file
from data_pipeline.locations import base_name, beside, identity, without_secrets
from data_pipeline.remote import UrlStorage
from data_pipeline.remote_file import RemoteFile
from data_pipeline.storage import FileState
from data_pipeline.tar_headers import ShardError

_log = logging.getLogger(__name__)


def foreign_index(
    url: str,
    storage: UrlStorage,
    *,
    full: bool | None = None,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[ShardIndex, str]:
    """Return the index of a remote shard that no manifest covers, and the shard's version.

    Args: full: None: as the settings of the storage have it (`foreign_index`); the rest, and
    errors, as `remote_index`.
    """
    state = storage.state(url)
    if full is None:
        full = storage.settings.foreign_index == "full"
    index = remote_index(url, state, storage, full=full, force=force, progress=progress)
    return index, state.version


def remote_index(
    url: str,
    state: FileState,
    storage: UrlStorage,
    *,
    digest: str = "",
    full: bool = False,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ShardIndex:
    """Return the index of a remote shard: as stored, as it lies beside the shard, or a new one.

    Several processes may ask at once: one fetches or builds, the others wait for it.

    Args:
        state: of the shard; what is read must belong to it.
        digest: of the index that is wanted, if a manifest tells it.
        full: a new index takes one pass over all bytes, not over the headers alone. An index that
            a manifest wants is always built so.
        force: build it in any case.
        progress: called with the number of bytes passed since its last call.

    Raises:
        ShardError: the shard is damaged, or the index beside it belongs to another one.
        OSError: the cache folder cannot be written.
        FileNotFoundError, PermissionError, TransientReadError: the shard cannot be read.
    """
    full = full or bool(digest)
    place = _place(url, state, digest or ("full" if full else "headers"))
    if not force and (index := _stored(place)) is not None:
        return index
    place.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(place) as locked:
        if not force and (index := _stored(place)) is not None:
            return index  # another process got it while this one waited
        if locked:
            for leftover in leftovers(place):
                leftover.unlink(missing_ok=True)
        if not force and (index := _fetched(url, state, storage, place)) is not None:
            return index
        _log.info("indexing %s%s", without_secrets(url), "" if full else " by its headers")
        file = RemoteFile(storage, url, state)
        index = index_file(file, without_secrets(url), state.size, progress, headers_only=not full)
        index.save(place)
        return index


def _place(url: str, state: FileState, kind: str) -> Path:
    name = f"{identity(url)}\0{state.size}\0{state.version}\0{kind}"
    digest = sha256(name.encode()).hexdigest()[:24]
    return cache_folder() / "indices" / f"{digest}-{base_name(url)}{SUFFIX}"


def _stored(place: Path) -> ShardIndex | None:
    try:
        return ShardIndex.load(place)
    except FileNotFoundError:
        return None
    except ShardError as error:
        _log.warning("%s; it is made anew", error)
        return None


def _fetched(url: str, state: FileState, storage: UrlStorage, place: Path) -> ShardIndex | None:
    """The index that lies beside the shard, now in `place`; None if there is none."""
    source = beside(url, SUFFIX)
    try:
        found = storage.state(source)
        pieces = storage.chunks(source, 0, found.size, found)
    except (FileNotFoundError, PermissionError):  # some stores refuse what is not there
        return None
    temporary = temporary_name(place)
    try:
        with open(temporary, "wb") as file:
            file.writelines(pieces)
        try:
            index = ShardIndex.load(temporary)
            index.check_shard_size(without_secrets(url), state.size)
        except ShardError as error:
            fault = str(error).replace(str(temporary), without_secrets(source))
            raise ShardError(fault) from None
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)
    return index
