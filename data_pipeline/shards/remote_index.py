"""Indices of shards that are read by URL: fetched from beside the shard, or built from afar.

They are kept in the cache folder ($OMNIPRETRAIN_CACHE), under a name made of the URL, size and
version of the file: another content is another entry, and what is stored is never out of date. Only
an index of headers alone may be outdone, by one that somebody has put beside the shard since: it is
looked for whenever a set of shards is opened, once for all processes that are opened together.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from data_pipeline.files import cache_folder, exclusive, leftovers, temporary_name, using_cache
from data_pipeline.shards.index import SUFFIX, ShardIndex
from data_pipeline.shards.index_builder import index_file
from data_pipeline.shards.index_file import is_foreign, load_index, save_index
from data_pipeline.shards.remote_file import RemoteFile
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.locations import base_name, beside, folder_of, identity, without_secrets
from data_pipeline.storage.remote import UrlStorage
from data_pipeline.storage.storage import FileState

_log = logging.getLogger("omnipretrain.data")

# Processes of a node that open the same shards within this time ask once for better indices.
_LOOK_AGAIN_S = 60.0

_told: set[str] = set()


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
    index = remote_index(
        url, state, storage, full=full, force=force, opening=True, progress=progress
    )
    return index, state.version


def remote_index(
    url: str,
    state: FileState,
    storage: UrlStorage,
    *,
    digest: str = "",
    full: bool = False,
    force: bool = False,
    opening: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ShardIndex:
    """Return the index of a remote shard: as stored, as it lies beside the shard, or a new one.

    Several processes may ask at once: one fetches or builds, the others wait for it.

    Args:
        state: of the shard; what is read must belong to it.
        digest: of the index that is wanted, if a manifest tells it. Another one is returned, for
            the caller to refuse, but not kept: what is beside the shard may be put right.
        full: an index of headers alone will not do; a new one takes one pass over all bytes. An
            index that a manifest wants is always built so.
        force: build it in any case.
        opening: the shard has just been found, with others. In place of a stored index of headers,
            see whether there is a full one by now; and if the folder refuses indices, believe it.
        progress: called with the number of bytes passed since its last call.

    Raises:
        ShardError: the shard is damaged, or the index beside it belongs to another one.
        OSError: the cache folder cannot be written, and no index that will do lies there.
        FileNotFoundError, PermissionError, TransientReadError: the shard cannot be read.
    """
    place = _place(url, state, digest or "full")
    weak = None if full or digest else _place(url, state, "headers")
    if not force and (index := _at_hand(place, weak, opening, digest)) is not None:
        return index
    with contextlib.ExitStack() as stack:
        try:
            with using_cache():
                place.parent.mkdir(parents=True, exist_ok=True)
                locked = stack.enter_context(exclusive(place))
        except OSError:
            # The folder may be that of another user: then what lies there will do.
            if not force and weak is not None and (index := _stored(weak)) is not None:
                return index
            raise
        if not force and (index := _at_hand(place, weak, opening, digest)) is not None:
            return index  # another process got it while this one waited
        if locked:
            for leftover in (*leftovers(place), *(leftovers(weak) if weak else ())):
                leftover.unlink(missing_ok=True)
        if not force:
            index = _fetched(url, state, storage, place, weak, digest, opening)
            if index is not None:
                return index
        if not force and weak is not None and (index := _stored(weak)) is not None:
            with contextlib.suppress(OSError):
                os.utime(weak)  # for `_at_hand`: looked for, and not found
            return index
        _log.debug("indexing %s%s", without_secrets(url), " by its headers" if weak else "")
        file = RemoteFile(storage, url, state)
        index = index_file(
            file, without_secrets(url), state.size, progress, headers_only=weak is not None
        )
        if digest in ("", index.digest):
            save_index(index, place if index.payloads_hashed else weak)
        return index


def _at_hand(place: Path, weak: Path | None, opening: bool, digest: str) -> ShardIndex | None:
    """The index that is stored: in `place` or, where one of headers will do, in `weak`."""
    index = _stored(place)
    if index is not None and digest not in ("", index.digest):
        index = None
    if index is not None or weak is None:
        return index
    if opening:
        with contextlib.suppress(FileNotFoundError):
            if abs(time.time() - weak.stat().st_mtime) > _LOOK_AGAIN_S:
                return None
    return _stored(weak)


def _place(url: str, state: FileState, kind: str) -> Path:
    name = f"{identity(url)}\0{state.size}\0{state.version}\0{kind}"
    digest = sha256(name.encode()).hexdigest()[:24]
    return cache_folder() / "indices" / f"{digest}-{base_name(url)}{SUFFIX}"


def _stored(place: Path) -> ShardIndex | None:
    try:
        return load_index(place)
    except FileNotFoundError:
        return None
    except ShardError as error:
        _log.warning("%s; it is made anew", error)
        return None


def _fetched(
    url: str,
    state: FileState,
    storage: UrlStorage,
    place: Path,
    weak: Path | None,
    digest: str,
    opening: bool,
) -> ShardIndex | None:
    """The index that lies beside the shard, now in `place` or, if it is one of headers, in `weak`;
    None if there is none that will do. One of another digest than is wanted is not kept."""
    source, folder = beside(url, SUFFIX), without_secrets(folder_of(url))
    try:
        # The first refusal may heal; from then on each shard would wait for nothing.
        found = storage.state(source, patient=not (opening and folder in storage.refusing))
        pieces = storage.chunks(source, 0, found.size, found)
    except FileNotFoundError:
        return None
    except PermissionError as error:  # some stores refuse what is not there
        storage.refusing.add(folder)
        _tell_of_refusal(folder, error)
        return None
    temporary = temporary_name(place)
    try:
        with open(temporary, "wb") as file:
            file.writelines(pieces)
        if is_foreign(temporary):
            return None
        try:
            index = load_index(temporary)
            index.check_shard_size(without_secrets(url), state.size)
        except ShardError as error:
            fault = str(error).replace(str(temporary), without_secrets(source))
            raise ShardError(fault) from None
        target = place if index.payloads_hashed else weak
        if target is None:
            return None
        if digest in ("", index.digest):
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return index


def _tell_of_refusal(folder: str, error: PermissionError) -> None:
    """Say once in a process, and not for each shard, that indices of a folder are done without."""
    if folder not in _told:
        _told.add(folder)
        _log.warning(
            "%s: indices are refused, though shards can be read: taken as if there were none. "
            "If there are some, grant the right to read them; an object store says what is absent "
            "to those who may list it. (%s)",
            folder,
            error,
        )
