"""Masks at a few points instead of at all pixels (PointRend, Mask2Former).

An image has one set of points for all of its objects and layers. A mask's logits are products of
its embedding with the mask features, so features are read at the points once, and no layer makes
whole masks. Points come from the draws of the sample: the same on any number of ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.models.operators.ms_deform_attn import ms_deform_attn
from pretrain.models.sample_draws import SampleDraws


class MaskPoints(NamedTuple):
    """Points of each image: x and y in [0, 1), fractions of the canvas."""

    matching: Tensor
    """(B, P, 2): where masks are compared to find pairs."""
    candidates: Tensor
    """(B, C, 2): of which the loss takes those where a mask is least certain."""
    free: Tensor
    """(B, F, 2): which the loss takes in any case."""
    uncertain: int
    """How many candidates the loss takes."""


def draw_points(
    draws: SampleDraws, points: int = 12_544, oversample: float = 3.0, importance: float = 0.75
) -> MaskPoints:
    """Points for the masks of a batch.

    points: for matching, and for the loss. oversample: candidates, as a multiple of them;
    importance: part of the loss's points that is taken of the candidates.
    """
    uncertain = int(importance * points)
    counts = points, max(uncertain, int(oversample * points)), points - uncertain
    x_y = draws.uniform("mask points", 2 * sum(counts)).T.unflatten(1, (-1, 2))
    return MaskPoints(*x_y.split(counts, dim=1), uncertain)


def features_at(features: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of maps: (B, P, C); zeros outside.

    features: (B, h, w, C); points: (B, P, 2) float32 or float64.
    """
    locations = points[:, :, None, None, None]
    if features.dtype == torch.float64:
        locations = locations.double()
    weights = torch.ones_like(locations[..., 0])
    sizes = [(features.shape[1], features.shape[2])]
    return ms_deform_attn(features.flatten(1, 2)[:, :, None], sizes, locations, weights)


@torch.no_grad()
def masks_at(masks: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of masks of 0 and 1: (T, P) of the points' type; zeros outside.

    masks: (T, H, W) bool or uint8, which are never copied as floats; points: (T, P, 2).
    """
    height, width = masks.shape[1:]
    size = torch.tensor([width, height], dtype=points.dtype, device="cpu").to(
        points.device, non_blocking=True
    )
    place = points * size - 0.5
    low = place.floor()
    part = place - low
    x, y = low.long().unbind(-1)
    flat = masks.flatten(1)
    if not len(masks):
        return points.new_zeros(points.shape[:2])
    found = torch.zeros_like(part[..., 0])
    for right in (0, 1):
        for down in (0, 1):
            column, row = x + right, y + down
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            weight = (part[..., 0] if right else 1 - part[..., 0]) * (
                part[..., 1] if down else 1 - part[..., 1]
            )
            found += flat.gather(1, index).to(weight.dtype) * weight * inside
    return found
