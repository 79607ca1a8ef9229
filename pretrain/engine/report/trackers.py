"""The numbers of a run in wandb, mlflow and others, through the trackers of accelerate.

A tracker never holds a run up and never ends it: each has a thread of its own on rank 0, and what
goes wrong there is a warning, after which it gets nothing more. Their files are in
`RUN/trackers/NAME`.

accelerate's trackers would ask its `PartialState` who the main process is, which starts process
groups and sets threads and devices. They are told that they need not ask.
"""

import contextlib
import importlib.util
import logging
import netrc
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

log = logging.getLogger("omnipretrain.trackers")

TrackerName = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]

FOLDER = "trackers"
START_S, FINISH_S, FINISH_FAILED_S = 30.0, 30.0, 3.0
"""So long a run waits at most for a tracker to start, and to send the rest at the end: of a run
that has ended, and of one that has failed."""
_WAITING = 1000  # lines that a slow tracker may be behind


def missing_packages(names: Sequence[str]) -> list[str]:
    """A line for each tracker whose package is not installed."""
    return [
        f"logging.trackers: {name} is not installed, so nothing will be sent to it: "
        f"pip install {name.replace('_', '-')}"
        for name in names
        if importlib.util.find_spec(name) is None
    ]


class Trackers:
    """All trackers of a run, on rank 0.

    Args:
        names: of accelerate's trackers; those whose package is missing are left out.
        run_dir: of the run.
        recipe: of the run, as plain values; goes to the trackers as its settings.
    """

    def __init__(self, names: Sequence[str], run_dir: Path, recipe: Mapping[str, Any]) -> None:
        installed = [n for n in dict.fromkeys(names) if importlib.util.find_spec(n) is not None]
        self._threads = [TrackerThread(name, run_dir, recipe) for name in installed]
        for thread in self._threads:
            thread.wait_for_start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand numbers on; returns at once."""
        for thread in self._threads:
            thread.log(dict(values), step)

    def close(self, wait_s: float) -> None:
        """Wait until everything is sent, for so many seconds at most."""
        until = time.monotonic() + wait_s
        for thread in self._threads:
            thread.finish(max(until - time.monotonic(), 0.1))
        self._threads = []


class TrackerThread:
    """One tracker, which starts, logs and finishes in a thread of its own."""

    def __init__(self, name: str, run_dir: Path, recipe: Mapping[str, Any]) -> None:
        self.name = name
        self._lines: queue.Queue[tuple[dict, int] | None] = queue.Queue(_WAITING)
        self._started, self._over = threading.Event(), threading.Event()
        self._work = threading.Thread(
            target=self._run, args=(run_dir, recipe), name=f"tracker-{name}", daemon=True
        )
        self._work.start()

    def wait_for_start(self) -> None:
        """Until it has started or failed: loader workers had better not fork in the middle."""
        if not self._started.wait(START_S):
            log.warning(
                "%s has not started within %.0f s; the run does not wait", self.name, START_S
            )

    def log(self, values: dict, step: int) -> None:
        """Put a line in its queue; a tracker that takes none any more is given up."""
        if self._over.is_set():
            return
        try:
            self._lines.put_nowait((values, step))
        except queue.Full:
            self._give_up(f"it is {_WAITING} lines behind")

    def finish(self, wait_s: float) -> None:
        """Send what is there, and end."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._work.join(wait_s)
        if self._work.is_alive() and not self._over.is_set():
            self._give_up(f"it did not finish within {wait_s:.0f} s")

    def _give_up(self, why: str) -> None:
        if not self._over.is_set():
            self._over.set()
            log.warning("%s gets nothing more of this run: %s", self.name, why)

    def _run(self, run_dir: Path, recipe: Mapping[str, Any]) -> None:
        try:
            tracker = make_tracker(self.name, run_dir, str(recipe.get("name", "run")))
            tracker.start()
            tracker.store_init_configuration(flat(recipe))
            self._started.set()
            while (line := self._lines.get()) is not None and not self._over.is_set():
                values, step = line
                tracker.log(values, step=step)
            tracker.finish()
        except (Exception, SystemExit) as error:
            self._give_up(f"{type(error).__name__}: {error}")
        finally:
            self._started.set()


def make_tracker(name: str, run_dir: Path, project: str):
    """One of accelerate's trackers, not started.

    project: what the tracker calls a project or an experiment.
    """
    from accelerate import tracking

    # accelerate's own logger raises an error unless its PartialState has been made.
    tracking.logger = logging.getLogger("accelerate.tracking")
    kind, folder = tracking.LOGGER_TYPE_TO_CLASS[name], run_dir / FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    if name == "wandb":
        tracker = kind(
            project,
            name=run_dir.name,
            dir=str(folder),
            mode=_wandb_mode(folder),
            id=_identity(folder),
            resume="allow",
        )
    elif name == "mlflow":
        _keep_mlflow_in(folder)
        tracker = kind(experiment_name=project, run_name=run_dir.name)
    elif kind.requires_logging_directory:
        tracker = kind(project, str(folder))
    else:
        tracker = kind(project)
    tracker.main_process_only = False  # this is rank 0; see above
    return tracker


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as key path -> plain value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            found |= flat(value, name)
        else:
            found[name] = value if isinstance(value, str | int | float) else str(value)
    return found


def _wandb_mode(folder: Path) -> str:
    """What WANDB_MODE says; else offline where wandb does not answer, or nobody is logged in."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    url = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), timeout=5).close()
        known = os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(url.hostname)
        reason = "" if known else "nobody is logged in (WANDB_API_KEY, wandb login)"
    except (OSError, netrc.NetrcParseError) as error:
        reason = f"no way to {url.hostname}: {error}"
    if not reason:
        return "online"
    log.info(
        "wandb is offline (%s): send it later with wandb sync %s/wandb/offline-run-*",
        reason,
        folder,
    )
    return "offline"


def _identity(folder: Path) -> str:
    """One for all starts of a run."""
    path = folder / "id"
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _keep_mlflow_in(folder: Path) -> None:
    """Without a server, mlflow would write into the current folder."""
    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{folder.resolve()}/mlflow.db")
