"""The same images at several sizes in one step, and features that agree over sizes (ResFormer,
arXiv 2212.00776).

Each smaller size learns to predict the features of the next larger one, which teaches only:
SmoothL1(f_i, LayerNorm(f_{i-1})), the norm without parameters and its argument without gradient.
"""

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def at_sizes(pixels: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """`pixels` (B, C, H, W), and bicubic antialiased copies of it of the other `scaled_shapes`."""
    return [pixels] + [
        F.interpolate(pixels, shape, mode="bicubic", antialias=True, align_corners=False)
        for shape in scaled_shapes(*pixels.shape[-2:], sizes)[1:]
    ]


def scaled_shapes(height: int, width: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) of the images as they are, and with a shorter side of each of `sizes` that is
    smaller."""
    side = min(height, width)
    smaller = [size for size in sizes if size < side]
    scaled = [(round(height * size / side), round(width * size / side)) for size in smaller]
    return [(height, width), *scaled]


def scale_consistency(vectors: Sequence[Tensor], counted: Tensor) -> Tensor:
    """Sum over the counted images and over all sizes but the largest of the loss above.

    vectors: (B, D) of each size, the largest first; counted: (B,) bool. Returns 0-dim float32, the
    mean over channels of each term.
    """
    total = vectors[0].new_zeros((), dtype=vectors[0].float().dtype)
    for teacher, student in itertools.pairwise(vectors):
        target = F.layer_norm(teacher.detach().float(), teacher.shape[-1:])
        losses = F.smooth_l1_loss(student.float(), target, reduction="none").mean(-1)
        total = total + (losses * counted).sum()
    return total
