"""Weighted sums of bilinear samples in plain PyTorch: what the deformable operators share.

A map of values is a table of rows with D channels; pixel (y, x) of a map has the row
`first_row + (y * width + x) * groups`. Corners outside the map are zero, and so is a point that
lies a whole pixel or more outside.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of a temporary tensor: on a CPU it should stay in the cache, a GPU wants long launches.
_SLICE_ELEMENTS = {"cpu": 2**17}
_SLICE_ELEMENTS_ELSEWHERE = 2**23


class Points(NamedTuple):
    """One sampling point for each of M positions and G groups, in pixels of their map."""

    x: Tensor
    """(M, G), float32 or float64; 0 is the centre of the first pixel."""
    y: Tensor
    weight: Tensor
    first_row: Tensor
    """(M, G) int64: row of the map's first pixel."""
    height: int
    width: int


class _Axis(NamedTuple):
    """Two neighbouring pixels along an axis, each (index, weight, derivative of the weight)."""

    low: tuple[Tensor, Tensor, Tensor]
    high: tuple[Tensor, Tensor, Tensor]


def slices(positions: int, channels: int, device: torch.device) -> Iterator[slice]:
    """Divide positions so that one activation of `channels` of each slice is of bounded size."""
    limit = _SLICE_ELEMENTS.get(device.type, _SLICE_ELEMENTS_ELSEWHERE)
    step = max(1, limit // max(channels, 1))
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))


def weighted_sum(table: Tensor, points: Iterable[Points], total: Tensor) -> None:
    """Add weight times sample, for all points, to `total` (M, G, D); `table` is (rows, D)."""
    for point in points:
        for rows, weight, _, _ in _corners(point):
            values = table.index_select(0, rows.flatten()).view(total.shape)
            total.addcmul_(values.to(total.dtype), (point.weight * weight).unsqueeze(-1))


def weighted_sum_gradients(
    table: Tensor, points: Iterable[Points], gradient: Tensor, table_gradient: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield for each point the gradients (M, G) of its x, y and weight.

    `gradient` (M, G, D) is that of the sum. The table's is added to `table_gradient` (rows, D).
    Both have the type that sums are taken in.
    """
    flat = gradient.reshape(-1, gradient.shape[-1])
    for point in points:
        along_x, along_y, along_weight = (torch.zeros_like(point.x) for _ in range(3))
        for rows, weight, by_x, by_y in _corners(point):
            index = rows.flatten()
            values = table.index_select(0, index).to(gradient.dtype)
            product = (values * flat).sum(-1).view(point.x.shape)
            along_weight.addcmul_(product, weight)
            along_x.addcmul_(product, by_x)
            along_y.addcmul_(product, by_y)
            share = flat * (point.weight * weight).reshape(-1, 1)
            table_gradient.scatter_add_(0, index.unsqueeze(-1).expand_as(share), share)
        yield along_x * point.weight, along_y * point.weight, along_weight


def _corners(point: Points) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Four times (rows, weight, its derivatives by x and by y), each (M, G)."""
    near = (point.x > -1) & (point.x < point.width) & (point.y > -1) & (point.y < point.height)
    groups = point.x.shape[-1]
    for row, row_weight, row_slope in _neighbours(point.y, point.height, near):
        for column, column_weight, column_slope in _neighbours(point.x, point.width, near):
            rows = point.first_row + (row * point.width + column) * groups
            yield (
                rows,
                row_weight * column_weight,
                row_weight * column_slope,
                row_slope * column_weight,
            )


def _neighbours(coordinate: Tensor, size: int, near: Tensor) -> _Axis:
    # A distant or non-finite coordinate would overflow as an index; its weight is zero anyway.
    coordinate = torch.where(near, coordinate, 0)
    low = coordinate.floor()
    fraction = coordinate - low
    low = low.long()
    low_inside = (near & (low >= 0)).to(coordinate.dtype)
    high_inside = (near & (low < size - 1)).to(coordinate.dtype)
    return _Axis(
        (low.clamp(min=0), (1 - fraction) * low_inside, -low_inside),
        ((low + 1).clamp(max=size - 1), fraction * high_inside, high_inside),
    )
