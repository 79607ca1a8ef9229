"""Bad samples that were met take no part from the next epoch on, on all ranks and after any resume.

    <run_dir>/quarantine.jsonl          what is left out, for people: rewritten with checkpoints
    <run_dir>/quarantine_edits.jsonl    what people want changed; lines are only ever appended

At every checkpoint the ranks tell each other which rows were bad. At those that the recipe plans
(others come when somebody asks, which must not decide what is trained on), the rows so far become
an entry of the run's ledger for each data set concerned:

    {"kind": "quarantine", "step": 300, "task": "caption", "source": "", "from_position": 20000,
     "excluded": [[17, 18], [300, 400]], "released": []}

`from_position` counts samples of that data set (once each, also with `repeats`); it is the first
border of one of its epochs that no step has crossed. Rows are ranges, the second number behind the
last row. The loader then starts its workers anew, since they hold the order that this changes.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from data_pipeline.loader.loader import Fault, TaskStream
from data_pipeline.order.revisions import (
    Revision,
    excluded_rows,
    expand,
    next_border,
    revise,
    to_ranges,
)
from pretrain.engine.launch.distributed import Ranks
from pretrain.engine.loop import TrainerState
from pretrain.engine.quarantine_files import Edit, Listed, read_edits, read_list, write_list
from pretrain.engine.run_record import RunDirError

KIND = "quarantine"

log = logging.getLogger("omnipretrain.quarantine")


class Quarantine:
    """Gathers bad rows and revises the orders of `streams`, in place.

    Args:
        run_dir: folder of the run.
        ranks: this process.
        state: of the run; bad rows and the ledger are kept in it.
        streams: task -> training data that has rows; its order becomes that of the ledger at once.

    Raises:
        RunDirError: the ledger or a file does not fit the run.
    """

    def __init__(
        self, run_dir: Path, ranks: Ranks, state: TrainerState, streams: Mapping[str, TaskStream]
    ) -> None:
        self.run_dir, self.ranks, self.state, self.streams = run_dir, ranks, state, streams
        self._known: dict[tuple[str, int], Listed] = {}
        if ranks.leads:
            self._known = {(entry.task, entry.row): entry for entry in read_list(run_dir)}
        self._apply_ledger()

    def gather(self, faults: Sequence[Fault]) -> None:
        """Make the bad rows of all ranks known to all of them. A collective.

        Samples of tasks that are read as streams have no rows; nothing can be left out of those.
        """
        everyone: list[Any] = [None] * self.ranks.world
        mine = [
            Listed(f.task, f.shard, f.key, f.row, f.reason, None)
            for f in faults
            if f.task in self.streams
        ]
        dist.all_gather_object(everyone, mine)
        found = [entry for own in everyone for entry in own]
        for task in sorted({entry.task for entry in found}):
            rows = expand(self.state.bad_rows.get(task, [])).tolist()
            rows += [entry.row for entry in found if entry.task == task]
            self.state.bad_rows[task] = to_ranges(rows)
        if self.ranks.leads:
            self._known |= {(entry.task, entry.row): entry for entry in found}

    def revise(self, samples: Mapping[str, int]) -> bool:
        """Turn bad rows and edits into entries of the ledger. A collective.

        Args:
            samples: task -> samples of its order that steps have consumed.

        Returns:
            whether an order has changed.
        """
        edits = self._new_edits()
        entries = []
        for task in sorted(self.streams):
            bad = set(expand(self.state.bad_rows.pop(task, [])).tolist())
            # The last edit of a row is what holds.
            wanted = {edit.row: edit.exclude for edit in edits if edit.task == task}
            bad |= {row for row, exclude in wanted.items() if exclude}
            released = {row for row, exclude in wanted.items() if not exclude}
            entries += self._entries(task, bad - released, released, samples.get(task, 0))
        self.state.ledger += entries
        for entry in entries:
            log.info(
                "task %s%s: %d rows leave and %d rejoin the data from sample %d on",
                entry["task"],
                f", source {entry['source']}" if entry["source"] else "",
                len(expand(entry["excluded"])),
                len(expand(entry["released"])),
                entry["from_position"],
            )
        if entries:
            self._apply_ledger()
        return bool(entries)

    def metrics(self, task: str) -> dict[str, float]:
        """How many samples of a task the ledger leaves out."""
        if task not in self.streams:  # it is read as a stream, which has no rows
            return {}
        orders = self.streams[task].order.by_source().values()
        return {"quarantined_samples": sum(len(excluded_rows(order)) for order in orders)}

    def write_list(self) -> None:
        """Bring `quarantine.jsonl` up to date, on rank 0; the others return at once."""
        if not self.ranks.leads:
            return
        since = self._excluded_since()
        rows = {
            (task, row): None
            for task, ranges in self.state.bad_rows.items()
            for row in expand(ranges).tolist()
        } | since
        if not rows and not self._known:
            return
        unknown = Listed("", "?", "?", 0, "?", None)
        self._known = {
            (task, row): self._known.get((task, row), unknown)._replace(
                task=task, row=row, from_position=rows[task, row]
            )
            for task, row in sorted(rows)
        }
        write_list(self.run_dir, self._known.values())

    # ---- parts ---------------------------------------------------------------------------------

    def _entries(
        self, task: str, bad: set[int], released: set[int], samples: int
    ) -> Iterator[dict[str, Any]]:
        """Entries of the ledger for one task: one for each of its data sets that changes."""
        order = self.streams[task].order
        taken = order.taken(samples)
        wanted, unwanted = (
            order.split(np.array(sorted(rows), dtype=np.int64)) for rows in (bad, released)
        )
        for source, own in order.by_source().items():
            before = excluded_rows(own)
            out = np.setdiff1d(wanted[source], before)
            back = np.intersect1d(unwanted[source], before)
            if not out.size and not back.size:
                continue
            if len(before) + len(out) - len(back) >= own.n_rows:
                log.warning(
                    "task %s%s: all %d samples are bad; none of them is left out",
                    task,
                    f", source {source}" if source else "",
                    own.n_rows,
                )
                continue
            yield {
                "kind": KIND,
                "step": self.state.step,
                "task": task,
                "source": source,
                "from_position": next_border(own, taken[source]),
                "excluded": to_ranges(out),
                "released": to_ranges(back),
            }

    def _apply_ledger(self) -> None:
        revisions = revisions_of(self.state.ledger)
        if unknown := sorted(revisions.keys() - self.streams.keys()):
            raise RunDirError(f"the ledger leaves out rows of {', '.join(unknown)}: no such task")
        for task, own in revisions.items():
            try:
                self.streams[task].order = revise(self.streams[task].order, own)
            except ValueError as error:
                raise RunDirError(
                    f"task {task}: the ledger of the run does not fit its data: {error}"
                ) from None

    def _new_edits(self) -> list[Edit]:
        """Edits that the ledger does not know yet, as rank 0 reads them; marked as taken in."""
        found: list[Any] = [None]
        if self.ranks.leads:
            try:
                found = [read_edits(self.run_dir)[self.state.quarantine_edits :]]
            except RunDirError as error:
                found = [str(error)]
        dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], str):
            raise RunDirError(found[0])
        edits = [Edit(*edit) for edit in found[0]]
        self.state.quarantine_edits += len(edits)
        for edit in edits:
            order = self.streams[edit.task].order if edit.task in self.streams else None
            if order is None or not 0 <= edit.row < order.stored_rows:
                raise RunDirError(f"an edit of the quarantine names no sample of this run: {edit}")
            if edit.exclude:
                reason = "excluded by hand"
                self._known[edit.task, edit.row] = Listed(*edit[:4], reason, None)
        return edits

    def _excluded_since(self) -> dict[tuple[str, int], int]:
        """(task, row of all sources) of what is left out -> the sample from which on it is."""
        found: dict[tuple[str, int], int] = {}
        for entry in self.state.ledger:
            if entry["kind"] != KIND:
                continue
            task, source = entry["task"], entry["source"]
            first = self.streams[task].order.first_row(source)
            for row in expand(entry["excluded"]).tolist():
                found[task, first + row] = entry["from_position"]
            for row in expand(entry["released"]).tolist():
                found.pop((task, first + row), None)
        return found


def revisions_of(ledger: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[Revision]]]:
    """Task -> source -> revisions in the order in which they were made."""
    found: dict[str, dict[str, list[Revision]]] = {}
    for entry in ledger:
        if entry["kind"] == KIND:
            own = found.setdefault(entry["task"], {}).setdefault(entry["source"], [])
            own.append(Revision(entry["from_position"], entry["excluded"], entry["released"]))
    return found
