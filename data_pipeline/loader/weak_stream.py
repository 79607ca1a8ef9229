"""Data that has no addresses: the output of commands, compressed tars, servers without ranges.

The weaker way to read shards, through the webdataset library, for what cannot be indexed. Each
worker process of each rank reads shards of its own from begin to end, again and again. What holds
here as elsewhere: all ranks have equal batch counts of equal sizes; bad samples are skipped,
counted and limited; random draws are keyed by (seed, task, position); nothing is unpickled. What
does not hold: see `PROMISES_NOT`.
"""

import logging
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from data_pipeline import activity
from data_pipeline.loader.stream import (
    MAX_ATTEMPTS,
    Allocate,
    DataError,
    Fault,
    Found,
    fields_of,
    load_batch,
)
from data_pipeline.order.step_sampler import MicroBatch
from data_pipeline.reading.reader import BadSample, Sample
from data_pipeline.reading.webdataset_reader import ShardFault, label_of, streamed_samples
from data_pipeline.rng import sample_rng
from data_pipeline.samples.sample_processor import SampleProcessor
from data_pipeline.shards.shard_set import MAX_MEMBER_BYTES
from data_pipeline.storage.retry import Interrupted, Patience, RetryPolicy
from data_pipeline.timing import StageClock

PROMISES_NOT = (
    "no fixed order (another number of ranks or workers, or a resume, reads other samples at a "
    "step), no equal epochs (some samples may come twice before others have come once), no "
    "checksums (what a damaged header hides is noticed at most by its shard), no quarantine"
)

_FIRST_SAMPLES = 100

logger = logging.getLogger("omnipretrain.data")


class WeakStream:
    """Loads micro-batches of one task from shards that can only be read from begin to end.

    Answers what a TaskStream answers. Its iterators live in the process that loads.
    """

    order = None

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        fields: SampleProcessor,
        seed: int,
        global_batch: int,
        micro_batch: int,
        *,
        samples: int | None = None,
        shuffle_samples: int = 1000,
        retry: RetryPolicy | None = None,
        max_member_bytes: int = MAX_MEMBER_BYTES,
    ) -> None:
        """Assemble a stream; nothing is opened.

        Args:
            name, fields, seed, global_batch, micro_batch: as of a TaskStream.
            urls: what webdataset can open: `pipe:` commands, addresses, paths.
            samples: how many there are in all, for metrics, if somebody knows.
            shuffle_samples: samples that each process holds to shuffle them.
            retry: patience with shards that all fail.
            max_member_bytes: a sample with a larger member is a bad one.
        """
        self.name, self.fields, self.seed = name, fields, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.urls, self.n_rows = list(urls), samples
        self.shuffle_samples, self.retry = shuffle_samples, retry or RetryPolicy()
        self.max_member_bytes = max_member_bytes
        self._place, self._start_step = (0, 1), 0
        self._samples: Iterator[Sample] | None = None
        self._skipped: list[ShardFault] = []
        self._bytes_read = 0

    @property
    def fingerprint(self) -> str:
        """Of the names of the shards: what they hold is not known."""
        names = "\n".join(label_of(url, number) for number, url in enumerate(self.urls))
        return sha256(names.encode()).hexdigest()

    def start(self, rank: int, world: int, step: int) -> None:
        """Say whose part of the stream is read, and from which step on; workers start after this.

        Every start at another step reads the shards in another order.
        """
        self.close()
        self._place, self._start_step = (rank, world), step
        if rank == 0:
            logger.warning(
                "task %s: read as a stream of %d shards, which promises less: %s",
                self.name,
                len(self.urls),
                PROMISES_NOT,
            )
            if step:
                logger.warning(
                    "task %s: goes on at step %d with another part of its stream: which samples "
                    "were read before is not known",
                    self.name,
                    step,
                )

    def epochs(self, samples: int) -> dict[str, float]:
        """Metrics after `samples` samples: `epoch`, if the number of samples is known."""
        return {} if self.n_rows is None else {"epoch": samples / self.n_rows}

    def locate(self, positions: np.ndarray) -> list[str]:
        """Where positions come from, for messages: nobody can tell."""
        return [f"a stream of {len(self.urls)} shards"] * min(len(positions), 1)

    def load(self, request: MicroBatch, allocate: Allocate | None = None) -> dict[str, Any]:
        """As TaskStream.load; `row` is 0 for a sample, and that of a Fault -1."""
        fields = self.fields.of_step(self.seed, self.name, request.step)
        batch = load_batch(request, fields, np.zeros_like, self._usable, allocate)
        bytes_read, self._bytes_read = self._bytes_read, 0
        return batch | {"counters": {"bytes_read": bytes_read}}

    def close(self) -> None:
        """End what is being read."""
        samples, self._samples = self._samples, None
        if samples is not None:
            samples.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_samples": None, "_skipped": [], "_bytes_read": 0}

    def _usable(
        self,
        fields: SampleProcessor,
        position: int,
        row: int,
        out: dict[str, np.ndarray] | None,
        clock: StageClock,
        faults: list[Fault],
    ) -> Found:
        """The next sample that can be used."""

        def rng_for(purpose: str) -> np.random.Generator:
            return sample_rng(self.seed, self.name, position, purpose)

        for attempt in range(MAX_ATTEMPTS + 1):
            activity.reading(position, row, attempt)
            sample = self._next()
            clock.lap("read")
            activity.decoding(position, row, attempt)
            faults += (
                Fault(self.name, position, attempt, -1, fault.shard, fault.key, fault.reason)
                for fault in self._skipped
            )
            self._skipped.clear()
            try:
                item = fields_of(fields, self.name, sample, position, rng_for, out, clock)
                return item, row, sample.key
            except BadSample as bad:
                faults.append(
                    Fault(self.name, position, attempt, -1, bad.shard, bad.key, bad.reason)
                )
        raise DataError(
            f"task {self.name}, position {position}: {MAX_ATTEMPTS + 1} samples in a row could "
            f"not be used; last: {faults[-1].shard}, key {faults[-1].key!r}: {faults[-1].reason}"
        )

    def _next(self) -> Sample:
        if self._samples is None:
            self._samples = self._shuffled()
        return next(self._samples)

    def _shuffled(self) -> Iterator[Sample]:
        """Samples of this process without an end, shuffled in a buffer."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rank, world = self._place
        slot, slots = rank * workers + number, world * workers
        rng = sample_rng(self.seed, self.name, self._start_step, f"stream buffer {slot}")
        buffer: list[Sample] = []
        for count, sample in enumerate(self._passes(slot, slots)):
            buffer.append(sample)
            # The first batch does not wait for a full buffer: it grows with every second sample.
            grows = len(buffer) < self.shuffle_samples
            if grows and (len(buffer) < _FIRST_SAMPLES or count % 2):
                continue
            place = int(rng.integers(len(buffer)))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()

    def _passes(self, slot: int, slots: int) -> Iterator[Sample]:
        """Samples of the shards of one of `slots` processes, pass after pass.

        Raises TransientReadError if no shard of a pass gives a sample, again and again.
        """
        patience = Patience(f"task {self.name}", self.retry, lambda: None)
        number = 0
        while True:
            found = False
            key = f"stream pass {number}"
            shuffled = sample_rng(self.seed, self.name, self._start_step, key).permutation(
                len(self.urls)
            )
            for shard, turn, sharers in part_of(len(self.urls), slot, slots):
                chosen = int(shuffled[shard])
                for sample in self._of_shard(chosen, turn, sharers):
                    found = True
                    yield sample
            number += 1
            if found:
                patience.progress()
                continue
            last = self._skipped[-1] if self._skipped else None
            reason = f"{last.shard}: {last.reason}" if last else "its shards hold no samples"
            del self._skipped[:-1]
            patience.wait(Interrupted(f"no sample in a whole pass; last: {reason}"))

    def _of_shard(self, number: int, turn: int, sharers: int) -> Iterator[Sample]:
        url = self.urls[number]
        try:
            for place, sample in enumerate(streamed_samples(url, number)):
                self._bytes_read += sum(map(len, sample.members.values()))
                if place % sharers == turn and (wanted := self._wanted(sample)) is not None:
                    yield wanted
        except ShardFault as fault:
            self._skipped.append(fault)

    def _wanted(self, sample: Sample) -> Sample | None:
        """A sample with the members that are needed; None, and a fault, if one is too large."""
        members = {e: data for e, data in sample.members.items() if e in self.fields.extensions}
        for extension, data in members.items():
            if len(data) > self.max_member_bytes:
                reason = (
                    f"member .{extension} has {len(data)} bytes, more than max_member_bytes "
                    f"({self.max_member_bytes})"
                )
                self._skipped.append(ShardFault(sample.shard, sample.key, reason))
                return None
        return sample._replace(members=members)


def part_of(shards: int, slot: int, slots: int) -> list[tuple[int, int, int]]:
    """What one of `slots` processes reads of `shards` shards.

    Returns:
        (shard, turn, sharers): of every `sharers` samples of the shard the process takes the one
        with number `turn`. Where there are fewer shards than processes, several share one.
    """
    if shards >= slots:
        return [(shard, 0, 1) for shard in range(slot, shards, slots)]
    shard = slot % shards
    return [(shard, slot // shards, len(range(shard, slots, shards)))]
