"""One loader for all tasks of a run.

A plain torch DataLoader whose sampler yields requests (step, micro-step, task, positions) in
schedule order: more tasks never mean more worker pools, and the loader has no state to save. Its
position is the step it was started at.

    loader = StepLoader(streams, schedule, settings, rank, world, start_step, stop_step)
    for step_batch in loader:  # all micro-batches of one optimizer step
        ...
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data_pipeline.activity import ActivityBoard, Span
from data_pipeline.cache.prefetch import Prefetcher
from data_pipeline.loader.evaluation import EvaluationLoader
from data_pipeline.loader.faults import FaultCount, FaultFile, FaultPolicy
from data_pipeline.loader.sequential_stream import SequentialStream
from data_pipeline.loader.settings import LoaderSettings
from data_pipeline.loader.stall import StallWatch, describe_stall
from data_pipeline.loader.stream import DataError, Fault, TaskStream
from data_pipeline.loader.workers import Requests, load_batches
from data_pipeline.order.step_sampler import MicroBatch, Schedule, StepSampler

__all__ = [
    "DataError",
    "EvaluationLoader",
    "Fault",
    "FaultCount",
    "LoaderSettings",
    "MicroBatch",
    "StepBatch",
    "StepLoader",
    "StepSampler",
    "TaskMicroBatches",
    "TaskStream",
]


class TaskMicroBatches(NamedTuple):
    """What a step runs of one task on one rank."""

    task: str
    micro_batches: list[dict[str, Any]]
    """What the task's SampleProcessor collates, with position, row and key; equal shapes on all
    ranks, but for the length of texts and the number of boxes."""


@dataclass
class StepBatch:
    """Everything one rank needs for one optimizer step."""

    step: int
    parts: list[TaskMicroBatches]
    """One, unless the schedule mixes tasks."""
    seconds: dict[str, float]
    """Worker time by stage (read, decode, transform, collate), and wait: the trainer's own."""
    positions: dict[str, range] = field(default_factory=dict)
    """Task -> positions of its global batch, over all ranks."""

    @property
    def task(self) -> str:
        """The only task. Raises ValueError if there are several."""
        (part,) = self.parts
        return part.task

    @property
    def micro_batches(self) -> list[dict[str, Any]]:
        """The micro-batches of all parts."""
        return [batch for part in self.parts for batch in part.micro_batches]


class StepLoader:
    """Iterates the StepBatches of one rank from `start_step` to `stop_step`, once."""

    def __init__(
        self,
        streams: Mapping[str, TaskStream | SequentialStream],
        schedule: Schedule,
        settings: LoaderSettings,
        rank: int,
        world: int,
        start_step: int,
        stop_step: int,
        pin_memory: bool = False,
        fault_file: FaultFile | None = None,
        node_ranks: range | None = None,
    ) -> None:
        """Assemble the loader; workers start with the iteration.

        Args:
            streams: task -> stream.
            schedule: step -> (task, visit), a pure function; perhaps with several parts a step.
            settings: workers and limits.
            rank, world: this process and how many there are.
            start_step: first step to load: 0, or the step that a resumed run continues with.
            stop_step: end of the run (not loaded).
            pin_memory: page-lock images for asynchronous copies; needs CUDA.
            fault_file: where every bad sample is written down.
            node_ranks: ranks that share this node and its cache; the first of them reads ahead for
                all. None: this one alone.
        """
        self.settings, self.rank, self._world = settings, rank, world
        self.streams = dict(streams)
        self.sampler = StepSampler(schedule, self.streams, rank, world, start_step, stop_step)
        self._micro_steps = {task: self.sampler.micro_steps(task) for task in self.streams}
        self._fault_file, self._restart = fault_file, False
        self._policy = FaultPolicy(settings.fault_limits(), rank, fault_file)
        self._pin_memory = pin_memory
        self._node_ranks = range(rank, rank + 1) if node_ranks is None else node_ranks
        self._board: ActivityBoard | None = None
        self._counters: dict[str, Counter[str]] = {task: Counter() for task in self.streams}

    def counters(self, task: str) -> Mapping[str, int]:
        """What storage has done for the batches of a task, on this rank, since the start:
        bytes_read and retries (both with the read-ahead of the node's cache), cache_hits,
        cache_misses."""
        return self._counters[task]

    def spans(self) -> list[Span]:
        """What the loader processes of this rank have done of late, as they noted it."""
        return self._board.spans() if self._board is not None else []

    def faults(self) -> dict[str, FaultCount]:
        """Bad samples met by this rank so far, by task."""
        return self._policy.counts

    def take_faults(self) -> list[Fault]:
        """One fault of each row that was bad in a batch given out since the last call."""
        return self._policy.take_rows()

    def restart(self) -> None:
        """Start workers anew before the next step: a stream's order has changed."""
        self._restart = True

    def __iter__(self) -> Iterator[StepBatch]:
        step = self.sampler.start_step
        while step < self.sampler.stop_step:
            self._restart = False
            with closing(self._step_batches(self.sampler.from_step(step))) as step_batches:
                for step_batch in step_batches:
                    yield step_batch
                    step = step_batch.step + 1
                    if self._restart:
                        break

    def _step_batches(self, sampler: StepSampler) -> Iterator[StepBatch]:
        settings = self.settings
        for stream in self.streams.values():
            if isinstance(stream, SequentialStream):
                stream.start(self.rank, self._world, sampler.start_step)
        requests = Requests(sampler)
        board = self._board = ActivityBoard(settings.workers, settings.start_method)
        batches = load_batches(
            self.streams,
            requests,
            self.rank,
            workers=settings.workers,
            prefetch_batches=settings.prefetch_batches,
            start_method=settings.start_method,
            pin_memory=self._pin_memory,
            window=self.sampler.most_micro_steps(),
            board=board,
        )
        watch = StallWatch(
            settings.stall_seconds,
            lambda: describe_stall(self.streams, list(requests.waiting), board.read()),
        )
        with self._read_ahead(sampler) as ahead, closing(batches), watch:
            for step in range(sampler.start_step, sampler.stop_step):
                for task, done in (ahead.advance(step) if ahead else {}).items():
                    self._counters[task].update(done)
                yield self._step_batch(step, batches, requests, watch)

    def _read_ahead(self, sampler: StepSampler) -> AbstractContextManager[Prefetcher | None]:
        """What fills the node's cache, on the rank that does so."""
        cache, ranks = self.settings.cache, self._node_ranks
        ordered = {name: s for name, s in self.streams.items() if s.order is not None}
        if cache is None or not ordered or self.rank != ranks[0]:
            return nullcontext()
        shards = {name: stream.reader.shards for name, stream in ordered.items()}
        rows = {name: stream.order.rows for name, stream in ordered.items()}
        return Prefetcher(shards, rows, sampler, ranks, cache, self.settings.start_method)

    def _step_batch(
        self,
        step: int,
        batches: Iterator[dict[str, Any]],
        requests: Requests,
        watch: StallWatch,
    ) -> StepBatch:
        parts = self.sampler.parts(step)
        if self._fault_file is not None:
            self._fault_file.step = step + 1
        step_batch = StepBatch(
            step, [TaskMicroBatches(task, []) for task, _ in parts], {"wait": 0.0}, dict(parts)
        )
        for part in step_batch.parts:
            for _ in range(self._micro_steps[part.task]):
                started = time.perf_counter()
                with watch.waiting():
                    batch = next(batches)
                requests.waiting.popleft()
                seconds = batch.pop("seconds") | {"wait": time.perf_counter() - started}
                for stage, spent in seconds.items():
                    step_batch.seconds[stage] = step_batch.seconds.get(stage, 0.0) + spent
                self._counters[part.task].update(batch.pop("counters"))
                self._policy.record(part.task, batch)
                part.micro_batches.append(batch)
        return step_batch
