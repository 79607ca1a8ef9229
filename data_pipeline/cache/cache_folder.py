"""Blocks of bytes on a node's disk, under a byte cap that all processes of the node share.

    FOLDER/usage              bytes of all blocks, whole or being written
    FOLDER/ab/abcdef...       a block
    FOLDER/ab/.abcdef...tmp   one that is being written; its writer holds a lock on it
    FOLDER/*.reader           a read-ahead that is at work; the same

Nothing here outlives a crash for long: locks are the kernel's, and what a killed writer left behind
is removed by the next `scan`. A folder that holds anything else is refused: what lies in a cache is
let go some day.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.files import TEMPORARY_SUFFIX, exclusive, temporary_name

READER_SUFFIX = ".reader"
_USAGE_DIGITS = 20
_OURS = re.compile(rf"usage(\.lock)?|[0-9a-f]{{2}}|.*{re.escape(READER_SUFFIX)}")


class CacheError(Exception):
    """The cache folder cannot be used (read-only, full, gone); reading goes on without it."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Space in a cache folder that a block will fill."""

    name: str
    size: int
    temporary: Path
    descriptor: int


class CacheFolder:
    """A folder of named blocks; for any number of processes and threads."""

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        """Nothing is created before it is needed; all blocks together have at most `max_bytes`."""
        self.folder, self.max_bytes = Path(os.path.abspath(os.path.expanduser(folder))), max_bytes
        self._unfinished: dict[Path, Reservation] = {}  # of this process

    def path(self, name: str) -> Path:
        """Where a block lies; 256 folders keep listings short."""
        return self.folder / name[:2] / name

    def has(self, name: str) -> bool:
        """Whether a block is there."""
        return os.path.exists(self.path(name))

    def read(self, name: str, size: int, begin: int, end: int) -> bytes | None:
        """The bytes [begin, end) of a block of `size` bytes; None if it is not there, or cut.

        The file is closed at once: a block that is evicted while it is open still takes space.
        """
        try:
            descriptor = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(self.folder, error) from error
        try:
            if os.fstat(descriptor).st_size == size:
                data = os.pread(descriptor, end - begin, begin)
                if len(data) == end - begin:
                    return data
        except OSError as error:
            raise _unusable(self.folder, error) from error
        finally:
            os.close(descriptor)
        self.remove(name)
        return None

    @contextlib.contextmanager
    def fetching(self, name: str) -> Iterator[None]:
        """Hold the right to download a block; waits for whoever downloads it now."""
        path = self.path(name)
        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(path))
            except OSError as error:
                raise _unusable(self.folder, error) from error
            yield

    def reserve(self, name: str, size: int) -> "Reservation | None":
        """Take the space of a block of `size` bytes; None if the cap leaves no room for it.

        `fill` or `release` it, in any thread.
        """
        temporary = temporary_name(self.path(name))
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as used:
                if used + size > self.max_bytes:
                    return None
                descriptor = _create(temporary, size)
                self._note(used + size)
        except OSError as error:
            raise _unusable(self.folder, error) from error
        reservation = Reservation(name, size, temporary, descriptor)
        self._unfinished[temporary] = reservation
        return reservation

    def fill(self, reservation: "Reservation", chunks: Iterable[bytes]) -> None:
        """Write a block; it is there as a whole or, if this raises, not at all.

        Raises:
            CacheError: the folder failed. What `chunks` raises passes through.
        """
        try:
            written = 0
            for chunk in chunks:
                written += self._write(reservation.descriptor, chunk)
            if written != reservation.size:
                raise CacheError(
                    f"cache {self.folder}: {written} bytes came for a block of {reservation.size}"
                )
            self._commit(reservation)
        except BaseException:
            self.release(reservation)
            raise

    def release(self, reservation: "Reservation") -> None:
        """Give the space back; nothing if that has been done."""
        if self._unfinished.pop(reservation.temporary, None) is None:
            return
        os.close(reservation.descriptor)
        with contextlib.suppress(OSError):  # a folder that is gone needs no account
            reservation.temporary.unlink(missing_ok=True)
            with self._locked() as used:
                self._note(used - reservation.size)

    def discard_unfinished(self) -> None:
        """Before the process ends: release what its threads are still writing, and their locks."""
        for reservation in list(self._unfinished.values()):
            self.release(reservation)
            with contextlib.suppress(OSError):
                path = self.path(reservation.name)
                path.with_name(f"{path.name}.lock").unlink(missing_ok=True)

    def remove(self, name: str) -> bool:
        """Remove a block; False if it was not there."""
        path = self.path(name)
        try:
            with self._locked() as used:
                size = path.stat().st_size
                path.unlink()
                self._note(used - size)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _unusable(self.folder, error) from error
        return True

    def used(self) -> int:
        """Bytes of all blocks, whole or being written; without a lock, so perhaps a moment old."""
        try:
            used = self._noted()
            if used is None:
                with self._locked() as used:
                    pass
        except OSError as error:
            raise _unusable(self.folder, error) from error
        return used

    def scan(self) -> dict[str, tuple[int, float]]:
        """Go through the folder: count anew, and remove what killed processes left behind.

        Returns:
            name -> (bytes, time of writing) of every block.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with exclusive(self.folder / "usage"):
                return self._count()
        except OSError as error:
            raise _unusable(self.folder, error) from error

    @contextlib.contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Be known as a read-ahead at work for the duration of the block."""
        path = self.folder / f"{os.getpid()}-{secrets.token_hex(4)}{READER_SUFFIX}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._refuse_other_files()
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _unusable(self.folder, error) from error
        try:
            _lock(descriptor)
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def readers(self) -> int:
        """How many read-aheads of this folder are at work, in all runs."""
        return sum(not _is_abandoned(path) for path in self.folder.glob(f"*{READER_SUFFIX}"))

    def _write(self, descriptor: int, chunk: bytes) -> int:
        view = memoryview(chunk)
        try:
            while view:
                view = view[os.write(descriptor, view) :]
        except OSError as error:
            raise _unusable(self.folder, error) from error
        return len(chunk)

    def _commit(self, reservation: "Reservation") -> None:
        try:
            # Not forced to disk: a power cut may leave a block of zeros, which checksums find.
            os.rename(reservation.temporary, self.path(reservation.name))
        except OSError as error:
            raise _unusable(self.folder, error) from error
        if self._unfinished.pop(reservation.temporary, None) is not None:
            os.close(reservation.descriptor)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the account; gives the bytes that are in use."""
        with exclusive(self.folder / "usage"):
            used = self._noted()
            if used is None:
                self._count()
                used = self._noted()
            yield used

    def _noted(self) -> int | None:
        try:
            text = (self.folder / "usage").read_bytes()
        except FileNotFoundError:
            return None
        return int(text) if len(text) == _USAGE_DIGITS and text.isdigit() else None

    def _note(self, used: int) -> None:
        descriptor = os.open(self.folder / "usage", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.pwrite(descriptor, b"%0*d" % (_USAGE_DIGITS, max(used, 0)), 0)
        finally:
            os.close(descriptor)

    def _refuse_other_files(self) -> None:
        """Raise CacheError for a folder that somebody uses for something else."""
        if os.path.exists(self.folder / "usage"):
            return  # accepted before
        for name in os.listdir(self.folder):
            if not _OURS.fullmatch(name):
                raise CacheError(
                    f"cache {self.folder}: holds {name!r}, which is not of a cache; name an empty "
                    "folder, since what lies in it may be removed"
                )

    def _count(self) -> dict[str, tuple[int, float]]:
        """Under the account's lock, so that no file is created meanwhile: `scan`."""
        self._refuse_other_files()
        blocks: dict[str, tuple[int, float]] = {}
        unfinished = 0
        for entry in _files(self.folder):
            if entry.name.endswith(TEMPORARY_SUFFIX):
                if _is_abandoned(Path(entry.path)):
                    continue
                size, _ = _size_and_time(entry)
                unfinished += size
            elif entry.name.endswith(".lock"):
                _remove_lock(Path(entry.path))
            else:
                blocks[entry.name] = _size_and_time(entry)
        self._note(unfinished + sum(size for size, _ in blocks.values()))
        return blocks


def _files(folder: Path) -> Iterator[os.DirEntry]:
    """Files in the folders of blocks, by their names."""
    with os.scandir(folder) as folders:
        names = [entry.name for entry in folders if len(entry.name) == 2 and entry.is_dir()]
    for name in names:
        with os.scandir(folder / name) as entries:
            yield from (entry for entry in entries if entry.name.lstrip(".").startswith(name))


def _size_and_time(entry: os.DirEntry) -> tuple[int, float]:
    try:
        state = entry.stat()
    except FileNotFoundError:
        return 0, 0.0
    return state.st_size, state.st_mtime


def _create(path: Path, size: int) -> int:
    """A new file of `size` bytes, locked; raises OSError if the disk has no room for it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _lock(descriptor)
        if size:
            os.posix_fallocate(descriptor, 0, size)
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int) -> None:
    """Lock a file for as long as this process keeps it open; not everywhere possible."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_abandoned(path: Path) -> bool:
    """Whether nobody holds the lock on a file any more; it is removed then."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except OSError:  # held, or there are no locks here, so that nobody can tell
        return False
    finally:
        os.close(descriptor)


def _remove_lock(path: Path) -> None:
    """Remove the lock file of a block that nobody is downloading."""
    with contextlib.suppress(OSError), exclusive(path.with_suffix(""), wait=False):
        pass


def _unusable(folder: Path, error: OSError) -> CacheError:
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        reason = "the disk is full; lower loader.cache.max_gib"
    if error.errno in (errno.EACCES, errno.EPERM):  # most likely it is that of another user
        place = f" for {error.filename}" if error.filename else ""
        reason = (
            f"{reason}{place}. Users share a cache by a group that may write to it: "
            "chgrp -R GROUP, chmod -R g+rwX, chmod g+s of its folders, and umask 002 in all of "
            "their runs; or name another loader.cache.folder, of your own"
        )
    return CacheError(f"cache {folder}: {reason}")
