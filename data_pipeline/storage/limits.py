"""Limits on what one node asks of one host: requests at a time, and bytes per second.

All processes of a user on a node hold the limits together: trainers, workers and read-aheads, of
any run. They meet in a file for each host, in a folder of the node (`node_folder`). The file's name
depends on the boot of the machine, so that nodes which share that folder do not meet there:

    bytes 0 .. 15             an account: which boot its clock belongs to, and the time up to which
                              the bytes received so far use the rate up
    locks from _PLACES on     one byte per request at a time; who has locked byte i makes request i
    locks from _TURNS on      the byte that the first in the queue for a place has locked

Locks are those of open files: the kernel frees them when their owner dies, however it dies. No
server is needed, nothing has to be cleaned up, and the files hold nothing but the 16 bytes.
"""

import contextlib
import fcntl
import functools
import logging
import math
import os
import re
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Protocol

_log = logging.getLogger("omnipretrain.data")

_ACCOUNT = struct.Struct("<8sd")
_PLACES, _TURNS = 1 << 20, 1 << 40
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.0005, 0.005
_SAY_S = 60.0
_BOOT = "/proc/sys/kernel/random/boot_id"


class _Host(Protocol):
    """The limits of one host."""

    def place(self, requests: int) -> contextlib.AbstractContextManager[None]:
        """Hold one of `requests` places while the context lasts; waits for a free one."""

    def owe(self, seconds: float) -> float:
        """Add a transfer that takes `seconds` at the allowed rate to the queue of all transfers;
        return the seconds until the queue is through with it."""


class HostLimits:
    """Requests at a time and bytes per second, counted for each host alone. Thread-safe."""

    def __init__(
        self, requests: int = 16, bytes_per_s: float | None = None, folder: Path | None = None
    ) -> None:
        """Limits of this process, or of a node.

        Args:
            requests: at a time.
            bytes_per_s: None: as fast as it goes.
            folder: what the processes that share the limits have in common (`node_folder`); None:
                they hold for this object alone.
        """
        self.requests, self.bytes_per_s, self._folder = requests, bytes_per_s, folder
        self._lock = threading.Lock()
        self._hosts: dict[str, _Host] = {}

    @contextlib.contextmanager
    def request(self, host: str) -> Iterator[None]:
        """Hold one of the places for requests to `host`; waits for a free one."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self._host(host).place(self.requests))
            except OSError as error:
                held.enter_context(self._here(host, error).place(self.requests))
            yield

    def received(self, host: str, count: int) -> None:
        """Wait until `count` bytes from `host`, and all received before, fit the allowed rate."""
        if self.bytes_per_s is None:
            return
        try:
            wait_s = self._host(host).owe(count / self.bytes_per_s)
        except OSError as error:
            wait_s = self._here(host, error).owe(count / self.bytes_per_s)
        time.sleep(wait_s)

    def _host(self, name: str) -> _Host:
        with self._lock:
            if name not in self._hosts:
                here = self._folder is None
                self._hosts[name] = (
                    _HostHere(self.requests) if here else _HostOnNode(self._folder, name)
                )
            return self._hosts[name]

    def _here(self, name: str, error: OSError) -> _Host:
        """Limits of this process alone, from now on: the shared file cannot be used. That is a
        fault of this node's disk, and must not look like one of the host."""
        with self._lock:
            if not isinstance(self._hosts.get(name), _HostHere):
                self._hosts[name] = _HostHere(self.requests)
                _log.warning(
                    "%s: %s; limits of requests hold for each process by itself",
                    self._folder,
                    error,
                )
            return self._hosts[name]


class _HostHere:
    """Limits that this process keeps alone, where the node has no folder to share them."""

    def __init__(self, requests: int) -> None:
        self._places = threading.Semaphore(requests)
        self._lock = threading.Lock()
        self._paid_until = 0.0

    @contextlib.contextmanager
    def place(self, requests: int) -> Iterator[None]:
        with self._places:
            yield

    def owe(self, seconds: float) -> float:
        with self._lock:
            now = time.monotonic()
            self._paid_until = _behind(self._paid_until, now) + seconds
            return self._paid_until - now


class _HostOnNode:
    """Limits that all processes of a node keep together, in one file."""

    def __init__(self, folder: Path, host: str) -> None:
        """Raises OSError if the file cannot be used, or locks do not work there."""
        name = re.sub(r"[^a-zA-Z0-9.-]", "_", host)[:80]
        self._host = host
        digest = sha256(_boot() + host.encode()).hexdigest()[:12]
        self._path = folder / f"{name}-{digest}"
        with self._open() as file:
            _try_lock(file, 0)
            if not os.fstat(file).st_size:  # write it now: later the disk may be full
                os.pwrite(file, _ACCOUNT.pack(_boot(), 0.0), 0)

    @contextlib.contextmanager
    def place(self, requests: int) -> Iterator[None]:
        with self._open() as file:
            place = _any_place(file, requests)
            if place is None:
                place = self._wait(file, requests)
            try:
                yield
            finally:
                # Closing the file would not unlock it if a process forked meanwhile has it open.
                _unlock(file, place)

    def owe(self, seconds: float) -> float:
        with self._open() as file:
            _lock(file, 0)
            try:
                # All processes of a node share this clock, which counts from the boot on.
                now = time.monotonic()
                content = os.pread(file, _ACCOUNT.size, 0)
                boot, until = _ACCOUNT.unpack(content.ljust(_ACCOUNT.size, b"\0"))
                known = boot == _boot() and math.isfinite(until)
                until = _behind(until if known else 0.0, now) + seconds
                os.pwrite(file, _ACCOUNT.pack(_boot(), until), 0)
                return until - now
            finally:
                _unlock(file, 0)

    def _wait(self, file: int, requests: int) -> int:
        """Take the next place that becomes free. Only the first in the queue looks for it: a
        thousand waiting threads cost as much as one."""
        started, said, look_s = time.monotonic(), False, _FIRST_LOOK_S
        _lock(file, _TURNS + requests)
        try:
            while (place := _any_place(file, requests)) is None:
                time.sleep(look_s)
                look_s = min(2 * look_s, _LONGEST_LOOK_S)
                if not said and time.monotonic() - started > _SAY_S:
                    said = True
                    _log.warning(
                        "%s: processes of this node have used all %d requests at a time "
                        "(loader.remote.requests_per_host) for %.0f s; `fuser %s` names them",
                        self._host,
                        requests,
                        _SAY_S,
                        self._path,
                    )
            return place
        finally:
            _unlock(file, _TURNS + requests)

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            file = os.open(self._path, flags, 0o600)
        except FileNotFoundError:  # somebody tidied up temporary files
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            file = os.open(self._path, flags, 0o600)
        try:
            yield file
        finally:
            os.close(file)


def node_folder() -> Path | None:
    """Where processes of this user meet on this node: in the folder of temporary files ($TMPDIR).

    Returns None, and says so, where there is none that belongs to this user alone.
    """
    if not hasattr(fcntl, "F_OFD_SETLK"):
        return None  # not Linux
    try:
        folder = Path(tempfile.gettempdir()) / f"omnipretrain-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        state = folder.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
            raise OSError(f"{folder} is not a folder of this user")
        return folder
    except OSError as error:
        _log.warning("limits of requests hold for each process by itself: %s", error)
        return None


def _behind(paid_until: float, now: float) -> float:
    """Where the next transfer begins: now, or behind those in the queue. Time in which nothing was
    received is not saved up for a burst later."""
    return max(paid_until, now)


def _any_place(file: int, requests: int) -> int | None:
    """Lock a free place; return it, or None if all are taken."""
    return next((p for p in range(_PLACES, _PLACES + requests) if _try_lock(file, p)), None)


def _try_lock(file: int, at: int) -> bool:
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
    except BlockingIOError:
        return False
    return True


def _lock(file: int, at: int) -> None:
    fcntl.fcntl(file, fcntl.F_OFD_SETLKW, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))


def _unlock(file: int, at: int) -> None:
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, at, 1, 0))


@functools.cache
def _boot() -> bytes:
    """What tells this boot of the machine from others."""
    try:
        return Path(_BOOT).read_bytes()[:8]
    except OSError:
        return bytes(8)
