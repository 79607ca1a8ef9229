"""Changes of colour and sharpness: settings, draws, and the operations on uint8 images.

Each operation rounds and clips to 0..255, as if it stood alone. Grey is 0.299 R + 0.587 G +
0.114 B throughout.
"""

from typing import NamedTuple

import cv2
import numpy as np
from pydantic import Field, model_validator

from data_pipeline.settings import Settings

GREY = np.array([[0.299, 0.587, 0.114]], dtype=np.float32)
SOLARIZE_THRESHOLD = 128
# Filters of DeiT III: one of greyscale, solarisation and blur, each as likely.
_THREE = 3


class ColourSettings(Settings):
    """Changes of colour in training, applied in the order of the fields."""

    brightness: float = Field(default=0.0, ge=0.0)
    """Colour jitter in training: brightness is multiplied by a draw from 1 +- this."""
    contrast: float = Field(default=0.0, ge=0.0)
    """Colour jitter in training: distance from the mean grey, multiplied by 1 +- this."""
    saturation: float = Field(default=0.0, ge=0.0)
    """Colour jitter in training: distance from each pixel's grey, multiplied by 1 +- this."""
    hue: float = Field(default=0.0, ge=0.0, le=0.5)
    """Colour jitter in training: hue is turned by a draw from +- this, in full turns."""
    jitter_probability: float = Field(default=1.0, ge=0.0, le=1.0)
    """Chance that an image gets the colour jitter (brightness, contrast, saturation and hue)."""
    grayscale_probability: float = Field(default=0.0, ge=0.0, le=1.0)
    """Chance that an image loses its colour in training."""
    blur_probability: float = Field(default=0.0, ge=0.0, le=1.0)
    """Chance of a Gaussian blur in training."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation in output pixels."""
    solarize_probability: float = Field(default=0.0, ge=0.0, le=1.0)
    """Chance in training that values of 128 and above are inverted."""
    three_augment: bool = False
    """Each image of training gets one of greyscale, solarisation and blur, as in DeiT III; in
    place of their three probabilities."""

    @model_validator(mode="after")
    def _colours_fit(self) -> "ColourSettings":
        low, high = self.blur_sigma
        if not 0 < low <= high:
            raise ValueError(f"blur_sigma: needs 0 < low <= high, got {list(self.blur_sigma)}")
        single = ("grayscale_probability", "blur_probability", "solarize_probability")
        for name in single:
            if self.three_augment and getattr(self, name):
                raise ValueError(
                    f"three_augment chooses between greyscale, blur and solarisation by itself: "
                    f"remove {name}={getattr(self, name):g}, or three_augment"
                )
        return self


class Colours(NamedTuple):
    """What is done to the colours of one image. The defaults leave it as it is."""

    brightness: float = 1.0
    """Factor."""
    contrast: float = 1.0
    """Factor."""
    saturation: float = 1.0
    """Factor."""
    hue: float = 0.0
    """Full turns."""
    grayscale: bool = False
    blur: float = 0.0
    """Standard deviation in pixels; 0: none."""
    solarize: bool = False


def draw_colours(settings: ColourSettings, jitter: np.ndarray, others: np.ndarray) -> Colours:
    """Turn (3,) and (7,) draws from [0, 1) into what the settings make of them."""
    spans = (settings.brightness, settings.contrast, settings.saturation)
    factors = [
        max(1 + span * (2 * draw - 1), 0.0)
        for span, draw in zip(spans, jitter.tolist(), strict=True)
    ]
    hue, jitters, grey, blur, sigma, solarize, choice = others.tolist()
    if jitters >= settings.jitter_probability:
        factors, hue = [1.0, 1.0, 1.0], 0.5
    chosen = [
        grey < settings.grayscale_probability,
        blur < settings.blur_probability,
        solarize < settings.solarize_probability,
    ]
    if settings.three_augment:
        chosen = [int(choice * _THREE) == place for place in range(_THREE)]
    low, high = settings.blur_sigma
    return Colours(
        *factors,
        hue=settings.hue * (2 * hue - 1),
        grayscale=chosen[0],
        blur=low + sigma * (high - low) if chosen[1] else 0.0,
        solarize=chosen[2],
    )


def apply_colours(image: np.ndarray, colours: Colours) -> None:
    """Change (H, W, 3) uint8 in place, in the order of the fields."""
    color_jitter(image, colours.brightness, colours.contrast, colours.saturation)
    if colours.hue:
        turn_hue(image, colours.hue)
    if colours.grayscale:
        saturate(image, 0.0)
    if colours.blur:
        cv2.GaussianBlur(image, (0, 0), colours.blur, dst=image)
    if colours.solarize:
        solarize(image, SOLARIZE_THRESHOLD)


def color_jitter(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> None:
    """Scale brightness, then contrast about the mean grey, then saturation; in place, uint8."""
    if brightness != 1:
        scale_brightness(image, brightness)
    if contrast != 1:
        scale_contrast(image, contrast)
    if saturation != 1:
        saturate(image, saturation)


def scale_brightness(image: np.ndarray, factor: float) -> None:
    """Multiply all values; in place, uint8."""
    apply_levels(image, _LEVELS * factor)


def scale_contrast(image: np.ndarray, factor: float) -> None:
    """Multiply the distance from the mean grey; in place, uint8."""
    mean = float(np.dot(GREY[0], cv2.mean(image)[:3]))
    apply_levels(image, mean + (_LEVELS - mean) * factor)


def saturate(image: np.ndarray, factor: float) -> None:
    """Multiply the distance from each pixel's grey, 0 for greyscale; in place, uint8."""
    cv2.transform(image, factor * np.eye(3, dtype=np.float32) + (1 - factor) * GREY, dst=image)


def turn_hue(image: np.ndarray, turns: float) -> None:
    """Turn the hue by a share of the full circle, in steps of 1 / 256; in place, uint8."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[:, :, 0] += np.uint8(round(turns * 256) % 256)
    cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=image)


def solarize(image: np.ndarray, threshold: int) -> None:
    """Invert values from `threshold` on; in place, uint8."""
    apply_levels(image, np.where(threshold <= _LEVELS, 255 - _LEVELS, _LEVELS))


def apply_levels(image: np.ndarray, table: np.ndarray) -> None:
    """Replace each value v by table[v], rounded and clipped to 0..255; in place, uint8.

    Args:
        table: (256,) for all channels, or (256, 3).
    """
    table = np.clip(np.rint(table), 0, 255).astype(np.uint8)
    cv2.LUT(image, table if table.ndim == 1 else table[:, None], dst=image)


_LEVELS = np.arange(256, dtype=np.float64)
