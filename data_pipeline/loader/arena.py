"""Memory that workers and trainer share, handed out in slots and used again and again.

A worker writes pixels where the trainer reads them: no copy, no fresh pages to fault in (they cost
as much as resizing the images), and no limit by the size of /dev/shm. A slot becomes free when the
last tensor that looks into it is gone, whoever holds it, however long; while none is free a batch
simply travels as an ordinary tensor.
"""

import mmap
import os
import weakref
from collections.abc import Mapping
from multiprocessing.reduction import DupFd
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

_ALIGN = 4096
_FREE, _TAKEN = 0, 1


class InArena(NamedTuple):
    """A uint8 tensor described by its place in an arena; what travels in its stead."""

    slot: int
    offset: int
    """Bytes from the start of the slot."""
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Arena:
    """`workers` times `slots` slots of `slot_bytes` bytes. Memory is used once it is written to.

    Each worker takes slots of its own share only, and the trainer alone frees them, so a byte per
    slot is all the bookkeeping and no lock is needed.
    """

    def __init__(self, workers: int, slots: int, slot_bytes: int) -> None:
        self.workers, self.slots = workers, slots
        self.slot_bytes = -(-slot_bytes // _ALIGN) * _ALIGN
        self._head = -(-workers * slots // _ALIGN) * _ALIGN  # the flags
        self._trainer = os.getpid()
        self._map_file(os.memfd_create("omnipretrain-batches", os.MFD_CLOEXEC))

    @staticmethod
    def supported() -> bool:
        """Whether the system has anonymous shared files (Linux)."""
        return hasattr(os, "memfd_create")

    def take(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor] | None:
        """In a worker: uninitialised uint8 tensors in one slot; None if none is free or too small.

        The slot stays taken until the trainer has let go of what `place` gave it.
        """
        info = get_worker_info()
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        if info is None or not sizes or sum(sizes) > self.slot_bytes:
            return None
        own = self._flags[info.id * self.slots : (info.id + 1) * self.slots]
        free = np.flatnonzero(own == _FREE)
        if not free.size:
            return None
        own[free[0]] = _TAKEN
        start = self._start(info.id * self.slots + int(free[0]))
        tensors = {}
        for (name, shape), size in zip(shapes.items(), sizes, strict=True):
            tensors[name] = self._bytes[start : start + size].view(shape)
            start += size
        return tensors

    def describe(self, tensor: torch.Tensor) -> InArena | None:
        """In a worker: the place of a tensor that shares memory with one from `take`, else None."""
        if tensor.untyped_storage().data_ptr() != self._bytes.untyped_storage().data_ptr():
            return None
        slot, offset = divmod(tensor.storage_offset() - self._head, self.slot_bytes)
        return InArena(slot, offset, tuple(tensor.shape), tensor.stride())

    def place(self, described: Mapping[str, InArena]) -> dict[str, torch.Tensor]:
        """In the trainer: the tensors of one batch.

        All tensors of a slot share one storage, whose end frees the slot. (Were each to free it,
        the first would hand the others' memory to the worker, and the last would take it away from
        the batch that the worker has put there since.)
        """
        slots = {about.slot for about in described.values()}
        storages = {slot: self._open(slot) for slot in slots}
        return {
            name: storages[slot].as_strided(size, stride, offset)
            for name, (slot, offset, size, stride) in described.items()
        }

    def _open(self, slot: int) -> torch.Tensor:
        """The bytes of a slot; it is freed with the last tensor that shares their storage."""
        start = self._start(slot)
        window = self._array[start : start + self.slot_bytes]
        # The tensor's storage holds `window` itself, so it dies with the last view of the storage.
        release = weakref.finalize(window, self._release, slot)
        release.atexit = False
        return torch.from_numpy(window)

    def _start(self, slot: int) -> int:
        return self._head + slot * self.slot_bytes

    def _release(self, slot: int) -> None:
        # A process forked since (another loader's worker) has a copy of what the trainer holds, but
        # no say over it.
        if os.getpid() == self._trainer:
            self._flags[slot] = _FREE

    def _map_file(self, descriptor: int) -> None:
        self._descriptor = descriptor
        size = self._head + self.workers * self.slots * self.slot_bytes
        os.ftruncate(descriptor, size)
        self._array = np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)
        self._bytes = torch.from_numpy(self._array)
        self._flags = self._array[: self._head]

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __getstate__(self) -> dict:
        """Workers that are not forked get the file; nothing else about the arena has state."""
        names = ("workers", "slots", "slot_bytes", "_head", "_trainer")
        return {name: getattr(self, name) for name in names} | {"file": DupFd(self._descriptor)}

    def __setstate__(self, state: dict) -> None:
        descriptor = state.pop("file").detach()
        self.__dict__.update(state)
        self._map_file(descriptor)
