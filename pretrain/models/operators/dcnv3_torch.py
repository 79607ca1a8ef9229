"""DCNv3 in plain PyTorch: runs on any device, and is what the kernels are measured against.

Works through the outputs in slices, one kernel point at a time, so that its temporary tensors do
not grow with the kernel; the backward pass computes the samples again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pretrain.models.operators.sampling_torch import (
    Points,
    slices,
    weighted_sum,
    weighted_sum_gradients,
)
from pretrain.models.operators.window import Window, sum_type


def forward(value: Tensor, offset: Tensor, mask: Tensor, window: Window) -> Tensor:
    """Output (N, H_out, W_out, C) in the type of `value`; arguments as in `dcnv3`, checked."""
    n, height, width, channels = value.shape
    groups = window.groups
    table = value.reshape(-1, channels // groups)
    out = value.new_empty(n, *window.output_size(height, width), channels)
    flat_out, flat_offset, flat_mask = out.view(-1, channels), *_flat(offset, mask)
    for part in slices(len(flat_out), channels, value.device):
        total = value.new_zeros(
            (part.stop - part.start, groups, channels // groups), dtype=sum_type(value.dtype)
        )
        points = _points(flat_offset[part], flat_mask[part], part, value, window)
        weighted_sum(table, points, total)
        flat_out[part] = total.view(-1, channels)
    return out


def backward(
    gradient: Tensor, value: Tensor, offset: Tensor, mask: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offset and mask, each of its own shape and type."""
    channels, groups, count = value.shape[-1], window.groups, window.points
    table = value.reshape(-1, channels // groups)
    table_gradient = torch.zeros_like(table, dtype=sum_type(value.dtype))
    offset_gradient = torch.empty_like(offset, memory_format=torch.contiguous_format)
    mask_gradient = torch.empty_like(mask, memory_format=torch.contiguous_format)
    to_offset = offset_gradient.view(-1, groups, count, 2)
    to_mask = mask_gradient.view(-1, groups, count)
    flat_gradient, flat_offset, flat_mask = gradient.reshape(-1, channels), *_flat(offset, mask)
    for part in slices(len(flat_gradient), channels, value.device):
        points = _points(flat_offset[part], flat_mask[part], part, value, window)
        upstream = flat_gradient[part].to(table_gradient.dtype).view(-1, groups, table.shape[1])
        results = weighted_sum_gradients(table, points, upstream, table_gradient)
        for index, (by_x, by_y, by_mask) in enumerate(results):
            to_offset[part, :, index, 0] = (by_x * window.offset_scale).to(offset.dtype)
            to_offset[part, :, index, 1] = (by_y * window.offset_scale).to(offset.dtype)
            to_mask[part, :, index] = by_mask.to(mask.dtype)
    return table_gradient.view(value.shape).to(value.dtype), offset_gradient, mask_gradient


def _flat(offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return offset.reshape(-1, offset.shape[-1]), mask.reshape(-1, mask.shape[-1])


def _points(
    offset: Tensor, mask: Tensor, part: slice, value: Tensor, window: Window
) -> Iterator[Points]:
    """The points of the outputs `part`, of which `offset` (M, G*P*2) and `mask` (M, G*P) are."""
    _, height, width, _ = value.shape
    groups, scale, dtype = window.groups, window.offset_scale, sum_type(value.dtype)
    offset = offset.view(len(offset), groups, window.points, 2)
    mask = mask.view(len(mask), groups, window.points)
    rows, columns = window.output_size(height, width)
    position = torch.arange(part.start, part.stop, device=value.device).unsqueeze(-1)
    center_row, center_column = window.centers()
    origin_y = (position // columns % rows) * window.stride[0] + (center_row - window.pad[0])
    origin_x = (position % columns) * window.stride[1] + (center_column - window.pad[1])
    group = torch.arange(groups, device=value.device)
    first_row = (position // (rows * columns)) * (height * width * groups) + group
    for index, (step_y, step_x) in enumerate(window.steps()):
        yield Points(
            x=origin_x.to(dtype) + scale * (step_x + offset[:, :, index, 0].to(dtype)),
            y=origin_y.to(dtype) + scale * (step_y + offset[:, :, index, 1].to(dtype)),
            weight=mask[:, :, index].to(dtype),
            first_row=first_row,
            height=height,
            width=width,
        )
