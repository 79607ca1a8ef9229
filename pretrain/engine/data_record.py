"""The data of a run in its ledger: a resume on other data is refused, not mixed into the run.

    {"kind": "data", "step": 0, "tasks": {"caption": "<TaskStream.fingerprint>"}}

The position of a run is a step number: on other shards, or with other samples taking part, the same
number would stand for other samples, and some would be read twice and others never.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pretrain.engine.run_dir import RunDirError

KIND = "data"


def data_entries(
    fingerprints: Mapping[str, str],
    ledger: Sequence[Mapping[str, Any]],
    step: int,
    by_headers: Callable[[str], str],
) -> list[dict[str, Any]]:
    """What to append to the ledger of a run that starts at `step`; nothing if it is there already.

    A run whose ledger knows no data (older than this record) is taken to have had the present ones.

    Args:
        fingerprints: task -> fingerprint of its training data.
        by_headers: task -> what it was if remote shards had indices of their headers alone, as they
            may have had when the run began; asked where the present one is another.

    Raises:
        RunDirError: the run was trained on other data.
    """
    recorded = [entry for entry in ledger if entry["kind"] == KIND]
    if not recorded:
        return [{"kind": KIND, "step": step, "tasks": dict(fingerprints)}]
    other = [
        name for name, found in fingerprints.items() if recorded[-1]["tasks"].get(name) != found
    ]
    if other and all(recorded[-1]["tasks"].get(name) == by_headers(name) for name in other):
        return [{"kind": KIND, "step": step, "tasks": dict(fingerprints)}]
    if other:
        raise RunDirError(
            f"tasks.{', '.join(other)}: the training data are not those that this run has been "
            "trained on: other shards, another `repeats`, or other samples meet `where`. Put them "
            "back, or start a new run from this one's weights (initial_weights)"
        )
    return []
