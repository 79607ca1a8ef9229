"""Random erasing: a rectangle of the image becomes noise."""

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from data_pipeline.images.crops import fitting_box
from data_pipeline.settings import Settings


class EraseSettings(Settings):
    """Random erasing in training, after all other changes; the defaults are those of timm."""

    probability: float = Field(default=0.25, ge=0.0, le=1.0)
    """Chance that an image loses a rectangle."""
    area: tuple[float, float] = (0.02, 1 / 3)
    """Range of the rectangle's share of the image."""
    ratio: tuple[float, float] = (0.3, 1 / 0.3)
    """Range of the rectangle's width / height, drawn log-uniformly."""
    fill: Literal["noise", "colour", "mean"] = "noise"
    """noise: Gaussian noise with the data's mean and deviation for each pixel; colour: one such
    draw for the whole rectangle; mean: the mean. All rounded and clipped to 0..255."""

    @model_validator(mode="after")
    def _check(self) -> "EraseSettings":
        low, high = self.area
        if not 0 < low <= high <= 1:
            raise ValueError(f"area: needs 0 < low <= high <= 1, got {list(self.area)}")
        low, high = self.ratio
        if not 0 < low <= high:
            raise ValueError(f"ratio: needs 0 < low <= high, got {list(self.ratio)}")
        return self


def erase(
    image: np.ndarray,
    settings: EraseSettings,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    rng: np.random.Generator,
) -> None:
    """Erase a rectangle of (H, W, 3) uint8 in place, by the settings' chance.

    Args:
        mean, std: of the data per channel, in units of pixel / 255.
    """
    if rng.random() >= settings.probability:
        return
    height, width = image.shape[:2]
    box = fitting_box(width, height, settings.area, settings.ratio, rng)
    if box is None:
        return
    noise: np.ndarray | float = 0.0
    if settings.fill != "mean":
        shape = (box.height, box.width, 3) if settings.fill == "noise" else (3,)
        noise = rng.standard_normal(shape, dtype=np.float32)
    values = 255 * (np.float32(mean) + np.float32(std) * noise)
    erased = image[box.y : box.y + box.height, box.x : box.x + box.width]
    erased[:] = np.clip(np.rint(values), 0, 255)
