"""How far an optimizer step moved the weights, in units of the learning rate."""

import torch
from torch import Tensor

from pretrain.engine.zero.partitions import list_partitions
from pretrain.optim.update_size import sum_of_squared_steps


@torch.no_grad()
def mean_square_share(engine, device: torch.device) -> Tensor | None:
    """This rank's share of the mean square of the last step (0-dim float64 on `device`).

    Summed over ranks it is the mean over all trained parameters of (step / learning rate)**2,
    weight decay left out; its root is the update RMS. None if the optimizer has no second moment
    to tell it from, or DeepSpeed has put it on disk: the same on all ranks, whatever each of them
    holds. Costs one pass over the moments: for steps that are reported only.
    """
    if getattr(engine.optimizer, "swap_optimizer", False):
        return None
    inner = engine.optimizer.optimizer
    if not all("betas" in group for group in inner.param_groups):
        return None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for partition in list_partitions(engine):
        state = inner.state.get(partition.master, {})
        if "exp_avg_sq" not in state:  # of a partition that no step has touched
            continue
        # Alignment padding adds nothing: its moments are zero.
        squares = sum_of_squared_steps(inner, inner.param_groups[partition.group], state)
        total += squares.to(device)
    return total / _trained_elements(engine)


def _trained_elements(engine) -> int:
    return sum(
        getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad
    )
