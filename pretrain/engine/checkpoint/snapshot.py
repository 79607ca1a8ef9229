"""A copy of what a checkpoint holds, in memory that this process shares with its writer.

The copy is laid out as the files will be, byte by byte, so that whoever writes them needs neither
torch nor a second copy. The memory has no name in any file system: it is gone with the processes.
"""

import json
import logging
import mmap
import os

import torch

from pretrain.engine.checkpoint.contents import Contents
from pretrain.engine.checkpoint.files import CheckpointError

log = logging.getLogger("omnipretrain.checkpoint")

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_ORDER = {dtype: rank for rank, dtype in enumerate(_DTYPES)}
_ALIGNMENT = 8  # of a file's first tensor, as the library of the format has it
Piece = tuple[str, int, int]
"""Name of a file, and where its bytes begin and end in the memory."""


def tensor_file_layout(
    tensors: dict[str, torch.Tensor],
) -> tuple[bytes, list[tuple[int, torch.Tensor]], int]:
    """A .safetensors file as the library writes it.

    Returns:
        Its head, (offset in the file, tensor) of each tensor, and the size of the file.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-_ORDER[item[1].dtype], item[0].encode()))
    entries, places, end = {}, [], 0
    for name, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        places.append((end, tensor))
        end += size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return head, [(len(head) + offset, tensor) for offset, tensor in places], len(head) + end


class Snapshot:
    """Memory for one copy, used again for the next one; it grows with the first.

    On machines with GPUs it is page-locked, so that copies run at the speed of the bus.

    Attributes:
        descriptor: of the memory, for the process that writes.

    Raises:
        CheckpointError: this system has no such memory.
    """

    def __init__(self, device: torch.device) -> None:
        if not hasattr(os, "memfd_create"):
            raise CheckpointError(
                "checkpoint.asynchronous needs Linux, whose processes can share nameless memory: "
                "set it to false"
            )
        self.descriptor = os.memfd_create("checkpoint")
        self._device = device
        self._flat = torch.empty(0, dtype=torch.uint8)
        self._locked = False

    def take(self, contents: Contents) -> list[Piece]:
        """Copy the contents; what they were made of may change as soon as this returns.

        Raises:
            CheckpointError: there is not enough memory, with the figures.
        """
        pieces: list[Piece] = []
        heads: list[tuple[int, bytes]] = []
        copies: list[tuple[int, torch.Tensor]] = []
        end = 0
        for name, content in contents.items():
            start = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
            if isinstance(content, bytes):
                heads.append((start, content))
                end = start + len(content)
            else:
                head, places, size = tensor_file_layout(content)
                heads.append((start, head))
                copies += [(start + offset, tensor) for offset, tensor in places]
                end = start + size
            pieces.append((name, start, end))
        self._reserve(end)
        for start, head in heads:
            if head:
                self._flat[start : start + len(head)] = torch.frombuffer(
                    bytearray(head), dtype=torch.uint8
                )
        for start, tensor in copies:
            size = tensor.numel() * tensor.element_size()
            place = self._flat[start : start + size].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return pieces

    def _reserve(self, size: int) -> None:
        if size <= self._flat.numel():
            return
        free = _available_bytes()
        if free is not None and size - self._flat.numel() > free:
            raise CheckpointError(
                f"the snapshot of this rank takes {size:,} bytes of the host's memory, and "
                f"{free:,} are available: set checkpoint.asynchronous=false"
            )
        self._unlock()
        try:
            # Now, with an error; a page that is missing later would be a SIGBUS.
            os.posix_fallocate(self.descriptor, 0, size)
            self._flat = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)
        except OSError as error:
            raise CheckpointError(
                f"no memory for a snapshot of {size:,} bytes ({error.strerror}): set "
                "checkpoint.asynchronous=false"
            ) from None
        self._lock()

    def _lock(self) -> None:
        if self._device.type != "cuda":
            return
        code = torch.cuda.cudart().cudaHostRegister(self._flat.data_ptr(), self._flat.numel(), 0)
        self._locked = int(code) == 0
        if not self._locked:
            log.warning(
                "the memory of snapshots cannot be page-locked (CUDA error %s): copies "
                "from the GPU are slower",
                code,
            )

    def _unlock(self) -> None:
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._flat.data_ptr())
        self._locked = False

    def close(self) -> None:
        """Give the memory back."""
        self._unlock()
        self._flat = torch.empty(0, dtype=torch.uint8)
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def _available_bytes() -> int | None:
    """Of the host's memory; None where /proc does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
