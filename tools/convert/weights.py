"""`tools.convert export-weights`: a run's weights under our names, for another run to start from.

What a run counts (steps of a watch, measured norms) and momentum targets, which begin as copies in
any case, stay behind.
"""

import argparse
from collections.abc import Sequence
from fnmatch import fnmatchcase

from rich.console import Console
from torch import Tensor

from pretrain.engine.zero.momentum_pairs import target_sources
from pretrain.models.multitask import MultiTaskModel
from tools.support.trained import open_run
from tools.support.weight_files import save_tensors


def export(options: argparse.Namespace, console: Console) -> int:
    """Run the command; see `convert_arguments`."""
    run = open_run(options.run_dir, options.weights)
    tensors = chosen_tensors(run.model, options.only)
    save_tensors(tensors, options.out, f"omnipretrain {run.recipe.name}")
    count = sum(tensor.numel() for tensor in tensors.values())
    console.print(f"{options.out}: {len(tensors)} tensors, {count / 1e6:,.1f} M values, of "
                  f"{run.checkpoint}", markup=False, highlight=False, soft_wrap=True)
    return 0


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
            raise ValueError(f"--only {pattern}: there is no such weight; names are like "
                             f"{', '.join(list(found)[:3])}")
    return {
        name: tensor for name, tensor in found.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
