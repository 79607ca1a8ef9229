"""What a run says of itself in its directory, and the ledger of its tries.

Read without the trainer's code, and with the standard library alone.
"""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def control(run: Path, name: str) -> Path:
    """A control file: stop, stop.auto, save, heartbeat, status.json, ..."""
    return run / "control" / name


def read_json(path: Path) -> dict:
    """The object in a file; empty if it is not there or cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: dict) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)


def status(run: Path) -> dict:
    """control/status.json."""
    return read_json(control(run, "status.json"))


def stamp(path: Path) -> int | None:
    """When a file was changed, to tell changes apart without any clock; None: it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def age(path: Path, now: float | None = None) -> float | None:
    """Seconds since a file changed; None if it is not there."""
    changed = stamp(path)
    return None if changed is None else max((now or time.time()) - changed / 1e9, 0.0)


def last_checkpoint(run: Path) -> int:
    """Step of the newest checkpoint that is in place; 0 if there is none."""
    steps = [0]
    for manifest in run.glob("checkpoints/step_*/manifest.json"):
        with contextlib.suppress(ValueError):
            steps.append(int(manifest.parent.name.removeprefix("step_")))
    return max(steps)


def read_attempts(run: Path) -> list[dict]:
    """All tries so far, the oldest first; lines that a crash has cut are left out."""
    attempts = []
    with contextlib.suppress(OSError):
        for line in (run / "attempts.jsonl").read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):
                attempts.append(json.loads(line))
    return [attempt for attempt in attempts if isinstance(attempt, dict)]


class Ledger:
    """RUN/attempts.jsonl, a line for each try, as the supervisor keeps it.

    What the disk does not take, or give back, stays in memory: tries without progress count all the
    same, or a run on a full disk would be started for ever.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / "attempts.jsonl"
        self._known: list[dict] = []

    def tries(self) -> list[dict]:
        """All tries so far, the oldest first."""
        found = read_attempts(self._path.parent)
        self._known = found if len(found) >= len(self._known) else self._known
        return self._known

    def note(self, **fields) -> None:
        """Append a try: job, nodes, steps, seconds, started, state, reason, decision, ...

        Raises:
            OSError: it is in memory alone.
        """
        attempt = {"attempt": len(self.tries()) + 1, **fields}
        self._known = [*self._known, attempt]
        with open(self._path, "a+b") as file:
            torn = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(b"\n" * bool(torn) + json.dumps(attempt).encode() + b"\n")


def fruitless(attempts: Sequence[dict]) -> int:
    """Tries at the end of the list that made no new step."""
    count = 0
    for attempt in reversed(attempts):
        before, after = attempt.get("steps", (0, 0))
        if after > before:
            break
        count += 1
    return count


def suspects(attempts: Sequence[dict]) -> list[str]:
    """Nodes to keep away from: those that failed a check, or were named in two tries."""
    named = Counter(node for attempt in attempts for node in attempt.get("suspects", ()))
    unfit = {node for attempt in attempts for node in attempt.get("unfit", ())}
    return sorted(unfit | {node for node, times in named.items() if times >= 2})
