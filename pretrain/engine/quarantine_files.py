"""The two files of the quarantine that people see; see `pretrain.engine.quarantine`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from data_pipeline.files import write_atomically
from pretrain.engine.run_record import RunDirError

LIST_FILE = "quarantine.jsonl"
EDITS_FILE = "quarantine_edits.jsonl"


class Listed(NamedTuple):
    """A line of `quarantine.jsonl`: a sample that takes no part, or will not."""

    task: str
    shard: str
    key: str
    row: int
    """Of the task's data, all sources one behind the other."""
    reason: str
    from_position: int | None
    """Place in the order of its data set from which on it is left out; None: not decided yet."""


class Edit(NamedTuple):
    """A line of `quarantine_edits.jsonl`: what somebody wants changed."""

    task: str
    shard: str
    key: str
    row: int
    exclude: bool
    """False: the sample shall take part again."""


def read_list(run_dir: Path) -> list[Listed]:
    """What the run listed with its last checkpoint. Raises RunDirError for a damaged file."""
    return [Listed(**entry) for entry in _read(run_dir / LIST_FILE, Listed)]


def write_list(run_dir: Path, listed: Iterable[Listed]) -> None:
    """Replace the list."""
    lines = (json.dumps(entry._asdict()) + "\n" for entry in listed)
    write_atomically(run_dir / LIST_FILE, (line.encode() for line in lines))


def read_edits(run_dir: Path) -> list[Edit]:
    """All edits since the run began. Raises RunDirError for a damaged file."""
    return [Edit(**entry) for entry in _read(run_dir / EDITS_FILE, Edit)]


def append_edits(run_dir: Path, edits: Iterable[Edit]) -> None:
    """Add edits; the run takes them in at its next planned checkpoint."""
    text = "".join(json.dumps(edit._asdict()) + "\n" for edit in edits)
    with open(run_dir / EDITS_FILE, "a", encoding="utf-8") as file:
        file.write(text)


def _read(path: Path, kind: type[Listed] | type[Edit]) -> list[dict]:
    if not path.exists():
        return []
    entries = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if entry.keys() != set(kind._fields) or type(entry["row"]) is not int:
                raise ValueError(f"it needs {', '.join(kind._fields)}")
        except (ValueError, AttributeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break  # somebody is writing it: it will be there the next time
            raise RunDirError(f"{path}:{number}: not an entry of this file: {error}") from None
        entries.append(entry)
    return entries
