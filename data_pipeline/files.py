"""Files that are either whole or absent, and a lock that a crash cannot leave behind."""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

logger = logging.getLogger("omnipretrain.files")

CACHE_VARIABLE = "OMNIPRETRAIN_CACHE"
TEMPORARY_SUFFIX = ".tmp"

# File systems without working flock (some NFS and Lustre mounts) answer with one of these.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def cache_folder() -> Path:
    """Return where what can be made again is kept: $OMNIPRETRAIN_CACHE, or below ~/.cache."""
    return Path(os.environ.get(CACHE_VARIABLE) or os.path.expanduser("~/.cache/omnipretrain"))


@contextlib.contextmanager
def using_cache() -> Iterator[None]:
    """Within, an OSError also says how to choose another cache folder."""
    try:
        yield
    except OSError as error:
        advice = f"{error.strerror}; set {CACHE_VARIABLE} to a folder that can be written"
        raise OSError(error.errno, advice, error.filename) from None


def temporary_name(path: Path) -> Path:
    """Return a hidden, unused name in the folder of `path`: a rename to `path` is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def leftovers(path: Path) -> list[Path]:
    """List temporary files that killed writers of `path` left in its folder."""
    start = f".{path.name}."
    with os.scandir(path.parent) as entries:
        names = [entry.name for entry in entries]
    return [
        path.with_name(name)
        for name in names
        if name.startswith(start) and name.endswith(TEMPORARY_SUFFIX)
    ]


def sync_file(path: Path) -> None:
    """Force a written file's bytes to the disk. OSErrors name the file."""
    with naming(path), open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make creations and renames inside `folder` survive a power cut, where its file system can.

    Some (CIFS before Linux 4.17, some FUSE) refuse; then it is said once, and work goes on.
    Errors: OSError that names the folder.
    """
    with naming(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise
            _warn_of_folder_sync(str(folder), error.strerror)
        finally:
            os.close(descriptor)


_folder_sync_refused = False


def _warn_of_folder_sync(folder: str, why: str) -> None:
    global _folder_sync_refused
    if not _folder_sync_refused:
        _folder_sync_refused = True
        logger.warning(
            "the file system of %s cannot sync folders (%s): files are whole or absent all the "
            "same, but a power cut may take the newest of them",
            folder,
            why,
        )


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, OSErrors that do not say which file they are about (a full disk at a write, a failed
    sync) name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)).with_traceback(
                error.__traceback__
            ) from None
        raise


def give_usual_access(path: Path) -> None:
    """Give a file the access that `open` gives to new ones beside it: safetensors writes for the
    owner alone, whatever the umask is.

    Errors: OSError if the folder cannot be written.
    """
    # A file tells the umask; asking for it means setting it, for all threads.
    example = temporary_name(path)
    descriptor = os.open(example, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        usual = os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        example.unlink()
    if path.stat().st_mode & 0o777 != usual:  # not every file system has modes that can be set
        path.chmod(usual)


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write `chunks` to `path`, one after the other; readers see the old file or all of the new.

    Errors: OSError if the folder cannot be written; no temporary file is left behind.
    """
    temporary = temporary_name(path)
    try:
        # Around the close too, which tries once more to write what the disk has refused.
        with naming(path), open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `<path>.lock` for the duration of the block.

    The kernel releases the lock when its owner dies, so a crash never blocks the next one; a lock
    file that a killed owner left behind is taken over and removed.

    Yields True, or False on a file system without locks: work done under this lock must be correct
    (only wasteful) when two processes do it at the same time.
    Errors: OSError if the folder cannot be written; BlockingIOError if `wait` is False and the lock
    is taken.
    """
    lock_path = path.with_name(path.name + ".lock")
    descriptor, locked = _acquire(lock_path, wait)
    try:
        yield locked
    finally:
        # Removed while still held: whoever waits on the removed file notices and starts again.
        lock_path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(lock_path: Path, wait: bool) -> tuple[int, bool]:
    while True:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as error:
            if error.errno in _NO_LOCKS_HERE:
                return descriptor, False
            os.close(descriptor)
            raise
        try:
            if os.fstat(descriptor).st_ino == os.stat(lock_path).st_ino:
                return descriptor, True
        except FileNotFoundError:
            pass
        os.close(descriptor)
