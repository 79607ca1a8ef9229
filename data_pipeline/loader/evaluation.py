"""Every sample of a data set once, over all ranks, in equal batch counts."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np

from data_pipeline.activity import ActivityBoard
from data_pipeline.loader.faults import FaultCount, FaultFile, FaultLimits, FaultPolicy
from data_pipeline.loader.stall import StallWatch, describe_stall
from data_pipeline.loader.stream import TaskStream
from data_pipeline.loader.workers import Requests, load_batches
from data_pipeline.order.step_sampler import MicroBatch


class EvaluationLoader:
    """Iterates the batches of one rank; start over as often as you like.

    A bad sample is left out (its row is not valid), counted and logged: evaluation never
    substitutes.
    """

    def __init__(
        self,
        stream: TaskStream,
        rank: int,
        world: int,
        workers: int = 0,
        max_samples: int | None = None,
        *,
        prefetch_batches: int = 2,
        start_method: str = "fork",
        limits: FaultLimits | None = None,
        pin_memory: bool = False,
        fault_file: FaultFile | None = None,
        stall_seconds: float = 120.0,
    ) -> None:
        """Assemble the loader; worker processes live as long as one iteration.

        Args:
            stream: made with order=None; its micro_batch is the batch size.
            rank, world: this process and how many there are.
            workers: worker processes, 0 for none.
            max_samples: at most so many samples, spread evenly over the data set.
            prefetch_batches, start_method: as in LoaderSettings.
            limits: on bad samples, per iteration; None = the defaults.
            pin_memory: page-lock images; needs CUDA.
            fault_file: where every bad sample is written down.
            stall_seconds: a longer wait logs what every worker does.
        """
        if stream.order is not None:
            raise ValueError(f"task {stream.name}: evaluation needs a stream without an order")
        self.stream, self.rank, self.world = stream, rank, world
        self._options: dict[str, Any] = {
            "workers": workers,
            "prefetch_batches": prefetch_batches,
            "start_method": start_method,
            "pin_memory": pin_memory,
        }
        self._stall_seconds = stall_seconds
        self._limits, self._fault_file = limits or FaultLimits(), fault_file
        self._policy = FaultPolicy(self._limits, rank, fault_file)
        self._counters: Counter[str] = Counter()
        self.samples = min(stream.n_rows, max_samples or stream.n_rows)

    def __len__(self) -> int:
        """Batches per rank, equal on all."""
        return -(-self.samples // (self.stream.micro_batch * self.world))

    def faults(self) -> dict[str, FaultCount]:
        """Bad samples of the last iteration, by task."""
        return self._policy.counts

    def counters(self) -> Mapping[str, int]:
        """What storage did for the last iteration, on this rank; as `StepLoader.counters`."""
        return self._counters

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._policy = FaultPolicy(self._limits, self.rank, self._fault_file)
        self._counters = Counter()
        streams, requests = {self.stream.name: self.stream}, Requests(self.requests())
        board = ActivityBoard(self._options["workers"], self._options["start_method"])
        batches = load_batches(streams, requests, self.rank, **self._options, window=1, board=board)
        watch = StallWatch(
            self._stall_seconds,
            lambda: describe_stall(streams, list(requests.waiting), board.read()),
        )
        with closing(batches), watch:
            for _ in range(len(self)):
                with watch.waiting():
                    batch = next(batches)
                requests.waiting.popleft()
                del batch["seconds"]
                self._counters.update(batch.pop("counters"))
                self._policy.record(self.stream.name, batch)
                yield batch

    def requests(self) -> Iterator[MicroBatch]:
        """The batches of this rank: as large as those of all ranks, and even where `micro_batch` is
        (objectives may pair the rows 2i and 2i + 1); filled up with padding rows."""
        size = self.stream.micro_batch
        multiple = 1 if size % 2 else 2
        for number in range(len(self)):
            first = number * size * self.world
            length = min(size, self.samples - first)  # of rank 0, which is never shorter
            length += -length % multiple
            places = first + self.rank * size + np.arange(length)
            valid = places < self.samples
            rows = np.where(valid, places * self.stream.n_rows // self.samples, -1)
            yield MicroBatch(
                number, 0, self.stream.name, tuple(rows.tolist()), tuple(valid.tolist())
            )
