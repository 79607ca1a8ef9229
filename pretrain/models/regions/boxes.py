"""Geometry of boxes: centre x, centre y, width, height as fractions of the canvas.

The canvas is the padded image, so a box means the same for every map that is made of it. All of
this is float32 (float64 stays): in bfloat16 a centre would be off by up to a third of a pixel of a
map of 160.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.models.host_numbers import on_device

_EDGE = 1e-5
_TEMPERATURE = 10_000
# Sides of the anchors of the finest map; those of each coarser one are twice as long.
_ANCHOR_SIDE = 0.05
# Anchors whose centre or side is closer than this to 0 or 1 propose nothing.
_ANCHOR_MARGIN = 0.01


def exact(values: Tensor) -> Tensor:
    """The values in float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Logits of fractions, which are kept 1e-5 away from 0 and 1."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=_EDGE) / (1 - x).clamp(min=_EDGE))


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) x0, y0, x1, y1 of boxes (..., 4) given by centre and size."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def centred(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size of boxes (..., 4) given by x0, y0, x1, y1."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def intersection(first: Tensor, second: Tensor) -> Tensor:
    """Common area of boxes given by corners, (..., 4) each; leading dimensions broadcast."""
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    return (high - low).clamp(min=0).prod(-1)


def area(boxes: Tensor) -> Tensor:
    """Area of boxes given by corners."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def generalised_iou(first: Tensor, second: Tensor, eps: float = 0.0) -> Tensor:
    """Generalised intersection over union (arXiv 1902.09630), -1 to 1.

    first, second: (..., 4) centre and size; leading dimensions broadcast.
    eps: joins both denominators. Mask DINO has 1e-6 there, which small boxes feel.
    """
    first, second = corners(first), corners(second)
    common = intersection(first, second)
    union = area(first) + area(second) - common
    low = torch.minimum(first[..., :2], second[..., :2])
    high = torch.maximum(first[..., 2:], second[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)
    return common / (union + eps) - (hull - union) / (hull + eps)


def covered(boxes: Tensor, regions: Tensor) -> Tensor:
    """The part of each box's own area that lies in each region of its image: (B, Q, R).

    boxes: (B, Q, 4), regions: (B, R, 4), centre and size; a region without area covers nothing.
    """
    boxes, regions = corners(boxes)[:, :, None], corners(regions)[:, None]
    own = area(boxes).clamp(min=torch.finfo(boxes.dtype).tiny)
    return intersection(boxes, regions) / own


def boxes_of_masks(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes around the pixels of masks, (..., 4) float32 centre and size, and (...) bool: whether
    there is any pixel.

    masks: (..., H, W) bool.
    """
    edges = []
    for line in (masks.any(-2), masks.any(-1)):
        length = line.shape[-1]
        place = torch.arange(length, device=masks.device)
        edges.append(
            (
                torch.where(line, place, length).amin(-1) / length,
                torch.where(line, place + 1, 0).amax(-1) / length,
            )
        )
    (left, right), (top, bottom) = edges
    return centred(torch.stack([left, top, right, bottom], dim=-1)), right > 0


def map_centres(sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """(S, 2) float32: x and y of the centres of all pixels of the maps, row by row.

    sizes: (height, width) of the maps, S pixels together.
    """
    found = []
    for height, width in sizes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        found.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1))
    return torch.cat(found)


def anchors(sizes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """A square around each pixel of the maps: (S, 4) float32, and (S,) bool, whether it may
    propose an object.

    sizes: (height, width) of the maps, the finest first.
    """
    sides = [
        torch.full((height * width, 2), _ANCHOR_SIDE * 2**level, device=device)
        for level, (height, width) in enumerate(sizes)
    ]
    boxes = torch.cat([map_centres(sizes, device), torch.cat(sides)], dim=-1)
    usable = ((boxes > _ANCHOR_MARGIN) & (boxes < 1 - _ANCHOR_MARGIN)).all(-1)
    return boxes, usable


def places_in_image(
    image_sizes: Tensor, canvas: tuple[int, int], sizes: Sequence[tuple[int, int]]
) -> Tensor:
    """(B, S) bool: whether a map's pixel begins in the image, not in its padding.

    At least one of each map does, however small the image.

    image_sizes: (B, 2) height and width in pixels; canvas: height and width with padding.
    """
    device = image_sizes.device
    found = []
    for size in sizes:
        rows, columns = (
            # Whole numbers: a pixel that begins where the padding does is never in the image.
            torch.arange(side, device=device) * length < image_sizes[:, axis : axis + 1] * side
            for axis, (side, length) in enumerate(zip(size, canvas, strict=True))
        )
        found.append((rows[:, :, None] & columns[:, None]).flatten(1))
    return torch.cat(found, dim=1)


def sine_code(values: Tensor, channels: int) -> Tensor:
    """(..., channels) sines and cosines in turn of numbers (...) in radians, even `channels`."""
    pair = torch.arange(channels, device=values.device) // 2
    waves = values[..., None] / _TEMPERATURE ** (2 * pair.to(values.dtype) / channels)
    return torch.stack([waves[..., 0::2].sin(), waves[..., 1::2].cos()], dim=-1).flatten(-2)


def box_code(boxes: Tensor, channels: int) -> Tensor:
    """(..., 4 * channels) positional code of boxes (..., 4): y, x, width, height."""
    y_x_w_h = on_device([1, 0, 2, 3], boxes.device)
    return sine_code(boxes.index_select(-1, y_x_w_h) * (2 * math.pi), channels).flatten(-2)


def map_code(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """(height * width, channels) float32 positional code of a map's pixels: y, then x.

    Rows and columns are counted from 1 and end at 2 pi, as in DETR and Mask DINO.
    """
    y, x = (
        torch.arange(1, side + 1, dtype=torch.float32, device=device) / (side + 1e-6)
        for side in (height, width)
    )
    y, x = (sine_code(values * (2 * math.pi), channels // 2) for values in (y, x))
    grid = (height, width, channels // 2)
    return torch.cat([y[:, None].expand(grid), x[None].expand(grid)], dim=-1).flatten(0, 1)
