"""The process side of loading: what runs in a worker, and how a batch travels to the trainer."""

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_pipeline.reader import TransientReadError
from data_pipeline.step_sampler import MicroBatch
from data_pipeline.stream import DataError, TaskStream

# Every tensor that is sent costs a file descriptor and about a millisecond; small ones are cheaper
# inside the message itself.
LEAST_SHARED_BYTES = 1 << 18


class RequestDataset(Dataset):
    """Answers MicroBatch requests; the object that worker processes hold."""

    def __init__(self, streams: Mapping[str, TaskStream], rank: int) -> None:
        self.streams, self.rank = dict(streams), rank

    def __getitem__(self, request: MicroBatch) -> dict[str, Any]:
        try:
            return pack(self.streams[request.task].load(request))
        except (DataError, TransientReadError) as error:
            raise type(error)(f"rank {self.rank}, step {request.step}: {error}") from error
        except Exception as error:
            raise DataError(
                f"rank {self.rank}, step {request.step}, task {request.task}, positions "
                f"{request.positions}: {type(error).__name__}: {error}"
            ) from error


class Outstanding:
    """Passes requests on and remembers which have not come back yet, oldest first."""

    def __init__(self, requests: Iterable[MicroBatch]) -> None:
        self.requests = requests
        self.waiting: deque[MicroBatch] = deque()

    def __iter__(self) -> Iterator[MicroBatch]:
        for request in self.requests:
            self.waiting.append(request)
            yield request


def data_loader(
    streams: Mapping[str, TaskStream],
    requests: Iterable[MicroBatch],
    rank: int,
    *,
    workers: int,
    prefetch_batches: int,
    start_method: str,
    pin_memory: bool,
) -> DataLoader:
    """A plain DataLoader: request i goes to worker i mod `workers`, answers come back in order."""
    options: dict[str, Any] = {}
    if workers:
        options = {
            "prefetch_factor": prefetch_batches,
            "multiprocessing_context": start_method,
            "worker_init_fn": start_worker,
        }
    return DataLoader(
        RequestDataset(streams, rank),
        batch_size=None,
        sampler=requests,
        collate_fn=_unchanged,
        num_workers=workers,
        pin_memory=pin_memory,
        **options,
    )


def start_worker(worker_number: int) -> None:
    """One thread per worker, and no share in the signals that are meant for the trainer."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool does not survive a fork
    # Ctrl-C and SLURM's warnings reach all processes of a job; the trainer decides what they mean.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def pack(batch: dict[str, Any]) -> dict[str, Any]:
    """Turn small tensors into arrays, which travel inside the message."""
    return {
        name: value.numpy()
        if isinstance(value, torch.Tensor) and value.nbytes < LEAST_SHARED_BYTES
        else value
        for name, value in batch.items()
    }


def unpack(batch: dict[str, Any]) -> dict[str, Any]:
    """Undo `pack`."""
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in batch.items()
    }


def _unchanged(batch: dict[str, Any]) -> dict[str, Any]:
    return batch
