"""From the bytes of pixels to what an encoder reads, on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.models.host_numbers import on_device


def normalise_pixels(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """(images / 255 - mean) / std, computed in float32 and rounded once.

    images: (B, 3, H, W) uint8; mean, std: per channel, in units of the full range.
    Returns (B, 3, H, W) in `dtype`.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, not {images.dtype}: they are normalised here")
    scale = on_device([1 / (255 * s) for s in std], images.device)
    shift = on_device([-m / s for m, s in zip(mean, std, strict=True)], images.device)
    return torch.addcmul(shift[:, None, None], images.float(), scale[:, None, None]).to(dtype)
