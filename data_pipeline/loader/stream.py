"""One task's data: positions in, batch out, damaged samples replaced on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_pipeline import activity
from data_pipeline.filters.selection import Selection
from data_pipeline.order.order import RowOrder
from data_pipeline.order.step_sampler import MicroBatch
from data_pipeline.reading.reader import BadSample, Sample, SampleReader, TransientReadError
from data_pipeline.rng import sample_rng
from data_pipeline.samples.sample_processor import RngFor, SampleProcessor
from data_pipeline.timing import StageClock

if TYPE_CHECKING:
    import torch

# A position is given up after this many substitutes: by then no data set is worth reading on.
MAX_ATTEMPTS = 100


Allocate = Callable[[Mapping[str, tuple[int, ...]]], dict[str, "torch.Tensor"]]
"""name -> shape in, name -> uint8 tensor out."""


class DataError(RuntimeError):
    """Loading cannot go on; the text names task, rank, position, shard and key."""


class Fault(NamedTuple):
    """One sample, or one shard of a stream, that could not be used."""

    task: str
    position: int
    attempt: int
    """0: the sample that the order names; a: its a-th substitute."""
    row: int
    """-1 for what has no row: samples of a stream."""
    shard: str
    key: str
    reason: str


Found = tuple[dict[str, Any], int, str]
"""Arrays, row and key of a sample."""


class TaskStream:
    """Loads micro-batches of one task. Holds no position: each request carries its own."""

    def __init__(
        self,
        name: str,
        reader: SampleReader,
        order: RowOrder | None,
        processor: SampleProcessor,
        seed: int,
        global_batch: int,
        micro_batch: int,
        selection: Selection | None = None,
    ) -> None:
        """Assemble a stream.

        Args:
            name: the task; it keys the random draws of its samples.
            order: position -> row (of all sources, one behind the other); none for evaluation,
                where positions count the rows that take part, nothing is drawn at random, and a
                bad sample becomes a row that is not valid.
            seed: key of the samples' random draws.
            global_batch: samples per step over all ranks.
            micro_batch: most samples per forward pass on one rank.
            selection: rows that take part in evaluation, None for all; an order knows its own.
        """
        self.name, self.reader, self.order, self.processor = name, reader, order, processor
        self.seed, self.global_batch, self.micro_batch = seed, global_batch, micro_batch
        self.selection = selection
        self._extensions = processor.extensions
        self._counted: dict[str, int] = {}
        if order is not None and selection is not None:
            raise ValueError(f"task {name}: a selection belongs to its order, or to evaluation")
        stored = len(reader.shards)
        for planned in (order and order.stored_rows, selection and selection.n_rows):
            if planned is not None and planned != stored:
                raise ValueError(
                    f"task {name}: the order was planned for {planned} samples, the shards hold "
                    f"{stored}"
                )

    @property
    def n_rows(self) -> int:
        """Samples of the data set, or of all its sources, that take part."""
        if self.order is not None:
            return self.order.n_rows
        return len(self.reader.shards) if self.selection is None else self.selection.n_kept

    @property
    def fingerprint(self) -> str:
        """Tells training data apart: shards (without their folders), and samples that take part."""
        return self._fingerprint(self.reader.shards.fingerprint)

    def fingerprint_by_headers(self, numbers: Collection[int] | None = None) -> str:
        """`fingerprint` before shards got full indices; see `ShardSet.fingerprint_by_headers`."""
        return self._fingerprint(self.reader.shards.fingerprint_by_headers(numbers))

    def _fingerprint(self, of_shards: str) -> str:
        return sha256(f"{of_shards}\n{self.order.selection_fingerprint}".encode()).hexdigest()

    def epoch_metrics(self, samples: int) -> dict[str, float]:
        """Metrics after `samples` samples of this task: `epoch` is samples per sample that there
        is; with several sources `epoch_NAME` is the passes over each, which is what repeats."""
        if self.order is None:
            return {"epoch": samples / self.n_rows}
        parts = self.order.epochs_by_source(samples)
        named = {f"epoch_{name}": passes for name, passes in parts.items()}
        return {"epoch": self.order.epochs(samples)} | named

    def load(self, request: MicroBatch, allocate: Allocate | None = None) -> dict[str, Any]:
        """Read, decode and collate one micro-batch.

        Args:
            request: positions, and which of them are padding.
            allocate: gives memory for the arrays that are written in place.

        Returns:
            the batch of the processor's `collate`, with B = len(request.positions), and
            position (B,) int64 and row (B,) int64, -1 in padding rows; key: list of B str;
            seconds: dict stage -> float; counters: what storage did since the last batch (see
            `storage.ByteSource`); faults: list of Fault in the order they were met.

        Raises:
            DataError: nothing usable could be found for a position.
            TransientReadError: storage failed and stayed so.
        """
        processor = self.processor.of_step(self.seed, self.name, request.step)
        batch = load_batch(request, processor, self._expected_rows, self._usable, allocate)
        return batch | {"counters": self._count()}

    def _count(self) -> dict[str, int]:
        """What the source counted since the last call, in this process."""
        now, before = dict(self.reader.source.counters), self._counted
        self._counted = now
        return {name: max(value - before.get(name, 0), 0) for name, value in now.items()}

    def locate(self, positions: np.ndarray) -> list[str]:
        """Shard of each position, for messages."""
        shards = self.reader.shards
        return [shards.shards[shards.locate(int(row))[0]].label for row in self._rows(positions)]

    def _expected_rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows of a batch; remote ones begin to come while the first are still being decoded."""
        rows = self._rows(positions)
        self.reader.expect(rows.tolist(), self._extensions)
        return rows

    def _rows(self, positions: np.ndarray) -> np.ndarray:
        if self.order is not None:
            return self.order.rows(positions)
        return positions if self.selection is None else self.selection.select(positions)

    def _usable(
        self,
        processor: SampleProcessor,
        position: int,
        row: int,
        out: dict[str, np.ndarray] | None,
        clock: StageClock,
        faults: list[Fault],
    ) -> Found | None:
        """Arrays, row and key of the sample at `position` or of its first usable substitute; None
        for a bad sample in evaluation."""

        def rng_for(purpose: str) -> np.random.Generator:
            # Keyed by the position, also for substitutes: resuming draws the same again.
            return sample_rng(self.seed, self.name, position, purpose)

        for attempt in range(MAX_ATTEMPTS + 1):
            if attempt:
                candidate = self._substitute(position, attempt)
                if candidate is None:
                    continue
                row = candidate
            activity.reading(position, row, attempt)
            try:
                sample = self._read(row, position)
                clock.lap("read")
                activity.decoding(position, row, attempt)
                item = processed(processor, self.name, sample, position, rng_for, out, clock)
                return item, row, sample.key
            except BadSample as bad:
                clock.lap("read")
                faults.append(
                    Fault(self.name, position, attempt, row, bad.shard, bad.key, bad.reason)
                )
                if self.order is None:
                    return None
        raise DataError(
            f"task {self.name}, position {position}: {len(faults)} samples could not be used and "
            f"{MAX_ATTEMPTS} substitutes gave nothing usable; last: {faults[-1].shard}, key "
            f"{faults[-1].key!r}: {faults[-1].reason}"
        )

    def _read(self, row: int, position: int) -> Sample:
        try:
            return self.reader.read(row, self._extensions)
        except TransientReadError as error:
            raise TransientReadError(
                f"task {self.name}, position {position}, row {row}: {error}"
            ) from error

    def _substitute(self, position: int, attempt: int) -> int | None:
        """Row of a substitute, or None if this one stands in the same global batch anyway."""
        row = int(self.order.rows(np.array([position]), attempt)[0])
        first = position // self.global_batch * self.global_batch
        batch = np.arange(first, first + self.global_batch)
        if self.order.can_avoid(batch, position) and (self.order.rows(batch) == row).any():
            return None
        return row


Usable = Callable[
    [SampleProcessor, int, int, dict[str, np.ndarray] | None, StageClock, list[Fault]], Found | None
]
"""(processor, position, row, arrays to write to, clock, list that takes the faults) -> what is
usable there; None leaves the place empty."""


def load_batch(
    request: MicroBatch,
    processor: SampleProcessor,
    rows_of: Callable[[np.ndarray], np.ndarray],
    usable: Usable,
    allocate: Allocate | None,
) -> dict[str, Any]:
    """Assemble one micro-batch; as TaskStream.load, without its counters.

    Args:
        request: positions, and which of them are padding.
        processor: of the step of the request.
        rows_of: positions (n,) int64 -> rows (n,) int64.
        usable: what stands at a position; see Usable.
        allocate: gives memory for the arrays that are written in place.
    """
    import torch

    clock = StageClock()
    positions = np.array(request.positions, dtype=np.int64)
    rows = np.full_like(positions, -1)
    wanted = np.flatnonzero(request.valid)
    rows[wanted] = rows_of(positions[wanted])
    clock.lap("read")
    buffers = (allocate or empty)(processor.buffers(len(positions)))
    arrays = {name: buffer.numpy() for name, buffer in buffers.items()}
    clock.lap("collate")
    items: list[dict[str, Any] | None] = [None] * len(positions)
    keys = [""] * len(positions)
    faults: list[Fault] = []
    for place in wanted.tolist():
        out = {name: array[place] for name, array in arrays.items()} or None
        where = int(positions[place]), int(rows[place])
        found = usable(processor.of_place(place), *where, out, clock, faults)
        if found is None:
            rows[place] = -1
        else:
            items[place], rows[place], keys[place] = found
    activity.collating()
    batch = processor.collate(items, [item is not None for item in items], buffers)
    positions[rows < 0] = -1
    batch |= {
        "position": torch.from_numpy(positions),
        "row": torch.from_numpy(rows),
        "key": keys,
        "seconds": clock.seconds,
        "faults": faults,
    }
    clock.lap("collate")
    return batch


def processed(
    processor: SampleProcessor,
    task: str,
    sample: Sample,
    position: int,
    rng_for: RngFor,
    out: dict[str, np.ndarray] | None,
    clock: StageClock,
) -> dict[str, Any]:
    """Arrays of one sample. Raises BadSample; DataError, which says where, for a defect."""
    try:
        return processor.sample(sample, rng_for, out, clock)
    except BadSample:
        raise
    except Exception as error:  # a defect, not a bad sample: say where, and stop
        raise DataError(
            f"task {task}, position {position}, row {sample.row}: {sample.shard}, key "
            f"{sample.key!r}: {type(error).__name__}: {error}"
        ) from error


def empty(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Uninitialised uint8 tensors."""
    import torch

    return {name: torch.empty(shape, dtype=torch.uint8) for name, shape in shapes.items()}
