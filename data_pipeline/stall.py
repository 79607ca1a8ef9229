"""Says what the trainer waits for, when it waits too long."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("omnipretrain.data")


class StallWatch:
    """A thread that logs `describe()` once per wait longer than `seconds`.

    with StallWatch(120, describe) as watch:
        with watch.waiting():
            batch = next(batches)
    """

    def __init__(self, seconds: float, describe: Callable[[], str]) -> None:
        self.seconds, self.describe = seconds, describe
        self._since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)

    def __enter__(self) -> "StallWatch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._thread.join()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark a wait."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _watch(self) -> None:
        reported: float | None = None
        while not self._closed.wait(min(self.seconds / 4, 5.0)):
            since = self._since
            if since is None or since == reported or time.monotonic() - since < self.seconds:
                continue
            reported = since
            logger.warning(
                "no batch for %.0f s; being processed: %s", time.monotonic() - since, self._text()
            )

    def _text(self) -> str:
        try:
            return self.describe()
        except Exception as error:  # the watch must not die of the trouble it reports
            return f"(cannot be told: {error})"
