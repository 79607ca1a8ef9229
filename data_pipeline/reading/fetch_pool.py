"""Threads that fetch, and never keep a process from ending."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future


class FetchPool:
    """Runs calls in threads that are started as they are needed.

    The threads are daemons: unlike those of the standard library's executors, one that waits for a
    dead server does not delay the end of the process. Belongs to one process; see `close`.
    """

    def __init__(self, threads: int) -> None:
        """At most so many `threads`."""
        self._most = threads
        self._threads: list[threading.Thread] = []
        self._calls: queue.SimpleQueue[tuple[Future, Callable[[], bytes]] | None] = (
            queue.SimpleQueue()
        )

    def submit(self, call: Callable[[], bytes]) -> "Future[bytes]":
        """Run `call` in a thread; the future has its result or its error."""
        future: Future[bytes] = Future()
        self._calls.put((future, call))
        if len(self._threads) < self._most and self._calls.qsize():
            thread = threading.Thread(target=self._work, name="fetch", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def close(self) -> None:
        """Let the threads end after what they are at; what is waiting is cancelled."""
        while True:
            try:
                waiting = self._calls.get_nowait()
            except queue.Empty:
                break
            if waiting is not None:
                waiting[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
        self._threads = []

    def _work(self) -> None:
        while (work := self._calls.get()) is not None:
            future, call = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
