"""What this rank adds to a checkpoint: file names, and the tensors or bytes that go into them."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from data_pipeline.files import give_usual_access, naming, sync_file
from pretrain.engine.checkpoint.engine_state import states_of
from pretrain.engine.checkpoint.files import EMA, MODULE, file_entry, rank_files, write_tensors
from pretrain.engine.zero.momentum import TargetNetworks
from pretrain.engine.zero.partitions import list_partitions

Contents = dict[str, dict[str, torch.Tensor] | bytes]
"""Name of a file, relative to the checkpoint's folder -> its named tensors, or its bytes."""


def rank_contents(
    engine,
    rank: int,
    module: dict[str, torch.Tensor],
    averages: list[torch.Tensor] | None,
    targets: TargetNetworks | None,
    attachments: Mapping[str, Path | bytes],
) -> Contents:
    """Files of a rank. The tensors of partitions are those that training uses, not copies.

    Args:
        module: see `engine_state.module_tensors`; rank 0 writes them, and the attachments.
        averages, targets: as in `Checkpoints.save`.
        attachments: name -> source, or content.
    """
    tensors, maps = {}, []
    own = list_partitions(engine)
    for index, partition in enumerate([*own, *([targets.partition] if targets else [])]):
        states, scalars = states_of(engine, partition)
        if averages is not None and index < len(own):
            states[EMA] = averages[index]
        for name, tensor in states.items():
            tensors[f"{index}.{name}"] = tensor.detach()
        maps.append(
            {
                "group": partition.group,
                "numel": partition.master.numel(),
                "tensors": list(states),
                "scalars": scalars,
                "fragments": [
                    [f.parameter, f.start, f.offset, f.numel] for f in partition.fragments
                ],
            }
        )
    tensor_file, map_file = rank_files(rank)
    contents: Contents = {
        tensor_file: tensors,
        map_file: json.dumps({"partitions": maps}).encode(),
    }
    if rank == 0:
        contents[MODULE] = module
        for name, source in attachments.items():
            contents[name] = source if isinstance(source, bytes) else source.read_bytes()
    return contents


def write_contents(contents: Contents, folder: Path) -> dict[str, dict[str, int | str]]:
    """Write the files under `folder`, and force them to the disk.

    Returns:
        name -> size and hash, for the manifest.

    Raises:
        CheckpointError, OSError: with the file.
    """
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            with naming(path):
                path.write_bytes(content)
        else:
            write_tensors(content, path)
    for name in contents:
        give_usual_access(folder / name)
        sync_file(folder / name)
    return {name: file_entry(folder / name) for name in contents}
