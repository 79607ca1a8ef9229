"""Whether the disk has room for the checkpoints that a run is going to write."""

import shutil
from pathlib import Path

import torch

# fp32 values of a trained parameter: itself, and what its optimizer keeps beside it.
_VALUES = {"adamw": 3, "mt_adamw": 3, "sgd": 2}


def checkpoint_bytes(module: torch.nn.Module, optimizer: str, averaged: bool) -> int:
    """About the size of a checkpoint; `ds_numel` is the whole size of what ZeRO-3 has divided."""
    total = 0
    for parameter in module.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        values = 4 * (_VALUES[optimizer] + averaged)
        total += count * (values if parameter.requires_grad else parameter.element_size())
    return total


def space_warning(folder: Path, wanted: int) -> str | None:
    """What to say if `folder` has no room for two checkpoints: a new one is written beside."""
    free = shutil.disk_usage(folder).free
    if free >= 2 * wanted:
        return None
    return (
        f"{folder} has {free / 2**20:,.1f} MiB free, and a checkpoint takes about "
        f"{wanted / 2**20:,.1f} MiB: there should be room for two. Make room, or set "
        "checkpoint.keep_last lower"
    )
