"""Convolutions and norms on channels-last maps (B, H, W, C), under the names of InternImage.

The official code wraps a norm in a sequence with a change of layout before or behind it, which
shows in the names: a norm that it feeds channels-first has index 1, one on channels-last data has
index 0. Here nothing changes its layout, and an identity keeps the place.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

NORM_EPS = 1e-6


def layer_norm(channels: int, index: int = 0) -> nn.Sequential:
    """LayerNorm over channels as entry `index` (0 or 1) of a sequence."""
    norm = nn.LayerNorm(channels, eps=NORM_EPS)
    return nn.Sequential(norm) if index == 0 else nn.Sequential(nn.Identity(), norm)


class Conv(nn.Conv2d):
    """Convolution of (B, H, W, C) maps with PyTorch's usual initial values; zero padding."""

    def __init__(
        self,
        channels: int,
        channels_out: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(channels, channels_out, kernel_size, stride, padding, 1, groups, bias)
        bound = (channels // groups * kernel_size**2) ** -0.5
        self.initial_bound = {"weight": bound, "bias": bound}

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, channels). Returns (B, H_out, W_out, channels_out), contiguous."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()

    def flops(self, positions: int) -> int:
        """Multiplications and additions for so many output positions."""
        taps = self.kernel_size[0] * self.kernel_size[1] * self.in_channels // self.groups
        return 2 * positions * taps * self.out_channels


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation of (B, H, W, C) maps over all ranks, in float32.

    Couples the samples of a micro-step: gradients depend on how a batch is divided into
    micro-steps, though not on how a micro-step is divided among ranks.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        # ZeRO-3 builds buffers in the type of its parameters.
        self.running_mean, self.running_var = self.running_mean.float(), self.running_var.float()
        self.initial_value = {"weight": 1.0}
        self.initial_std = {"bias": 0.0}

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x: (B, H, W, C); valid: (B,) bool, False for rows that statistics leave out.

        In training a collective, in backward too. Returns the shape and type of x.
        """
        rows = x.float()
        if self.training:
            mean, variance, count = _statistics(rows, valid)
            if torch.is_grad_enabled():  # not in a first pass whose features are thrown away
                self._follow(mean.detach(), variance.detach(), count)
        else:
            mean, variance = self.running_mean, self.running_var
        scale = self.weight.float() * torch.rsqrt(variance + self.eps)
        return ((rows - mean) * scale + self.bias.float()).to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        self.num_batches_tracked.add_(1)

    def _apply(self, fn, recurse: bool = True):
        """Statistics move with the module, but stay float32 when its parameters are cast."""
        kept = (self.running_mean, self.running_var)
        super()._apply(fn, recurse)
        moved = (
            old.to(new.device)
            for old, new in zip(kept, (self.running_mean, self.running_var), strict=True)
        )
        if not any(tensor.is_meta for tensor in kept):
            self.running_mean, self.running_var = moved
        return self


def _statistics(rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (C,) of all ranks' maps (B, H, W, C), and how many positions they
    have."""
    positions = rows.shape[1] * rows.shape[2]
    weight = rows.new_ones(len(rows)) if valid is None else valid.to(rows.dtype)
    weight = weight[:, None, None, None]
    count = _sum_over_ranks(weight.sum().view(1) * positions).clamp(min=1)
    mean = _sum_over_ranks((rows * weight).sum(dim=(0, 1, 2))) / count
    # Around the mean, in a second pass: a difference of large sums would lose digits.
    variance = _sum_over_ranks(((rows - mean).square() * weight).sum(dim=(0, 1, 2))) / count
    return mean, variance, count


def _sum_over_ranks(values: Tensor) -> Tensor:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    return _SumOverRanks.apply(values)


class _SumOverRanks(torch.autograd.Function):
    """Every rank's loss sees the sum, so the gradient is the sum of what they say about it."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient
