"""Storage of any URL, by its scheme, and the settings of all of them."""

import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from data_pipeline.settings import Settings
from data_pipeline.storage.http_storage import HttpStorage
from data_pipeline.storage.limits import HostLimits, node_folder
from data_pipeline.storage.locations import scheme
from data_pipeline.storage.retry import RetryPolicy
from data_pipeline.storage.storage import FileState

if TYPE_CHECKING:
    from data_pipeline.storage.fsspec_storage import FsspecStorage


class RemoteSettings(Settings):
    """Reading shards by URL: patience, limits, read-ahead."""

    retry_deadline_s: float = Field(default=300.0, gt=0.0)
    """Seconds without a new byte after which a server counts as gone and the run ends."""
    retry_first_wait_s: float = Field(default=0.5, gt=0.0)
    """Seconds before the second attempt; doubled each time, with jitter."""
    retry_longest_wait_s: float = Field(default=30.0, gt=0.0)
    """Seconds between two attempts at most, unless the server asks for more (Retry-After)."""
    timeout_s: float = Field(default=30.0, gt=0.0)
    """Seconds of silence after which an attempt counts as failed."""
    requests_per_host: int = Field(default=16, ge=1)
    """Requests at a time to one host, from all processes of a user on a node."""
    mib_per_s_per_host: float | None = Field(default=None, gt=0.0)
    """Limit of what all processes of a user on a node load from one host; null: none."""
    read_ahead_mib: int = Field(default=256, ge=1)
    """Memory for read-ahead in each process that reads without a cache."""
    block_kib: int = Field(default=1024, ge=16)
    """Largest request of the read-ahead of one lane."""
    foreign_index: Literal["headers", "full"] = "headers"
    """How a remote tar without index is indexed: by its headers alone, which loads little but
    leaves damage inside of a payload unseen, or by one pass over all bytes."""

    def retry_policy(self) -> RetryPolicy:
        """How long storage may be away."""
        return RetryPolicy(
            deadline_s=self.retry_deadline_s,
            timeout_s=self.timeout_s,
            first_wait_s=self.retry_first_wait_s,
            longest_wait_s=self.retry_longest_wait_s,
        )


class UrlStorage:
    """A Storage for URLs of every scheme.

    For any number of threads; survives fork and pickle (each process has its own connections, and
    counts its own retries).
    """

    def __init__(self, settings: RemoteSettings | None = None) -> None:
        """Nothing is opened before it is used."""
        self.settings = settings or RemoteSettings()
        self.refusing: set[str] = set()
        """Folders (without secrets) that refused a file that may not be there, however often it was
        asked for: the next refusal of such a file can be believed at once."""
        self._start()

    @property
    def retries(self) -> int:
        """Failed attempts of this process that were followed by another one."""
        self._leave_parent()
        return sum(storage.retries for storage in list(self._by_scheme.values()))

    def state(self, url: str, patient: bool = True) -> FileState:
        """As Storage.state."""
        return self._storage(url).state(url, patient)

    def read(self, url: str, begin: int, end: int, expected: FileState | None = None) -> bytes:
        """As Storage.read."""
        return self._storage(url).read(url, begin, end, expected)

    def chunks(
        self, url: str, begin: int, end: int, expected: FileState | None = None
    ) -> Iterator[bytes]:
        """As Storage.chunks."""
        return self._storage(url).chunks(url, begin, end, expected)

    def glob(self, pattern: str) -> list[str]:
        """URLs that match a pattern, sorted; not for http(s), which cannot be listed."""
        return self._storage(pattern).glob(pattern)

    def _storage(self, url: str) -> "HttpStorage | FsspecStorage":
        self._leave_parent()
        kind = scheme(url)
        with self._lock:
            if self._limits is None:
                self._limits = host_limits(self.settings)
            if kind not in self._by_scheme:
                self._by_scheme[kind] = open_storage(kind, self.settings, self._limits)
            return self._by_scheme[kind]

    def _leave_parent(self) -> None:
        """In a forked process: connections and locks of the parent are not ours to use."""
        if self._process != os.getpid():
            self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._by_scheme: dict[str, HttpStorage | FsspecStorage] = {}
        self._limits: HostLimits | None = None

    def __getstate__(self) -> dict:
        return {"settings": self.settings}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["settings"])


def host_limits(settings: RemoteSettings) -> HostLimits:
    """Limits that all processes of this node hold together."""
    rate = settings.mib_per_s_per_host
    return HostLimits(
        settings.requests_per_host, None if rate is None else rate * 2**20, node_folder()
    )


def open_storage(
    kind: str, settings: RemoteSettings, limits: HostLimits
) -> "HttpStorage | FsspecStorage":
    """The storage of URLs with one scheme.

    Raises:
        ShardError: fsspec has no driver for it, or the driver is not installed.
    """
    retry = settings.retry_policy()
    if kind in ("http", "https"):
        return HttpStorage(retry, limits)
    from data_pipeline.storage.fsspec_storage import (
        FsspecStorage,  # fsspec takes a while, most need none
    )

    return FsspecStorage(kind, retry, limits)
