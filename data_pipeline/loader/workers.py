"""The process side of loading: what runs in a worker, and how a batch travels to the trainer."""

import os
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data_pipeline import activity
from data_pipeline.activity import ActivityBoard
from data_pipeline.child_signals import held_back, ignore_signals
from data_pipeline.loader.arena import Arena, InArena
from data_pipeline.loader.sequential_stream import SequentialStream
from data_pipeline.loader.stream import DataError, TaskStream, empty
from data_pipeline.order.step_sampler import MicroBatch
from data_pipeline.reading.reader import TransientReadError

# A tensor that is sent costs a file descriptor and about a millisecond; small ones are cheaper
# inside the message itself.
LEAST_SHARED_BYTES = 1 << 18


class WorkerStack(Exception):
    """The stack of an error in a worker, which is its cause in the trainer."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error on its way from a worker: what DataLoader makes of one hides its message."""

    kind: type[Exception]
    message: str
    stack: str


class RequestDataset(Dataset):
    """Answers MicroBatch requests; the object that worker processes hold."""

    def __init__(
        self,
        streams: Mapping[str, TaskStream | SequentialStream],
        rank: int,
        arena: Arena | None,
        board: ActivityBoard,
    ) -> None:
        self.streams, self.rank, self.arena, self.board = dict(streams), rank, arena, board

    def __getitem__(self, request: MicroBatch) -> dict[str, Any] | _Failure:
        worker = get_worker_info()
        self.board.use(0 if worker is None else worker.id)
        try:
            return self._load(request)
        except (DataError, TransientReadError) as error:
            if worker is None:
                raise
            return _Failure(type(error), str(error), traceback.format_exc())

    def _load(self, request: MicroBatch) -> dict[str, Any]:
        activity.working_on(request.step, request.micro)
        try:
            return self._pack(self.streams[request.task].load(request, self._allocate))
        except (DataError, TransientReadError) as error:
            raise type(error)(f"rank {self.rank}, step {request.step}: {error}") from error
        except Exception as error:
            raise DataError(
                f"rank {self.rank}, step {request.step}, task {request.task}, positions "
                f"{request.positions}: {type(error).__name__}: {error}"
            ) from error
        finally:
            activity.idle()

    def _allocate(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        taken = None if self.arena is None else self.arena.take(shapes)
        return empty(shapes) if taken is None else taken

    def _pack(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {
            name: self._pack_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    def _pack_tensor(self, tensor: torch.Tensor) -> torch.Tensor | np.ndarray | InArena:
        if self.arena is not None and (described := self.arena.describe(tensor)) is not None:
            return described
        return tensor.numpy() if tensor.nbytes < LEAST_SHARED_BYTES else tensor


class Requests:
    """Passes requests on and remembers which have not come back yet, oldest first."""

    def __init__(self, requests: Iterable[MicroBatch]) -> None:
        self.requests = requests
        self.waiting: deque[MicroBatch] = deque()

    def __iter__(self) -> Iterator[MicroBatch]:
        for request in self.requests:
            self.waiting.append(request)
            yield request


def load_batches(
    streams: Mapping[str, TaskStream | SequentialStream],
    requests: Iterable[MicroBatch],
    rank: int,
    *,
    workers: int,
    prefetch_batches: int,
    start_method: str,
    pin_memory: bool,
    window: int,
    board: ActivityBoard | None = None,
) -> Iterator[dict[str, Any]]:
    """Batches in the order of the requests, through a plain DataLoader.

    Request i goes to worker i mod `workers`. `window` is how many batches the trainer holds at a
    time; it sizes the shared memory, nothing else. `board` is where the processes note what they
    do.

    Raises:
        DataError, TransientReadError: in one line, with the worker's stack as the cause.
    """
    options: dict[str, Any] = {}
    arena = None
    if workers:
        options = {
            "prefetch_factor": prefetch_batches,
            "multiprocessing_context": start_method,
            "worker_init_fn": start_worker,
        }
        # In use at a time: one being written, those waiting, and two windows (the trainer still
        # holds the last one when it asks for the next).
        slots = 1 + prefetch_batches + -(-2 * window // workers)
        arena = _arena(streams.values(), workers, slots)
    loader = DataLoader(
        RequestDataset(streams, rank, arena, board or ActivityBoard(workers, start_method)),
        batch_size=None,
        sampler=requests,
        collate_fn=_unchanged,
        num_workers=workers,
        generator=torch.Generator(),  # leaves the trainer's own random state alone
        **options,
    )
    with held_back():
        batches = iter(loader)
    try:
        for packed in batches:
            if isinstance(packed, _Failure):
                raise packed.kind(packed.message) from WorkerStack(packed.stack)
            yield _unpacked(packed, arena, pin_memory)
    finally:
        # Now, and not when the collector finds the traceback that still holds the iterator: by then
        # its queues are closed, and it waits 5 s for workers that never hear of the end.
        if workers:
            batches._shutdown_workers()
            for process in batches._workers:  # torch sends SIGTERM to those that hang
                if process.is_alive():
                    process.kill()


def start_worker(worker_number: int) -> None:
    """One thread per worker, and no share in the signals that are meant for the trainer."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool does not survive a fork
    ignore_signals()


def _arena(
    streams: Iterable[TaskStream | SequentialStream], workers: int, slots: int
) -> Arena | None:
    needed = max(
        sum(int(np.prod(shape)) for shape in stream.processor.buffers(stream.micro_batch).values())
        for stream in streams
    )
    return Arena(workers, slots, needed) if needed and Arena.supported() else None


def _unpacked(packed: dict[str, Any], arena: Arena | None, pin_memory: bool) -> dict[str, Any]:
    described = {name: value for name, value in packed.items() if isinstance(value, InArena)}
    placed = arena.place(described) if described else {}
    batch = {}
    for name, value in packed.items():
        if isinstance(value, np.ndarray):  # small: not worth a copy
            batch[name] = torch.from_numpy(value)
            continue
        value = placed.get(name, value)
        # A copy, so that the slot is free for the worker while the device still reads.
        pinned = pin_memory and isinstance(value, torch.Tensor)
        batch[name] = value.pin_memory() if pinned else value
    return batch


def _unchanged(batch: Any) -> Any:
    return batch
