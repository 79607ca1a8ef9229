"""The DCNv3 module: deformable aggregation between two projections, channels-last.

    mixer = DCNv3(channels=64, groups=4)
    y = mixer(x)                         # (B, H, W, 64) -> (B, H, W, 64)

Parameter names are those of the official code.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.internimage.channels_last import BatchNorm, Conv, layer_norm
from pretrain.models.operators.dcnv3 import dcnv3

Norm = Literal["layer", "batch"]
Activation = Literal["gelu", "relu", "silu"]

_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class DCNv3(nn.Module):
    """Each position gathers P points around it, at places and with weights that it chooses.

    Offsets and weights come from a depth-wise convolution of the input; groups of channels have
    their own. Height and width stay as they are.

    Args:
        channels: of input and output.
        groups: must divide `channels`; 16 or 32 channels a group are fastest.
        kernel_size: odd side of the regular grid that offsets start from.
        dw_kernel_size: odd side of the depth-wise convolution; none = `kernel_size`.
        dilation: distance of the grid's points.
        offset_scale: factor on the grid and on the offsets.
        center_feature_scale: mix the position's own value in, with a learned weight for each group.
        remove_center: leave the middle point of the grid out.
        norm, activation: behind the depth-wise convolution. `batch` couples the samples of a
            micro-step.

    Errors: ValueError for arguments that do not fit together.
    """

    def __init__(
        self,
        channels: int = 64,
        groups: int = 4,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        dilation: int = 1,
        offset_scale: float = 1.0,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        norm: Norm = "layer",
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        dw_kernel_size = dw_kernel_size or kernel_size
        if groups < 1 or channels % groups:
            raise ValueError(f"groups ({groups}) must divide channels ({channels})")
        if not (kernel_size % 2 and dw_kernel_size % 2):
            raise ValueError(
                f"kernel_size ({kernel_size}) and dw_kernel_size ({dw_kernel_size}) must be odd, "
                "or the output would not have the size of the input"
            )
        if remove_center and kernel_size == 1:
            raise ValueError("remove_center takes the only point of kernel_size 1 away")
        if not math.isfinite(offset_scale):
            raise ValueError(f"offset_scale ({offset_scale}) must be a finite number")
        self.channels, self.groups = channels, groups
        self.points = kernel_size**2 - remove_center
        self.geometry = {
            "groups": groups,
            "kernel_size": kernel_size,
            "dilation": dilation,
            "pad": dilation * (kernel_size - 1) // 2,
            "offset_scale": offset_scale,
            "remove_center": remove_center,
        }
        self.center_feature_scale = center_feature_scale
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(groups, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(groups))
            self.initial_std = {
                "center_feature_scale_proj_weight": 0.0,
                "center_feature_scale_proj_bias": 0.0,
            }
        self.dw_conv = nn.Sequential(
            Conv(channels, channels, dw_kernel_size, 1, dw_kernel_size // 2, groups=channels),
            layer_norm(channels, 1)
            if norm == "layer"
            else nn.Sequential(BatchNorm(channels), nn.Identity()),
            _ACTIVATIONS[activation](),
        )
        self.offset = nn.Linear(channels, groups * self.points * 2)
        self.mask = nn.Linear(channels, groups * self.points)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        # At first a mean over the regular grid, between Xavier-uniform projections.
        for linear in (self.offset, self.mask):
            linear.initial_std = {"weight": 0.0}
        for linear in (self.input_proj, self.output_proj):
            linear.initial_bound = {"weight": (3 / channels) ** 0.5}

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, channels). Returns the same shape."""
        value = self.input_proj(x)
        features = self.dw_conv(x)
        offset = self.offset(features)
        mask = self.mask(features)
        mask = mask.unflatten(-1, (self.groups, self.points)).softmax(dim=-1).flatten(-2)
        mixed = dcnv3(value, offset, mask, **self.geometry)
        if self.center_feature_scale:
            share = F.linear(
                features, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
            ).sigmoid()
            share = share.repeat_interleave(self.channels // self.groups, dim=-1)
            mixed = torch.lerp(mixed, value, share)
        return self.output_proj(mixed)

    def flops(self, height: int, width: int) -> int:
        """Multiplications and additions for one map; of the sampling the four corners of a point
        count, not its coordinates."""
        positions, linear = height * width, 2 * self.channels * self.channels
        predicted = 3 * self.groups * self.points + self.groups * self.center_feature_scale
        return (
            self.dw_conv[0].flops(positions)
            + positions * (2 * linear + 2 * self.channels * predicted)
            + self.sampling_flops(height, width)
        )

    def sampling_flops(self, height: int, width: int) -> int:
        """The operator's part of `flops`: four multiply-adds a point and channel."""
        return 8 * self.points * height * width * self.channels
