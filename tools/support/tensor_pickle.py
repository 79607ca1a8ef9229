"""Tensors out of a torch.save file that holds foreign objects too, without running their code.

Checkpoints of trainers often carry a configuration object or an optimizer beside the weights, which
`torch.load(weights_only=True)` refuses as a whole. This reader takes the zip apart itself: names of
classes and functions in the pickle are never looked up. The few that tensors are made of stand for
functions of ours; each other one, whatever its name, for `Skipped`, which ignores all that is done
to it.
"""

import pickle
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_torch_zip(path: Path) -> Any:
    """The content of a torch.save file, with `Skipped` in place of what is neither a tensor nor
    plain data (dict, list, tuple, str, numbers).

    Raises:
        ValueError: no zip of torch.save, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise zipfile.BadZipFile("it has no data.pkl")
            prefix = names[0].removesuffix("data.pkl")
            order = f"{prefix}byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise zipfile.BadZipFile("it was written on a machine of another byte order")
            with archive.open(names[0]) as stream:
                return _unpickle(_TensorUnpickler(stream, archive, prefix))
    except (
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        pickle.UnpicklingError,
    ) as error:
        # Of a changed header zipfile says that it is encrypted, compressed, or of another alphabet.
        raise ValueError(f"{path} is damaged, or no file of torch.save: {error}") from None


def _unpickle(unpickler: "_TensorUnpickler") -> Any:
    try:
        return unpickler.load()
    except (
        EOFError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:
        # What a pickle that was made to do harm runs into, too.
        raise pickle.UnpicklingError(f"its pickle is no plain one ({error})") from None


class Skipped:
    """Stands for an object of a class that is not loaded. Empty, whatever is put into it."""

    def __new__(cls, *_: Any, **__: Any) -> "Skipped":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Of a list that is not loaded."""

    def extend(self, _: Any) -> None:
        """Of a list that is not loaded."""

    def add(self, _: Any) -> None:
        """Of a set that is not loaded."""


class _Storage:
    """The type of a storage as the pickle names it. No callable: it cannot be made to do things."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("a storage type has no state")


class _Rebuild:
    """A function that makes a tensor from a storage, or a parameter from a tensor."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> Tensor:
        if isinstance(arguments[0], Tensor) and len(arguments) <= 3:  # parameter: tensor, flag, ...
            return arguments[0]
        storage, offset, size, stride = arguments[:4]
        if not isinstance(storage, Tensor) or storage.dim() != 1:
            raise pickle.UnpicklingError("a tensor without storage")
        # Bounds are checked by torch, on the storage's own length.
        return storage.as_strided(size, stride, offset)

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, stream: Any, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(stream, encoding="utf-8")
        self.archive, self.prefix = archive, prefix
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Never imports: an object of ours for every name."""
        if module == "torch" and name in _STORAGES:
            return _Storage(_STORAGES[name])
        if (module, name) in (
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
        ):
            return _Rebuild()
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return Skipped

    def persistent_load(self, pid: Any) -> Tensor:
        """The storage that is meant, flat; each one is read once."""
        kind, storage, key, _, length = pid
        if kind != "storage" or not isinstance(storage, _Storage) or not isinstance(key, str):
            raise pickle.UnpicklingError("only storages of tensors may be referred to")
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.prefix}data/{key}"))
            flat = torch.empty(0, dtype=storage.dtype)
            if data:
                flat = torch.frombuffer(data, dtype=storage.dtype)
            if len(flat) != length:
                raise pickle.UnpicklingError("a storage is not as long as it should be")
            self.storages[key] = flat
        return self.storages[key]
