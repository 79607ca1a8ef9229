"""Mixes neighbours of a micro-batch on the device, as the data drew it
(data_pipeline.images.mixing)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from data_pipeline.samples.labels import NO_LABEL
from pretrain.models.host_numbers import on_device


def mix_pairs(pixels: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mix each image with its partner, the other of the rows 2i and 2i + 1.

    A pair of which one has no label, or is padding, stays as it is.

    Args:
        pixels: (B, C, H, W) floating point, B even.
        batch: labels (B,) int64; mix_share (B,), mix_box (B, 4), see
        `data_pipeline.images.mixing.Mix`.

    Returns:
        (B, C, H, W) as `pixels`, and (B,) float32: the partner's part of each image, which is the
        weight of its label. Boxes are rounded to whole pixels first, so that it is exact.
    """
    labels = batch["labels"]
    usable = ((labels != NO_LABEL) & (partners(labels) != NO_LABEL)).float()
    height, width = pixels.shape[-2:]
    share = batch["mix_share"][:, None, None] + _inside(batch["mix_box"], height, width)
    share = share * usable[:, None, None]
    weights = share.mean(dim=(1, 2))
    return torch.lerp(pixels, partners(pixels), share[:, None].to(pixels.dtype)), weights


def partners(rows: Tensor) -> Tensor:
    """`rows` with the rows 2i and 2i + 1 exchanged."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W) float32: 1 inside of each box, (B, 4) as shares of height and width."""
    scale = on_device([height, width, height, width], boxes.device)
    top, left, bottom, right = (boxes * scale).round().unbind(1)
    y = torch.arange(height, device=boxes.device)
    x = torch.arange(width, device=boxes.device)
    rows = (y >= top[:, None]) & (y < bottom[:, None])
    columns = (x >= left[:, None]) & (x < right[:, None])
    return (rows[:, :, None] & columns[:, None, :]).float()
