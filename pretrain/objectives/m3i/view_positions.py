"""Where the cells of one view lie in another view of the same image, and codes of such places.

The geometry of SiameseIM (arXiv 2206.01204, section 3.2), from the crops that a batch describes
(`data_pipeline.images.views`): a cell of the target goes back to the upright image, and from there
into the input's grid. For two equal views that gives every cell its own place, and scale 1.
"""

import math

import torch
from torch import Tensor

_BASE = 10000.0
_SCALE_GAIN = 10.0
"""Of the logarithm of scales, which would else be small beside rows and columns."""


def relative_positions(
    crops: Tensor, flips: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Places of target cells in the input's grid.

    crops: (B, 2, 4) float64, x0 y0 x1 y1 of the input and of the target in pixels of the upright
        image; flips: (B, 2) bool, mirrored after cropping; grid: rows and columns of both.

    Returns positions (B, rows * columns, 2) float64: row and column of each target cell's centre,
    in units of the input's cells, the centre of its first one at 0; and scales (B, 2) float64:
    height and width of the target's crop over those of the input's.
    """
    origins, sizes = crops[..., :2], crops[..., 2:] - crops[..., :2]
    places = []
    for axis, count in ((1, grid[0]), (0, grid[1])):  # rows lie along y
        centres = (torch.arange(count, device=crops.device, dtype=crops.dtype) + 0.5) / count
        at = centres.expand(len(crops), count)
        mirrored = flips if axis == 0 else torch.zeros_like(flips)
        at = torch.where(mirrored[:, 1:], 1 - at, at)
        at = origins[:, 1, axis, None] + at * sizes[:, 1, axis, None]
        at = (at - origins[:, 0, axis, None]) / sizes[:, 0, axis, None]
        at = torch.where(mirrored[:, :1], 1 - at, at)
        places.append(at * count - 0.5)
    rows, columns = torch.broadcast_tensors(places[0][:, :, None], places[1][:, None, :])
    scales = sizes[:, 1] / sizes[:, 0]
    return torch.stack([rows, columns], dim=-1).flatten(1, 2), scales.flip(-1)


def sine_code(values: Tensor, width: int) -> Tensor:
    """Sines and cosines of values (...): (..., width) float32, at frequencies 10000^(-k / (width /
    2)), k = 0 .. width / 2 - 1; width even."""
    count = width // 2
    steps = torch.arange(count, device=values.device, dtype=torch.float64)
    angles = values.double()[..., None] * torch.exp(steps * (-math.log(_BASE) / count))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def grid_code(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """The fixed two-dimensional code of every cell of a grid: (rows * columns, width) float32."""
    rows, columns = (torch.arange(count, device=device) for count in grid)
    places = torch.cartesian_prod(rows, columns)
    return sine_code(places, width // 2).flatten(1)


def target_code(positions: Tensor, scales: Tensor, width: int) -> Tensor:
    """What the decoder is told of each target cell: (B, N, 2 * width) float32.

    positions, scales: as from `relative_positions`. The first half is what `grid_code` gives to a
    cell at that place, the second one is of 10 ln(scale), height and width.
    """
    places = sine_code(positions, width // 2).flatten(2)
    sizes = sine_code(_SCALE_GAIN * scales.log(), width // 2).flatten(1)
    return torch.cat([places, sizes[:, None].expand_as(places)], dim=-1)
