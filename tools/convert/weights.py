"""`tools.convert export-weights`: a run's weights under our names, for another run to start from.

What a run counts (steps of a watch, measured norms) and momentum targets, which begin as copies in
any case, stay behind.
"""

import argparse
import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from torch import Tensor

from data_pipeline.files import give_usual_access, sync_file, temporary_name
from pretrain.engine.zero.momentum_pairs import target_sources
from pretrain.models.multitask import MultiTaskModel
from tools.support.trained import open_run
from tools.support.weight_files import save_tensors, writing


def export(options: argparse.Namespace, console: Console) -> int:
    """Run the command; see `convert_arguments`."""
    run = open_run(options.run_dir, options.weights)
    tensors = chosen_tensors(run.model, options.only)
    if options.format == "dcp":
        save_distributed(tensors, options.out)
    else:
        save_tensors(tensors, options.out, f"omnipretrain {run.recipe.name}")
    count = sum(tensor.numel() for tensor in tensors.values())
    console.print(
        f"{options.out}: {len(tensors)} tensors, {count / 1e6:,.1f} M values, of {run.checkpoint}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0


def save_distributed(tensors: Mapping[str, Tensor], out: Path) -> None:
    """A folder for torch.distributed.checkpoint, flat names under `model`; read back and compared.

    Raises ValueError: `out` is there, or reads back as something else; OSError: the disk is full.
    """
    if out.exists():
        raise ValueError(f"--out {out} is there already; choose another folder")
    temporary = temporary_name(out)
    try:
        with writing(out), no_warnings():
            dcp.save({"model": dict(tensors)}, checkpoint_id=temporary, no_dist=True)
            back = {"model": {name: torch.empty_like(one) for name, one in tensors.items()}}
            dcp.load(back, checkpoint_id=temporary, no_dist=True)
        for name, tensor in tensors.items():
            if not torch.equal(back["model"][name], tensor):
                raise ValueError(f"{out}: {name} reads back as another value")
        for file in temporary.iterdir():
            give_usual_access(file)
            sync_file(file)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Without torch's remark that there is one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def chosen_tensors(model: MultiTaskModel, patterns: Sequence[str]) -> dict[str, Tensor]:
    """Name -> parameter, or buffer of an encoder (statistics of a batch norm), that a pattern
    names; a tied parameter once.

    Raises ValueError for a pattern that names nothing.
    """
    statistics = {name for name in model.state_dict() if name.startswith("encoders.")}
    found = dict(model.named_parameters())
    found |= {name: b for name, b in model.named_buffers() if name in statistics}
    targets = target_sources(model)
    found = {name: tensor.detach() for name, tensor in found.items() if name not in targets}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ValueError(
                f"--only {pattern}: there is no such weight; names are like "
                f"{', '.join(list(found)[:3])}"
            )
    return {
        name: tensor
        for name, tensor in found.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
