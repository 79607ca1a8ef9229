"""How a rank ends that cannot go on: what it says, where it leaves it, its exit code."""

import contextlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.files import exclusive, naming
from pretrain.engine.control.control import STATUS_FILE, ControlFolder, read_status
from pretrain.engine.control.ownership import Ownership, owned_by_launch
from pretrain.engine.launch.peers import Place, ended_peers, speaks_of_a_peer

FAILED, LOST = 1, 3
"""Exit codes; 3: another job has taken the run directory."""
_TURN_S = 3.0
_OF_RANK = re.compile(r"^rank \d+: ")


def end_failed(
    run_dir: Path,
    rank: int,
    error: Exception,
    ownership: Ownership | None,
    places: Sequence[Place] = (),
) -> int:
    """Leave the reason on disk, if this job may still write there; returns the exit code.

    Whoever has lost the run directory writes one line into the log file of its rank: errors that
    follow from the loss (a checkpoint that may not be committed, a peer that has left) would read
    as those of the run that the new owner trains.

    places: where the ranks run, once they have met. An error that may be the echo of another rank's
        end is named behind that end, if it was on this node.
    """
    reason = f"rank {rank}: {reason_of(error)}"
    if places and speaks_of_a_peer(error) and (ended := ended_peers(places, rank)):
        reason = f"{', '.join(ended)}; rank {rank} then failed: {reason_of(error)}"
    ownership = ownership or owned_by_launch(run_dir, os.environ)
    first = True
    try:
        if ownership is None or not ownership.holds():
            _note_loss(run_dir, rank, ownership)
            return LOST
        first = note_failure(run_dir, rank, reason, ownership)
    except OSError as problem:
        print(f"rank {rank}: cannot note the failure: {reason_of(problem)}", file=sys.stderr)
    if first:
        print(reason, file=sys.stderr, flush=True)
    return FAILED


def reason_of(error: BaseException) -> str:
    """Kind and message; of an operating system's error also what was being done, and where."""
    reason = f"{type(error).__name__}: {error}"
    if not isinstance(error, OSError):
        return reason
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    if not own:
        return reason
    frame = own[-1]
    return f"{reason} ({Path(frame.filename).name}:{frame.lineno}, {frame.name}: {frame.line})"


def note_failure(run_dir: Path, rank: int, reason: str, ownership: Ownership) -> bool:
    """Write `control/failure_rank_N.json` with the reason and the stack, and the status.

    Returns whether the status did not give this very reason before: of what ends all ranks alike,
    one speaks.
    """
    folder = run_dir / "control"
    note = {
        "rank": rank,
        "reason": reason,
        "stack": traceback.format_exc(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    file = folder / f"failure_rank_{rank:05d}.json"
    with naming(file):
        file.write_text(json.dumps(note, indent=1), encoding="utf-8")
    with _in_turn(folder / STATUS_FILE):
        status = read_status(run_dir)
        ControlFolder(run_dir, ownership).failed(reason)
        ownership.leave()
    told = str(status.get("reason")) if status.get("state") == "failed" else ""
    return _OF_RANK.sub("", told) != _OF_RANK.sub("", reason)


@contextlib.contextmanager
def _in_turn(path: Path) -> Iterator[None]:
    """One rank after the other; but a rank that fails waits for nobody for long, since the launcher
    ends the others once it is gone."""
    until = time.monotonic() + _TURN_S
    with contextlib.ExitStack() as held:
        while time.monotonic() < until:
            with contextlib.suppress(BlockingIOError):
                held.enter_context(exclusive(path, wait=False))
                break
            time.sleep(0.02)
        yield


def _note_loss(run_dir: Path, rank: int, ownership: Ownership | None) -> None:
    why = "it belongs to another job"
    if ownership is not None:
        try:
            ownership.require()
        except Exception as error:
            why = str(error)
    line = f"rank {rank}: {run_dir} is lost: {why}"
    print(line, file=sys.stderr, flush=True)
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    with open(folder / f"rank_{rank:05d}.log", "a", encoding="utf-8") as log:
        log.write(f"{stamp} ERROR {line}\n")
