"""Multi-scale deformable attention by the C++ kernel for the CPU (ms_deform_attn_cpu.cpp)."""

import torch
from torch import Tensor

Sizes = tuple[tuple[int, ...], tuple[int, ...]]


def forward(value: Tensor, locations: Tensor, weights: Tensor, maps: Sizes) -> Tensor:
    """Output (N, Q, heads * D) in the type of `value`; arguments as in `ms_deform_attn`, checked.

    `maps` are the heights and the widths of the maps.
    """
    return torch.ops.omnipretrain.ms_deform_attn_cpu_forward(
        value.contiguous(), locations.contiguous(), weights.contiguous(), *maps
    )


def backward(
    gradient: Tensor, value: Tensor, locations: Tensor, weights: Tensor, maps: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, each of its own shape and type."""
    return torch.ops.omnipretrain.ms_deform_attn_cpu_backward(
        gradient.contiguous(),
        value.contiguous(),
        locations.contiguous(),
        weights.contiguous(),
        *maps,
    )
