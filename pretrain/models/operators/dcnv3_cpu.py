"""DCNv3 by the C++ kernel for the CPU (dcnv3_cpu.cpp)."""

import functools

import torch
from torch import Tensor

from pretrain.models.operators.window import Window


def forward(value: Tensor, offset: Tensor, mask: Tensor, window: Window) -> Tensor:
    """Output (N, H_out, W_out, C) in the type of `value`; arguments as in `dcnv3`, checked."""
    return torch.ops.omnipretrain.dcnv3_cpu_forward(
        value.contiguous(),
        offset.contiguous(),
        mask.contiguous(),
        *_geometry(window, value.shape[1], value.shape[2]),
    )


def backward(
    gradient: Tensor, value: Tensor, offset: Tensor, mask: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offset and mask, each of its own shape and type."""
    return torch.ops.omnipretrain.dcnv3_cpu_backward(
        gradient.contiguous(),
        value.contiguous(),
        offset.contiguous(),
        mask.contiguous(),
        *_geometry(window, value.shape[1], value.shape[2]),
    )


@functools.lru_cache
def _geometry(window: Window, height: int, width: int) -> tuple:
    steps_y, steps_x = zip(*window.steps(), strict=True)
    origin = [center - pad for center, pad in zip(window.centers(), window.pad, strict=True)]
    return (
        window.output_size(height, width),
        steps_y,
        steps_x,
        window.stride,
        origin,
        window.groups,
        window.offset_scale,
    )
