"""Watches the targets of a momentum network, which may all become the same while losses fall."""

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

log = logging.getLogger("omnipretrain.collapse")

EVERY_STEPS = 100
LEAST_SHARE = 0.1
"""Of the width: a smaller effective rank is an alarm."""


class CollapseWatch(nn.Module):
    """Measures the effective rank at the first of every EVERY_STEPS steps, and warns.

    Eigenvalues of a C x C matrix would cost as much as the rest of a step if done in each. Count
    and last value are buffers: a resumed run reports what an uninterrupted one does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("rank", torch.zeros(1))

    def observe(self, measure: Callable[[], Tensor], width: int) -> Tensor:
        """The latest effective rank, 0-dim float32, equal on all ranks.

        measure: computes it from what all ranks share; width: channels of the targets.
        """
        if int(self.steps) % EVERY_STEPS == 0:
            self.rank.copy_(measure())
            warn_of_collapse(float(self.rank), width)
        self.steps += 1
        return self.rank[0].float()


def warn_of_collapse(rank: float, width: int) -> bool:
    """Log a warning, on rank 0, if an effective rank is below a tenth of the width; True then."""
    if rank >= LEAST_SHARE * width:
        return False
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.warning(
            "the targets have an effective rank of %.1f of %d channels: they collapse, and a "
            "falling intra or inter loss means nothing; raise objective.decorrelation or "
            "momentum_start, or lower the learning rate", rank, width,
        )
    return True
