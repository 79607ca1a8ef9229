"""Copies of a run's checkpoints (`checkpoint.copy_to`), made in the background by rank 0.

A copy that fails never fails the run: it is said, tried again after a while, and can be seen in
`control/copies.json` and `python -m slurm.status`.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline.files import write_atomically
from data_pipeline.storage.locations import without_secrets
from pretrain.engine.checkpoint.copy import run_id_of
from pretrain.engine.checkpoint.files import list_checkpoints
from pretrain.engine.checkpoint.retention import step_of
from pretrain.engine.checkpoint.settings import CheckpointSettings
from pretrain.engine.control.ownership import Ownership
from pretrain.engine.launch.child_process import ChildProcess

log = logging.getLogger("omnipretrain.copies")
COPIES_FILE = "copies.json"
_LONGEST_WAIT_S = 600.0
_PAUSE_S = 2.0


class Copies:
    """What is to be copied, what is being copied, what has been. For rank 0.

    Args:
        run_dir: the run; `checkpoints/` in it is looked at.
        settings: the URL, retention, and how long a stop waits.
        ownership: who has lost the run copies no more.
        first_wait_s: behind the first failure; each further one doubles it, to ten minutes.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: CheckpointSettings,
        ownership: Ownership,
        first_wait_s: float = 5.0,
    ) -> None:
        self._root, self._settings, self._ownership = run_dir / "checkpoints", settings, ownership
        self._file = run_dir / "control" / COPIES_FILE
        self._first_wait_s = self._wait_s = first_wait_s
        self._not_before, self._error = 0.0, ""
        self._done: set[str] = set()
        self._look_at, self._pause_s = 0.0, _PAUSE_S
        self._going: Path | None = None
        self._child: ChildProcess | None = None

    def look(self) -> None:
        """Take in what has been copied, and let the next one be. Never waits, never fails; after
        each step, of which few look at the disk."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + self._pause_s
        try:
            self._go_on()
        except OSError as error:
            log.warning("copies of checkpoints: %s", error)

    def _go_on(self) -> None:
        if self._going is not None:
            if not self._child.answered():
                return
            self._take_in(self._child.answer())
        if not self._ownership.lost and time.monotonic() >= self._not_before:
            self._begin()

    def _begin(self) -> None:
        pending = self._pending()
        if not pending:
            return
        if self._child is None:
            self._child = ChildProcess("pretrain.engine.checkpoint.copy")
        self._going = pending[0]
        self._child.ask(
            {
                "url": self._settings.copy_to,
                "folder": str(self._going),
                "run": run_id_of(self._root),
                "keep_last": self._settings.keep_last,
                "keep_every_steps": self._settings.keep_every_steps,
            }
        )

    def _pending(self) -> list[Path]:
        """Checkpoints to copy, newest first."""
        return [path for path in list_checkpoints(self._root) if path.name not in self._done]

    def _take_in(self, answer: dict | None) -> None:
        folder, self._going = self._going, None
        if answer is None:
            answer = {"error": f"its process {self._child.end_in_words()}"}
            self._child = None
        where = without_secrets(self._settings.copy_to)
        if "error" not in answer:
            self._done.add(folder.name)
            self._error, self._wait_s = "", self._first_wait_s
            log.info("%s is copied to %s", folder.name, where)
        elif not folder.exists():  # retention was quicker
            log.warning("%s was removed before it was copied to %s", folder.name, where)
        else:
            self._error = answer["error"]
            self._not_before = time.monotonic() + self._wait_s
            log.warning(
                "%s could not be copied to %s: %s; again in %.0f s",
                folder.name,
                where,
                self._error,
                self._wait_s,
            )
            self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
        self._report()

    def _report(self) -> None:
        if not self._ownership.holds():
            return
        said = {
            "url": without_secrets(self._settings.copy_to),
            "step": max((step_of(Path(name)) for name in self._done), default=None),
            "pending": [step_of(path) for path in self._pending()],
            "error": self._error,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_atomically(self._file, [json.dumps(said).encode()])

    def finish(self, progress: Callable[[], None] = lambda: None) -> None:
        """Wait for what is not copied yet, at most `checkpoint.copy_wait_minutes`.

        progress: called all the while.
        """
        until = time.monotonic() + 60 * self._settings.copy_wait_minutes
        self._not_before = self._look_at = 0.0
        self._pause_s = 0.05
        self.look()
        if self._pending():
            log.info(
                "waiting for copies of checkpoints, at most %g minutes",
                self._settings.copy_wait_minutes,
            )
        while self._pending() and not self._ownership.lost and time.monotonic() < until:
            progress()
            time.sleep(self._pause_s)
            self.look()
        if left := self._pending():
            log.warning(
                "%s not copied to %s: the next start goes on with it",
                ", ".join(path.name for path in left),
                without_secrets(self._settings.copy_to),
            )
        with contextlib.suppress(OSError):
            self._report()
        if self._child is not None:
            self._child.close()
            self._child = None
