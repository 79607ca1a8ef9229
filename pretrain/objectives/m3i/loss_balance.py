"""Weights of several losses on one encoder, by the gradients that they send into it.

For each loss k the norm g_k of dL_k / dz, z the encoder's output, over the global batch: one more
backward pass through its head, not through the encoder. Then w_k = base_k (mean g) / g_k, with g
smoothed and the factor bounded. Our reading of M3I (arXiv 2211.09807), whose own rule is not known.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.objectives.m3i.loss_balance_settings import (
    BalanceSettings,
)
from pretrain.objectives.step_count import StepCount


class LossBalance(nn.Module):
    """Measured norms, as buffers that checkpoints hold, and the factors that follow from them.

    Args:
        kinds: names of the losses, in the order of the buffer.
        settings: when and how.
    """

    def __init__(self, kinds: tuple[str, ...], settings: BalanceSettings) -> None:
        super().__init__()
        self.kinds, self.settings = kinds, settings
        self._count = StepCount()
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        # The bits of float32 numbers, which a cast of the module to bfloat16 leaves alone.
        self.register_buffer("norm_bits", torch.zeros(len(kinds), dtype=torch.int32))

    def observe(self, losses: Mapping[str, Tensor], shared: Tensor) -> None:
        """Count a step, and measure if one is due. A collective, of the same losses on all ranks.

        losses: this rank's shares by kind; shared: the encoder's output, which they all come from.
        """
        if self._count.of(self.steps) % self.settings.every_steps == 0:
            found = torch.zeros(len(self.kinds), device=shared.device)
            for place, kind in enumerate(self.kinds):
                if kind in losses:
                    (gradient,) = torch.autograd.grad(losses[kind], shared, retain_graph=True)
                    found[place] = gradient.float().square().sum()
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(found)
            self._take_in(found.sqrt())
        self._count.advance(self.steps)

    def _take_in(self, measured: Tensor) -> None:
        """A loss without targets in this batch, whose norm is 0, keeps the norm that it had, and so
        does one whose gradient is not finite, in a step that will be skipped."""
        known, keep = self.norm_bits.view(torch.float32), self.settings.smoothing
        smoothed = torch.where(known > 0, keep * known + (1 - keep) * measured, measured)
        known.copy_(torch.where((measured > 0) & measured.isfinite(), smoothed, known))

    def factors(self) -> dict[str, Tensor]:
        """Kind -> factor, 0-dim float32; 1 for a loss that has not been measured."""
        norms = self.norm_bits.view(torch.float32).clone()
        seen = norms > 0
        mean = norms.sum() / seen.sum().clamp(min=1)
        found = (mean / norms.clamp(min=1e-30)).clamp(*self.settings.limits)
        found = torch.where(seen, found, torch.ones_like(found))
        return dict(zip(self.kinds, found.unbind(), strict=True))
