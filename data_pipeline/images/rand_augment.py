"""RandAugment: a few operations per image, drawn from fifteen, at one magnitude.

The operations, their ranges and the meaning of the magnitude are those of timm's
`rand-mM-nN-mstdS-inc1` (0 leaves almost everything as it is, 10 is the most), which InternImage is
trained with. Geometry is bicubic and fills with the mean colour.
"""

from collections.abc import Callable

import cv2
import numpy as np
from pydantic import Field

from data_pipeline.images.colours import (
    apply_levels,
    saturate,
    scale_brightness,
    scale_contrast,
    solarize,
)
from data_pipeline.images.warps import Affine, inverse
from data_pipeline.settings import Settings

MOST = 10.0
"""Largest magnitude."""

# Ranges at magnitude 10.
_MOST_DEGREES = 30.0
_MOST_SHEAR = 0.3
_MOST_SHIFT = 0.45  # of the image's side
_MOST_ENHANCE = 0.9
_MOST_SOLARIZE_ADD = 110.0
_POSTERIZE_BITS = 4  # kept at magnitude 0; one is kept at the most
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13

_LEVELS = np.arange(256)


class RandAugmentSettings(Settings):
    """RandAugment in training, timm's increasing form; the defaults are rand-m9-mstd0.5-inc1."""

    operations: int = Field(default=2, ge=1)
    """Operations per image, drawn one after the other with replacement, from fifteen."""
    magnitude: float = Field(default=9.0, ge=0.0, le=MOST)
    """Strength, 0 to 10."""
    magnitude_std: float = Field(default=0.5, ge=0.0)
    """Standard deviation of the strength, which is drawn anew for each operation."""
    probability: float = Field(default=0.5, ge=0.0, le=1.0)
    """Chance that a drawn operation is carried out."""
    geometry: bool = True
    """Whether the five operations that move pixels take part (rotation, shear, translation); false
    draws from the ten others. Boxes and masks follow them; a second view needs false."""


def rand_augment(
    image: np.ndarray,
    settings: RandAugmentSettings,
    fill: tuple[int, int, int],
    rng: np.random.Generator,
) -> tuple[Affine, ...]:
    """Change (H, W, 3) uint8 in place; `fill` is the colour outside of the image.

    Returns: how pixels were moved, operation after operation; without those that leave them.
    """
    warps = []
    names = NAMES if settings.geometry else COLOUR_NAMES
    draws = rng.random((settings.operations, 3)).tolist()
    deviations = rng.standard_normal(settings.operations).tolist()
    for (choice, carried_out, side), deviation in zip(draws, deviations, strict=True):
        if carried_out >= settings.probability:
            continue
        magnitude = settings.magnitude + settings.magnitude_std * deviation
        share = min(max(magnitude, 0.0), MOST) / MOST
        name = names[int(choice * len(names))]
        warps.append(augment(image, name, share, -1 if side < 0.5 else 1, fill))
    return tuple(warp for warp in warps if warp is not None)


def augment(
    image: np.ndarray, name: str, share: float, sign: int, fill: tuple[int, int, int]
) -> Affine | None:
    """Carry out one operation on (H, W, 3) uint8, in place.

    Args:
        name: one of `NAMES`; share: strength from 0 to 1; sign: -1 or 1, the direction of the
            operations that have one; fill: colour outside of the image.

    Returns: where it moved pixels; None if it is about colours.
    """
    if name in _COLOURS:
        _COLOURS[name](image, share, sign)
        return None
    matrix = _GEOMETRY[name](share * sign, *image.shape[:2])
    image[:] = _warp(image, matrix, fill)
    return inverse(matrix)


def auto_contrast(image: np.ndarray) -> None:
    """Stretch each channel so that its values reach from 0 to 255; in place."""
    used = [np.flatnonzero(counts) for counts in _histograms(image)]
    low, high = (np.array([levels[end] for levels in used], dtype=float) for end in (0, -1))
    flat = high <= low
    scale = np.where(flat, 1.0, 255 / np.where(flat, 1.0, high - low))
    table = _LEVELS[:, None] * scale + np.where(flat, 0.0, -low * scale)
    apply_levels(image, np.floor(table))


def equalize(image: np.ndarray) -> None:
    """Flatten each channel's histogram; in place."""
    table = np.empty((256, 3))
    for channel, counts in enumerate(_histograms(image)):
        used = counts[counts > 0]
        step = (counts.sum() - used[-1]) // 255
        if used.size <= 1 or step == 0:
            table[:, channel] = _LEVELS
        else:
            before = np.cumsum(counts) - counts
            table[:, channel] = (before + step // 2) // step
    apply_levels(image, table)


def sharpen(image: np.ndarray, factor: float) -> None:
    """Multiply the distance from the smoothed image, whose border stays as it is; in place."""
    # Saturated arithmetic, so that the sum is rounded and clipped once.
    smooth = cv2.filter2D(image, -1, _SMOOTH)
    inner = (slice(1, -1), slice(1, -1))
    image[inner] = cv2.addWeighted(image, factor, smooth, 1 - factor, 0)[inner]


def _histograms(image: np.ndarray) -> np.ndarray:
    """(3, 256) int64: how often each channel has each value."""
    counts = [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(3)]
    return np.stack(counts).astype(np.int64)


def _posterize(image: np.ndarray, share: float) -> None:
    kept = max(_POSTERIZE_BITS - int(share * _POSTERIZE_BITS), 1)  # without any all is black
    lost = 8 - kept
    apply_levels(image, _LEVELS >> lost << lost)


def _solarize_add(image: np.ndarray, share: float) -> None:
    added = int(share * _MOST_SOLARIZE_ADD)
    apply_levels(image, np.where(_LEVELS < 128, _LEVELS + added, _LEVELS))


def _factor(share: float, sign: int) -> float:
    return max(1 + sign * share * _MOST_ENHANCE, 0.1)


_COLOURS: dict[str, Callable[[np.ndarray, float, int], None]] = {
    "auto_contrast": lambda image, share, sign: auto_contrast(image),
    "equalize": lambda image, share, sign: equalize(image),
    "invert": lambda image, share, sign: apply_levels(image, 255 - _LEVELS),
    "posterize": lambda image, share, sign: _posterize(image, share),
    "solarize": lambda image, share, sign: solarize(image, 256 - int(share * 256)),
    "solarize_add": lambda image, share, sign: _solarize_add(image, share),
    "color": lambda image, share, sign: saturate(image, _factor(share, sign)),
    "contrast": lambda image, share, sign: scale_contrast(image, _factor(share, sign)),
    "brightness": lambda image, share, sign: scale_brightness(image, _factor(share, sign)),
    "sharpness": lambda image, share, sign: sharpen(image, _factor(share, sign)),
}

# (signed share, height, width) -> 2 x 3 matrix from output to input coordinates in pixels, where
# the image covers 0..width and 0..height.


def _rotation(share: float, height: int, width: int) -> np.ndarray:
    angle = np.deg2rad(share * _MOST_DEGREES)  # counter-clockwise about the centre
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.array([width / 2, height / 2])
    return np.column_stack([turn, centre - turn @ centre])


_GEOMETRY: dict[str, Callable[[float, int, int], np.ndarray]] = {
    "rotate": _rotation,
    "shear_x": lambda share, h, w: np.array([[1, share * _MOST_SHEAR, 0], [0, 1, 0]]),
    "shear_y": lambda share, h, w: np.array([[1, 0, 0], [share * _MOST_SHEAR, 1, 0]]),
    "translate_x": lambda share, h, w: np.array([[1, 0, share * _MOST_SHIFT * w], [0, 1, 0]]),
    "translate_y": lambda share, h, w: np.array([[1, 0, 0], [0, 1, share * _MOST_SHIFT * h]]),
}

COLOUR_NAMES = tuple(_COLOURS)
"""Operations that leave every pixel in its place."""
NAMES = (*COLOUR_NAMES, *_GEOMETRY)
"""All operations."""


def _warp(image: np.ndarray, matrix: np.ndarray, fill: tuple[int, int, int]) -> np.ndarray:
    matrix = matrix.astype(float)
    # OpenCV counts from the centre of the first pixel, not from its edge.
    matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5
    return cv2.warpAffine(
        image,
        matrix,
        (image.shape[1], image.shape[0]),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )
