"""The data of a run in its ledger: a resume on other data is refused, not mixed into the run.

    {"kind": "data", "step": 0, "tasks": {"caption": "<TaskStream.fingerprint>"},
     "by_headers": {"caption": [[3, 5]]}}

`by_headers` is there if some remote shards had indices of their headers alone: their numbers, as
ranges, the second number behind the last. They may have better ones at the next start.

The position of a run is a step number: on other shards, or with other samples taking part, the same
number would stand for other samples, and some would be read twice and others never.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from data_pipeline.order.revisions import expand, to_ranges
from pretrain.engine.run_record import RunDirError

KIND = "data"


def data_entries(
    fingerprints: Mapping[str, str],
    by_headers: Mapping[str, Collection[int]],
    ledger: Sequence[Mapping[str, Any]],
    step: int,
    with_headers: Callable[[str, Collection[int] | None], str],
) -> list[dict[str, Any]]:
    """What to append to the ledger of a run that starts at `step`; nothing if it is there already.

    A run whose ledger knows no data (older than this record) is taken to have had the present ones.

    Args:
        fingerprints: task -> fingerprint of its training data.
        by_headers: task -> numbers of its shards whose indices were built from headers alone.
        with_headers: task, and numbers of shards that had such indices when the run began (None:
            it did not say) -> what its fingerprint was then; asked where the present one is
            another.

    Raises:
        RunDirError: the run was trained on other data.
    """
    entry: dict[str, Any] = {"kind": KIND, "step": step, "tasks": dict(fingerprints)}
    if weak := {task: to_ranges(numbers) for task, numbers in by_headers.items() if numbers}:
        entry["by_headers"] = weak
    recorded = [entry for entry in ledger if entry["kind"] == KIND]
    if not recorded:
        return [entry]
    before, weak_before = recorded[-1]["tasks"], recorded[-1].get("by_headers", {})
    other = [name for name, found in fingerprints.items() if before.get(name) != found]
    if other and all(
        before.get(name) == with_headers(name, _numbers(weak_before.get(name))) for name in other
    ):
        return [entry]
    if other:
        lost = sum(len(by_headers.get(name, ())) for name in other)
        unread = f", or the indices (.idx) of {lost} shards cannot be read any more" if lost else ""
        raise RunDirError(
            f"tasks.{', '.join(other)}: the training data are not those that this run has been "
            "trained on: other shards, another `repeats`, or other samples meet `where`"
            f"{unread}. Put them back, or start a new run from this one's weights (python -m "
            "tools.convert export-weights writes a file for initial_weights)"
        )
    return []


def _numbers(ranges: Sequence[Sequence[int]] | None) -> set[int] | None:
    return None if ranges is None else set(expand(ranges).tolist())
