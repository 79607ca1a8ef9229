"""The size of the last step of an optimizer of Adam's kind, read from its moments.

Steps of AdamW are about 0.2 to 1 learning rates long (root mean square); those of MT-AdamW grow
with the number of tasks, and a rare task can make single ones many times longer.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain.optim.mt_adamw import MTAdamW

CHUNK = 2**20
"""Elements at a time, 4 MiB: temporary memory does not grow with the tensor."""


def sum_of_squared_steps(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], state: dict[str, Any]
) -> Tensor:
    """Sum over one tensor of (m' / (sqrt(v') + eps))**2 after a step: 0-dim float64, its device.

    Args:
        optimizer: AdamW (torch's or DeepSpeed's) or MTAdamW.
        group: the tensor's parameter group.
        state: the tensor's state.
    """
    first, root = _corrections(optimizer, group, state)
    total = torch.zeros((), dtype=torch.float64, device=state["exp_avg"].device)
    pieces = (state[name].reshape(-1).split(CHUNK) for name in ("exp_avg", "exp_avg_sq"))
    for mean, square in zip(*pieces, strict=True):
        step = square.sqrt().div_(root).add_(group["eps"])
        torch.div(mean, step, out=step)
        total += torch.dot(step, step)
    return total / first**2


def _corrections(optimizer: torch.optim.Optimizer, group: dict, state: dict) -> tuple[float, float]:
    if isinstance(optimizer, MTAdamW):
        return optimizer.corrections(group, state)
    first, second = (1.0 - beta ** float(state["step"]) for beta in group["betas"])
    return first, second**0.5
