"""What a start is doing, said every few seconds until its first step.

Imports, other ranks, models, shards and a first step may take minutes, and silence looks like a
hang. No torch here: the notes begin before it is imported.
"""

import logging
import sys
import threading
import time
from typing import Self

EVERY_S = 3.0
log = logging.getLogger("omnipretrain.start")


class StartNotes:
    """Says at once that a run starts, and then now and then from a thread what it is doing.

    As a context manager; `close` before its end is the first step.

    Args:
        name: of the run.
        speaks: False on all ranks but one.
        every_s: seconds between two notes.
    """

    def __init__(self, name: str = "", speaks: bool = False, every_s: float = EVERY_S) -> None:
        self._name, self._every = name, every_s
        self._doing, self._began = "importing torch and DeepSpeed", time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._speak, name="start-notes", daemon=True)
        if speaks:
            self._say(self._doing)
            self._thread.start()

    def enter(self, doing: str) -> None:
        """The start has come to this now."""
        self._doing = doing

    def close(self) -> None:
        """No more notes; a second call does nothing."""
        self._closed.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._thread.is_alive():
            self._thread.join()

    def _speak(self) -> None:
        while not self._closed.wait(self._every):
            self._say(f"{self._doing} ({time.monotonic() - self._began:.0f} s)")

    def _say(self, doing: str) -> None:
        text = f"starting {self._name}: {doing}"
        if logging.getLogger("omnipretrain").handlers:  # the run's log is open, maybe with a bar
            log.info("%s", text)
        else:
            print(f"INFO {text}", file=sys.stderr, flush=True)
