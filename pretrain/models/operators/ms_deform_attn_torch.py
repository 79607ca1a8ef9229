"""Multi-scale deformable attention in plain PyTorch, for any device.

Works through the queries in slices, one point at a time, as DCNv3 does.
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
from pretrain.models.operators.window import sum_type

Sizes = tuple[tuple[int, ...], tuple[int, ...]]


def forward(value: Tensor, locations: Tensor, weights: Tensor, maps: Sizes) -> Tensor:
    """Output (N, Q, heads * D) in the type of `value`; arguments as in `ms_deform_attn`, checked.

    `maps` are the heights and the widths of the maps.
    """
    n, _, heads, depth = value.shape
    table = value.reshape(-1, depth)
    out = value.new_empty(n, locations.shape[1], heads * depth)
    flat_out, flat_locations, flat_weights = out.view(-1, heads, depth), *_flat(locations, weights)
    for part in slices(len(flat_out), heads * depth, value.device):
        total = torch.zeros_like(flat_out[part], dtype=sum_type(value.dtype))
        points = _points(flat_locations, flat_weights, part, locations.shape[1], value, maps)
        weighted_sum(table, points, total)
        flat_out[part] = total
    return out


def backward(
    gradient: Tensor, value: Tensor, locations: Tensor, weights: Tensor, maps: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, each of its own shape and type."""
    _, _, heads, depth = value.shape
    table = value.reshape(-1, depth)
    table_gradient = torch.zeros_like(table, dtype=sum_type(value.dtype))
    of_locations = torch.empty_like(locations, memory_format=torch.contiguous_format)
    of_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    to_locations, to_weights = _flat(of_locations, of_weights)
    flat_gradient, flat_locations, flat_weights = (
        gradient.reshape(-1, heads, depth),
        *_flat(locations, weights),
    )
    points_per_map = weights.shape[-1]
    for part in slices(len(flat_gradient), heads * depth, value.device):
        points = _points(flat_locations, flat_weights, part, locations.shape[1], value, maps)
        upstream = flat_gradient[part].to(table_gradient.dtype)
        results = weighted_sum_gradients(table, points, upstream, table_gradient)
        for index, (by_x, by_y, by_weight) in enumerate(results):
            level = index // points_per_map
            to_locations[part, :, index, 0] = (by_x * maps[1][level]).to(locations.dtype)
            to_locations[part, :, index, 1] = (by_y * maps[0][level]).to(locations.dtype)
            to_weights[part, :, index] = by_weight.to(weights.dtype)
    return table_gradient.view(value.shape).to(value.dtype), of_locations, of_weights


def _flat(locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(N * Q, heads, maps * points, 2) and the same without (x, y)."""
    return locations.flatten(3, 4).flatten(0, 1), weights.flatten(3).flatten(0, 1)


def _points(
    locations: Tensor, weights: Tensor, part: slice, queries: int, value: Tensor, maps: Sizes
) -> Iterator[Points]:
    """The points of the queries `part`, counted over all images; tensors as `_flat` gives them."""
    _, pixels, heads, _ = value.shape
    dtype = sum_type(value.dtype)
    position = torch.arange(part.start, part.stop, device=value.device).unsqueeze(-1)
    head = torch.arange(heads, device=value.device)
    first_row = position // queries * (pixels * heads) + head
    points_per_map = weights.shape[-1] // len(maps[0])
    index = 0
    for height, width in zip(*maps, strict=True):
        for _ in range(points_per_map):
            place = locations[part, :, index].to(dtype)
            yield Points(
                x=place[..., 0] * width - 0.5,
                y=place[..., 1] * height - 0.5,
                weight=weights[part, :, index].to(dtype),
                first_row=first_row,
                height=height,
                width=width,
            )
            index += 1
        first_row = first_row + height * width * heads
