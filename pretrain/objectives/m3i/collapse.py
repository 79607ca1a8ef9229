"""Watches the targets of a momentum network, which may all become the same while losses fall."""

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.objectives.step_count import StepCount

log = logging.getLogger("omnipretrain.collapse")

EVERY_STEPS = 100
LEAST_SHARE = 0.1
"""Of the width: a smaller effective rank is an alarm."""
LEAST_DEVIATION = 0.3
"""A smaller standard deviation of the targets, which have 1 if they have nothing in common, is one
too: what they differ in may be noise, of any rank."""


class CollapseWatch(nn.Module):
    """Measures the effective rank at the first of every EVERY_STEPS steps, and warns.

    Eigenvalues of a C x C matrix would cost as much as the rest of a step if done in each. Count
    and last value are buffers: a resumed run reports what an uninterrupted one does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._count = StepCount()
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("rank", torch.zeros(1))

    def observe(self, measure: Callable[[], Tensor], deviation: Tensor, width: int) -> Tensor:
        """The latest finite effective rank, 0-dim float32, equal on all ranks.

        measure: computes it from what all ranks share; deviation: of the targets, 0-dim; width:
        their channels.
        """
        if self._count.of(self.steps) % EVERY_STEPS == 0 and (rank := measure()).isfinite():
            self.rank.copy_(rank)
            warn_of_collapse(float(rank), float(deviation), width)
        self._count.advance(self.steps)
        return self.rank[0].float()


def warn_of_collapse(rank: float, deviation: float, width: int) -> bool:
    """Log a warning, on rank 0, if targets are nearly all the same; True then. Values that are not
    finite are no collapse.

    rank: effective rank; deviation: standard deviation, mean over `width` channels.
    """
    if not (rank < LEAST_SHARE * width or deviation < LEAST_DEVIATION):
        return False
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.warning(
            "the targets have an effective rank of %.1f of %d channels and a standard deviation of "
            "%.2f: they collapse, and a falling intra or inter loss means nothing; keep "
            "center_targets, raise decorrelation or momentum_start, or lower the learning rate",
            rank,
            width,
            deviation,
        )
    return True
