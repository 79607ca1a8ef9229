"""Weights of others from whatever file they come in: transformers folders, safetensors,
torch.save."""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.files import give_usual_access, sync_file
from tools.support.tensor_pickle import read_torch_zip

_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def weight_file(path: Path) -> Path:
    """The file itself, or the weight file of a transformers folder. Raises ValueError."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; download the weights first and give their path")
    if path.is_file():
        return path
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path} has none of {', '.join(_FILES)}; give the weight file itself")


def read_config(file: Path) -> dict[str, Any] | None:
    """The config.json beside a weight file; none if there is none. Raises ValueError: no object."""
    path = file.parent / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object, but {str(config)[:80]}")
    return config


def read_tensors(
    path: Path, wrappings: Sequence[str] = ("model", "state_dict"), skip_objects: bool = False
) -> dict[str, Tensor]:
    """The state dict of a file.

    path: .safetensors, .index.json, or a file of torch.save.
    wrappings: keys that it may lie under, the one to prefer first.
    skip_objects: pass over objects of foreign classes beside the tensors
    (`tools.support.tensor_pickle`);
        else a file with any is refused.

    Raises:
        ValueError: damaged, more than tensors, or no state dict.
    """
    if path.name.endswith(".index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        names = index.get("weight_map") if isinstance(index, Mapping) else None
        if not isinstance(names, Mapping):
            raise ValueError(f"{path} has no `weight_map`: it is no index of a transformers folder")
        parts = sorted(set(names.values()))
        tensors: dict[str, Tensor] = {}
        for part in parts:
            tensors.update(read_tensors(path.parent / part, wrappings, skip_objects))
        return tensors
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    return _unwrap(path, _load(path, skip_objects), wrappings)


def _load(path: Path, skip_objects: bool) -> Any:
    if _is_torchscript(path):  # torch.load would hand it to torch.jit.load, which compiles code
        raise ValueError(
            f"{path} is a TorchScript archive, which is code and is not opened (OpenAI's own CLIP "
            "files are such); take the same weights as a folder of transformers, or as open_clip's "
            ".safetensors"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged files raise errors of a dozen classes
        if skip_objects:
            return read_torch_zip(path)
        # Not torch's own text: it advises to load with weights_only=False, which runs the code.
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}), or holds more than tensors and is not "
            "opened, since that could run code"
        ) from None


def _is_torchscript(path: Path) -> bool:
    """Whether a zip archive has what torch.jit.save writes beside tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False  # no zip, or a damaged one: the reader that is asked next says so


def _unwrap(path: Path, content: Any, wrappings: Sequence[str]) -> dict[str, Tensor]:
    while isinstance(content, Mapping) and (inner := _wrapped(content, wrappings)):
        content = content[inner[0]]
    tensors = content if isinstance(content, Mapping) else {}
    if not tensors or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(
            f"{path} holds no state dict (names with tensors), also not under "
            f"{' or '.join(f'`{key}`' for key in wrappings)}"
        )
    return dict(tensors)


def _wrapped(content: Mapping, wrappings: Sequence[str]) -> list[str]:
    """Keys under which checkpoints keep their state dict beside other things."""
    return [key for key in wrappings if isinstance(content.get(key), Mapping)]


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """While torch or safetensors write: their errors, of which a full disk is the usual one, become
    an OSError that names `out`."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{out} could not be written; is the disk full? ({error})") from None


def save_tensors(tensors: Mapping[str, Tensor], out: Path, source: str) -> None:
    """Write a .safetensors file in one rename; source: the format that the tensors came in.

    Raises ValueError for a name that does not end in .safetensors; OSError: it cannot be written.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: the file must end in .safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with writing(out):
            save_file(whole, temporary, metadata={"format": "pt", "source": source})
        give_usual_access(temporary)
        sync_file(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
