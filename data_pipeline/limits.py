"""How hard one process may press one server."""

import contextlib
import threading
import time
from collections.abc import Iterator


class HostLimits:
    """Requests at a time and bytes per second, for each host by itself; for many threads."""

    def __init__(self, requests: int = 16, bytes_per_s: float | None = None) -> None:
        """`bytes_per_s` None: as fast as it goes."""
        self.requests, self.bytes_per_s = requests, bytes_per_s
        self._lock = threading.Lock()
        self._slots: dict[str, threading.Semaphore] = {}
        self._free_at: dict[str, float] = {}

    @contextlib.contextmanager
    def request(self, host: str) -> Iterator[None]:
        """Hold one of the places for requests to `host`; waits for a free one."""
        with self._lock:
            slots = self._slots.setdefault(host, threading.Semaphore(self.requests))
        with slots:
            yield

    def received(self, host: str, count: int) -> None:
        """Wait as long as `count` bytes from `host` are worth, behind those before them."""
        if self.bytes_per_s is None:
            return
        with self._lock:
            now = time.monotonic()
            # A pause is not saved up: what was not used a second ago gives no burst now.
            free_at = max(self._free_at.get(host, now), now) + count / self.bytes_per_s
            self._free_at[host] = free_at
        time.sleep(max(free_at - now, 0.0))

