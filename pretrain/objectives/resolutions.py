"""The same images at several sizes in one step, and features that agree over sizes (ResFormer,
arXiv 2212.00776).

Each smaller size learns to predict the features of the next larger one, which teaches only:
SmoothL1(f_i, LayerNorm(f_{i-1})), the norm without parameters and its argument without gradient.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def resized(pixels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bicubic antialiased copy of `pixels` (B, C, H, W) of that height and width, computed in
    float32: CPUs have no such operator for bfloat16."""
    wide = pixels.float()
    copy = F.interpolate(wide, shape, mode="bicubic", antialias=True, align_corners=False)
    return copy.to(pixels.dtype)


def scaled_shapes(height: int, width: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) of the images as they are, and with a shorter side of each of `sizes`.

    Images are not enlarged: equally many shapes, and so passes, whatever a rank's images measure.
    """
    side = min(height, width)
    smaller = [min(size, side) for size in sizes]
    scaled = [(round(height * size / side), round(width * size / side)) for size in smaller]
    return [(height, width), *scaled]


def scale_consistency(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Sum over the counted images of the loss above.

    student, teacher: (B, D), vectors of one size and of the next larger one; counted: (B,) bool.
    Returns 0-dim float32, of which the teacher gets no gradient; the mean over channels.
    """
    target = F.layer_norm(teacher.detach().float(), teacher.shape[-1:])
    losses = F.smooth_l1_loss(student.float(), target, reduction="none").mean(-1)
    return (losses * counted).sum()
