"""Images moved, turned and zoomed, to see whether a model says the same of them (STM-Evaluation).

Where no image is, pixels are 0 after normalisation: the mean colour.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.rng import sample_rng

DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
"""(down, right), of which one is drawn for each image."""
MOVES = ("translation", "rotation", "scale")


def amounts(move: str, size: int) -> list[float]:
    """Of translation in pixels (0 to 2/7 of the side, 64 of 224, in 16 steps), of rotation in
    degrees (0 to 90 by 5), of scale as the side of what is seen over the image's (0.2 to 2)."""
    if move == "translation":
        return [size * 2 / 7 * step / 16 for step in range(17)]
    if move == "rotation":
        return [float(degrees) for degrees in range(0, 91, 5)]
    return sorted([*(0.2 + 0.125 * step for step in range(15)), 1.0, 2.0])


def still(move: str) -> float:
    """The amount that leaves images alone."""
    return 1.0 if move == "scale" else 0.0


def directions(rows: Sequence[int], seed: int = 0) -> list[tuple[int, int]]:
    """One of the eight for each row of a data set, the same in every evaluation."""
    drawn = (sample_rng(seed, "invariance", row, "direction") for row in rows)
    return [DIRECTIONS[int(rng.integers(len(DIRECTIONS)))] for rng in drawn]


def moved(pixels: Tensor, move: str, amount: float, ways: Sequence[tuple[int, int]]) -> Tensor:
    """pixels: (B, 3, H, W), normalised; ways: B pairs (down, right), for translation; the sign of
    the first that is not 0 says which way an image turns."""
    if amount == still(move):
        return pixels
    height, width = pixels.shape[-2:]
    theta = torch.zeros(len(pixels), 2, 3, dtype=pixels.dtype)
    for matrix, (down, right) in zip(theta, ways, strict=True):
        if move == "translation":
            # Output (x, y) is read at (x - right * amount, y - down * amount).
            shift = (-2 * right * amount / width, -2 * down * amount / height)
            matrix[:] = torch.tensor([[1, 0, shift[0]], [0, 1, shift[1]]])
        elif move == "rotation":
            angle = math.radians(amount) * (1 if (down or right) > 0 else -1)
            cos, sin = math.cos(angle), math.sin(angle)
            ratio = height / width
            matrix[:] = torch.tensor([[cos, -sin * ratio, 0], [sin / ratio, cos, 0]])
        else:
            matrix[:] = torch.tensor([[amount, 0, 0], [0, amount, 0]])
    grid = F.affine_grid(theta.to(pixels.device), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="zeros", align_corners=False)
