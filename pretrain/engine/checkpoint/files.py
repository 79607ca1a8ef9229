"""The files of a checkpoint, seen without a process group: names, hashes, manifest, full tensors.

    <run>/checkpoints/
        latest                       name of the newest checkpoint, moved last
        step_000000300/
            manifest.json            what is here: sizes and SHA-256 of every other file, parameter
                                     shapes, groups, trainer state; it carries its own digest
            rank_00000.safetensors   fp32 partitions of rank 0: "<i>.master", "<i>.exp_avg", ...,
                                     and "<i>.ema" if the run averages its weights; the last
                                     one holds its part of momentum targets: "<i>.master" alone
            rank_00000.json          which parameter each element of them belongs to
            module.safetensors       other frozen parameters, and buffers
            tokenizer/               the tokenizer that the text heads were trained with

Tensors and JSON only: nothing here can run code when it is read. A folder without a valid manifest
is not a checkpoint; a checkpoint is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    import torch

FORMAT = 1
MANIFEST = "manifest.json"
MODULE = "module.safetensors"
MASTER = "master"  # name of the fp32 weights among the states of a partition
EMA = "ema"  # name of the moving average among the states of a partition
READ_AT_ONCE = 2**22  # elements: bounds what a reader holds beside the tensor that it fills


_NAME = re.compile(r"step_(\d{9,})$")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and what to do."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps; sorts by step."""
    return f"step_{step:09d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, newest first; their contents are not looked at."""
    if not root.is_dir():
        return []
    found = [(int(m[1]), p) for p in root.iterdir() if (m := _NAME.match(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def rank_files(rank: int) -> tuple[str, str]:
    """Names of a rank's tensor file and of its fragment map."""
    return f"rank_{rank:05d}.safetensors", f"rank_{rank:05d}.json"


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a .safetensors file.

    Raises:
        CheckpointError: it cannot be written; with its name and size and the room that there is
            (the library's own error tells neither).
    """
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise cannot_write(path, size, str(error)) from None


def cannot_write(path: Path, size: int, why: str) -> CheckpointError:
    """The error of a file of so many bytes, with the room that there is."""
    room = "its folder is gone"  # another owner clears away what it finds unfinished
    if path.parent.is_dir():
        room = f"{shutil.disk_usage(path.parent).free:,} bytes are free there"
    return CheckpointError(f"cannot write {path}, {size:,} bytes ({room}): {why}")


def file_entry(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file, as the manifest records them."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def seal_manifest(manifest: dict) -> bytes:
    """JSON of the manifest with its own digest added, so that its damage is seen too."""
    return json.dumps({**manifest, "digest": _digest(manifest)}, indent=1, sort_keys=True).encode()


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: it is absent, damaged, or of a format that this version does not know.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("digest")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the folder is not a whole checkpoint") from None
    except (ValueError, KeyError, AttributeError):
        raise CheckpointError(f"{path} is damaged (it is not a sealed manifest)") from None
    if digest != _digest(manifest):
        raise CheckpointError(f"{path} is damaged (its content does not match its digest)")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']}, this version reads format {FORMAT}"
        )
    return manifest


def verify_file(folder: Path, name: str, entry: dict) -> str | None:
    """What is wrong with one file of a checkpoint, or None."""
    path = folder / name
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path} has {size:,} bytes instead of {entry['bytes']:,}"
    if file_entry(path)["sha256"] != entry["sha256"]:
        return f"{path} is damaged: its SHA-256 differs from the manifest's"
    return None


def _digest(manifest: dict) -> str:
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class FragmentReader:
    """Reads any slice of any parameter's state from a checkpoint, whatever world wrote it.

    Opens files lazily and maps them, so a reader touches only the bytes that it asks for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._files: dict[int, safe_open] = {}
        # parameter -> [(start, numel, rank, partition, offset)], ordered by start
        self._where: dict[str, list[tuple[int, int, int, int, int]]] = {}
        self._tensors: dict[tuple[int, int], list[str]] = {}
        self._groups: dict[tuple[int, int], int] = {}
        self._scalars: dict[int, dict[str, float]] = {}
        for rank in range(self.manifest["world"]):
            self._read_map(rank)
        for places in self._where.values():
            places.sort()

    def _read_map(self, rank: int) -> None:
        path = self.folder / rank_files(rank)[1]
        try:
            partitions = json.loads(path.read_bytes())["partitions"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"cannot read the fragment map {path}: {error}") from None
        for index, partition in enumerate(partitions):
            self._tensors[rank, index] = partition["tensors"]
            self._groups[rank, index] = partition["group"]
            if partition["scalars"]:
                self._scalars.setdefault(partition["group"], partition["scalars"])
            for parameter, start, offset, numel in partition["fragments"]:
                self._where.setdefault(parameter, []).append((start, numel, rank, index, offset))

    def states(self, parameter: str) -> list[str]:
        """Names of the tensors kept for a parameter, "master" first."""
        _, _, rank, index, _ = self._where[parameter][0]
        return self._tensors[rank, index]

    def scalars(self, parameter: str) -> dict[str, float]:
        """Numbers that the optimizer keeps for the group in which a parameter was."""
        _, _, rank, index, _ = self._where[parameter][0]
        return self._scalars.get(self._groups[rank, index], {})

    def kept(self) -> list[str]:
        """Names of the tensors that are kept for every trained parameter, "master" first."""
        return self.states(next(iter(self._where)))

    def read(self, parameter: str, state: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` (n,) with elements [start, start + n) of a parameter's `state`.

        Raises:
            CheckpointError: the checkpoint does not hold all of these elements.
        """
        done = 0
        stop = start + out.numel()
        for first, numel, rank, index, offset in self._where.get(parameter, []):
            low, high = max(start, first), min(stop, first + numel)
            if low >= high:
                continue
            piece = self._file(rank).get_slice(f"{index}.{state}")
            shift = offset - first
            for begin in range(low, high, READ_AT_ONCE):
                end = min(begin + READ_AT_ONCE, high)
                out[begin - start : end - start].copy_(piece[begin + shift : end + shift])
            done += high - low
        if done != out.numel():
            raise CheckpointError(
                f"{self.folder} holds {done:,} of the {out.numel():,} elements asked for of "
                f"{parameter} ({state}, from element {start:,})"
            )

    def _file(self, rank: int) -> safe_open:
        if rank not in self._files:
            self._files[rank] = safe_open(self.folder / rank_files(rank)[0], framework="pt")
        return self._files[rank]

    def whole(self, parameter: str, state: str = MASTER) -> torch.Tensor:
        """A trained parameter (or one of its optimizer states) or a momentum target in its own
        shape, float32."""
        import torch

        shape = self.manifest["parameters"][parameter]["shape"]
        out = torch.empty(shape, dtype=torch.float32)
        self.read(parameter, state, 0, out.view(-1))
        return out

    def module_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Frozen parameters that follow no other and buffers, in their type in the model."""
        with safe_open(self.folder / MODULE, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)


def read_full_state(folder: Path, state: str = MASTER) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint under the model's own names, for export and evaluation.

    Args:
        folder: a checkpoint folder (`<run>/checkpoints/step_...`).
        state: "master" for the fp32 weights, "ema" for their moving average.

    Returns:
        name -> tensor: trained parameters and momentum targets (which have no average of their
        own) float32, frozen ones and buffers as in the model; a tied parameter appears under each
        of its names, sharing memory.

    Raises:
        CheckpointError: the folder is not a whole checkpoint, a file of it is damaged, or it does
            not hold that state.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = [
        p for name, entry in manifest["files"].items() if (p := verify_file(folder, name, entry))
    ]
    if problems:
        raise CheckpointError("; ".join(problems))
    reader = FragmentReader(folder)
    kept = reader.kept()
    if state not in kept:
        raise CheckpointError(f"{folder} holds no {state!r} weights, but {', '.join(kept)}")
    tensors = {
        name: reader.whole(name, state if about["trained"] else MASTER)
        for name, about in manifest["parameters"].items()
        if about["trained"] or "follows" in about
    }
    tensors.update(reader.module_tensors())
    for alias, name in manifest["tied"].items():
        tensors[alias] = tensors[name]
    return tensors


def newest_whole(root: Path) -> Path:
    """The newest checkpoint under `root` whose manifest is intact.

    Raises:
        CheckpointError: there is none.
    """
    problems = []
    for folder in list_checkpoints(Path(root)):
        try:
            read_manifest(folder)
            return folder
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError("; ".join(problems) or f"no checkpoint under {root}")
