"""Named one-dimensional arrays in one file, mapped into memory when read: a safetensors subset.

Any safetensors library reads these files. They are written here because that library orders the
metadata at random, and equal content shall give equal bytes; they are read here because it copies
the arrays instead of mapping them.
"""

import ctypes
import functools
import json
import mmap
import os
import weakref
from collections.abc import Mapping

import numpy as np

_TYPE_NAMES = {
    np.dtype(np.uint8): "U8",
    np.dtype(np.uint32): "U32",
    np.dtype(np.uint64): "U64",
    np.dtype(np.int64): "I64",
    np.dtype(np.float64): "F64",
}
_TYPES = {name: dtype for dtype, name in _TYPE_NAMES.items()}


def in_file_order(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays as they are stored: widest type first, so that each one is aligned."""
    return dict(sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def serialise(
    metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]
) -> list[bytes | memoryview]:
    """Return the file as chunks to be written one after the other.

    Args: arrays: (n,) each, of uint8, uint32, uint64, int64 or float64.
    """
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    chunks: list[bytes | memoryview] = []
    position = 0
    for name, values in in_file_order(arrays).items():
        little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        entries[name] = {
            "dtype": _TYPE_NAMES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [position, position + little.nbytes],
        }
        chunks.append(little.view(np.uint8).data)
        position += little.nbytes
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return [len(header).to_bytes(8, "little") + header, *chunks]


def load(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Map a file; return its metadata and its arrays (read-only, (n,) each).

    Errors: OSError; ValueError saying what is wrong if the file is cut or not of this kind.
    """
    data = _map(path)
    size = len(data)
    start = 8 + int.from_bytes(data[:8], "little")
    if start > size:
        raise ValueError("its header is cut")
    try:
        entries = json.loads(data[8:start])
        metadata = dict(entries.pop("__metadata__"))
        arrays = {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            dtype = _TYPES[entry["dtype"]].newbyteorder("<")
            (count,) = entry["shape"]
            if not 0 <= begin <= end <= size - start or end - begin != count * dtype.itemsize:
                raise ValueError(f"array {name!r} is cut")
            arrays[name] = np.frombuffer(data, dtype, count, start + begin)
            arrays[name].flags.writeable = False
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is malformed ({error!r})") from None
    return metadata, arrays


def _map(path: str | os.PathLike[str]) -> ctypes.Array:
    """Map a file read-only; it is unmapped when the last array over it is gone.

    Python's `mmap` keeps a file descriptor open for each mapping, and thousands of indices are
    mapped at a time: that would be more than most systems allow.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ValueError(f"it has {size} bytes")
        libc = _libc()
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(path))
    data = (ctypes.c_char * size).from_address(address)
    # Not at exit: arrays may outlive the finalizers, and the process frees everything anyway.
    weakref.finalize(data, libc.munmap, address, size).atexit = False
    return data


@functools.cache
def _libc() -> ctypes.CDLL:
    """The C library, loaded once: each further time costs 5 kB that a mapping keeps."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
