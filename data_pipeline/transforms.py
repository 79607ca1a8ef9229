"""Image settings and the transform that turns encoded bytes into one uint8 image.

Every random choice comes from the generator that is passed in, as draws from [0, 1): the same
pixels for the same generator in any process, with any number of threads.
"""

import math
from typing import Literal

import cv2
import numpy as np
import torch
from pydantic import Field, model_validator

from data_pipeline.decode import (
    DecodeError,
    ImageHeader,
    Scratch,
    decode,
    largest_factor,
    read_header,
)
from data_pipeline.settings import Settings
from data_pipeline.timing import StageClock

# Statistics of the CLIP image encoders, in units of the full range (pixel / 255).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_resize_into = torch.ops.aten._upsample_bicubic2d_aa.out


class ImageSettings(Settings):
    """How an encoded image becomes a uint8 array; normalisation happens later, on the device."""

    size: int = Field(default=224, ge=1)
    """Output height and width in pixels; the length of the shorter side in mode keep_aspect."""
    mode: Literal["random_resized_crop", "center_crop", "keep_aspect"] = "random_resized_crop"
    """random_resized_crop draws a box per sample; center_crop resizes the shorter side and cuts
    the middle; keep_aspect resizes without cutting (images differ in size: micro-batches of 1)."""
    max_size: int | None = Field(default=None, ge=1)
    """Bound in pixels on the longer side; mode keep_aspect only."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's share of the image area; mode random_resized_crop."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height, drawn log-uniformly; mode random_resized_crop."""
    flip_probability: float = Field(default=0.0, ge=0.0, le=1.0)
    """Chance of a left-right flip in training. 0 by default: captions may say left and right."""
    brightness: float = Field(default=0.0, ge=0.0)
    """Colour jitter in training: brightness is multiplied by a draw from 1 +- this."""
    contrast: float = Field(default=0.0, ge=0.0)
    """Colour jitter in training: distance from the mean grey, multiplied by 1 +- this."""
    saturation: float = Field(default=0.0, ge=0.0)
    """Colour jitter in training: distance from each pixel's grey, multiplied by 1 +- this."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Mean per channel that the device subtracts, in units of pixel / 255 (default: CLIP)."""
    std: tuple[float, float, float] = CLIP_STD
    """Standard deviation per channel that the device divides by (default: CLIP)."""
    scaled_decode_margin: float | None = Field(default=2.0, ge=1.0)
    """JPEGs are decoded at 1/2, 1/4 or 1/8 when the reduced crop still measures this multiple of
    `size`; none: always at full size. Applies to mode random_resized_crop only."""
    max_pixels: int = Field(default=89_000_000, ge=1)
    """Larger images are refused before they are decoded, as bad samples."""

    @model_validator(mode="after")
    def _check(self) -> "ImageSettings":
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale: needs 0 < low <= high <= 1, got {list(self.scale)}")
        low, high = self.ratio
        if not 0 < low <= high:
            raise ValueError(f"ratio: needs 0 < low <= high, got {list(self.ratio)}")
        if self.max_size is not None and self.mode != "keep_aspect":
            raise ValueError(f"max_size is for mode keep_aspect; mode is {self.mode}: remove it")
        if self.max_size is not None and self.max_size < self.size:
            raise ValueError(f"max_size {self.max_size} is smaller than size {self.size}")
        if min(self.std) <= 0:
            raise ValueError(f"std: must be positive, got {list(self.std)}")
        return self


class ImageTransform:
    """Encoded bytes to a uint8 RGB image of the size that the settings name."""

    def __init__(self, settings: ImageSettings) -> None:
        self.settings = settings
        self._pixels = Scratch()
        self._resized = Scratch()

    @property
    def fixed_size(self) -> bool:
        """Whether all images come out as (size, size, 3)."""
        return self.settings.mode != "keep_aspect"

    def __call__(
        self,
        data: bytes,
        rng: np.random.Generator | None,
        out: np.ndarray | None = None,
        clock: StageClock | None = None,
    ) -> np.ndarray:
        """Decode, crop, resize and augment one image.

        Args:
            data: the encoded image.
            rng: source of the random choices; none for evaluation: no augmentation, full-size
                decode, and the centre crop in place of a random one.
            out: (size, size, 3) uint8, C-contiguous, to write to (modes of fixed size only).
            clock: books "decode" and "transform".

        Returns:
            (H, W, 3) uint8; `out` if it was given.

        Raises:
            DecodeError: damaged, not an image, or above max_pixels.
        """
        size = self.settings.size
        if out is None and self.fixed_size:
            out = np.empty((size, size, 3), dtype=np.uint8)
        header = read_header(data, self.settings.max_pixels)
        if self.settings.mode == "random_resized_crop" and rng is not None:
            x, y, width, height = random_box(
                header.width, header.height, self.settings.scale, self.settings.ratio, rng
            )
            factor = self._decode_factor(header, width, height)
            pixels = decode(data, header, factor, self._pixels)
            # The edges move to the nearest line of the reduced image's grid.
            left, right = round(x / factor), round((x + width) / factor)
            top, bottom = round(y / factor), round((y + height) / factor)
            region = pixels[top:bottom, left:right]
        else:
            region = decode(data, header, 1, self._pixels)
        if clock is not None:
            clock.lap("decode")
        out = self._resize(region, rng is not None, out)
        if rng is not None:
            self._augment(out, rng)
        if clock is not None:
            clock.lap("transform")
        return out

    def _decode_factor(self, header: ImageHeader, width: int, height: int) -> int:
        margin = self.settings.scaled_decode_margin
        if margin is None:
            return 1
        return largest_factor(header, min(width, height) / (margin * self.settings.size))

    def _resize(self, region: np.ndarray, train: bool, out: np.ndarray | None) -> np.ndarray:
        settings = self.settings
        if settings.mode == "random_resized_crop" and train:
            return resize(region, settings.size, settings.size, out)
        if settings.mode == "keep_aspect":
            height, width = self._shorter_side_to_size(region, settings.max_size)
            return resize(region, height, width)
        height, width = self._shorter_side_to_size(region, None)
        top, left = (height - settings.size) // 2, (width - settings.size) // 2
        buffer = self._resized.take(height * width * 3)[: height * width * 3]
        resized = resize(region, height, width, buffer.reshape(height, width, 3))
        out[:] = resized[top : top + settings.size, left : left + settings.size]
        return out

    def _shorter_side_to_size(self, image: np.ndarray, max_size: int | None) -> tuple[int, int]:
        height, width = keep_aspect_size(*image.shape[:2], self.settings.size, max_size)
        if height * width > self.settings.max_pixels:  # a line of pixels, blown up
            raise DecodeError(
                f"image of shape {image.shape[:2]} would be resized to {(height, width)}"
            )
        return height, width

    def _augment(self, image: np.ndarray, rng: np.random.Generator) -> None:
        settings = self.settings
        # All draws are made whatever the settings are: changing one leaves the others' draws alone.
        flip, *jitter = rng.random(4)
        if flip < settings.flip_probability:
            cv2.flip(image, 1, dst=image)
        spans = (settings.brightness, settings.contrast, settings.saturation)
        if any(spans):
            factors = [1 + span * (2 * draw - 1) for span, draw in zip(spans, jitter, strict=True)]
            color_jitter(image, *(max(factor, 0.0) for factor in factors))


def random_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draw (x, y, width, height) with an area share from `scale` and a width / height from `ratio`.

    Ten tries; if none fits into the image, the largest centred box within the range of ratios.
    """
    shares, aspects, (place_x, place_y) = np.split(rng.random(22), [10, 20])
    for share, aspect in zip(shares.tolist(), aspects.tolist(), strict=True):
        area = width * height * (scale[0] + share * (scale[1] - scale[0]))
        shape = math.exp(math.log(ratio[0]) + aspect * math.log(ratio[1] / ratio[0]))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return int(place_x * (width - w + 1)), int(place_y * (height - h + 1)), w, h
    w = min(width, max(round(height * ratio[1]), 1))
    h = min(height, max(round(width / ratio[0]), 1))
    return (width - w) // 2, (height - h) // 2, w, h


def keep_aspect_size(height: int, width: int, size: int, max_size: int | None) -> tuple[int, int]:
    """(height, width) with the shorter side at `size` unless the longer would pass `max_size`.

    GIT's test-time rule: the bound first lowers the shorter side to a rounded value, from which the
    longer one follows rounded down, so that it can pass `max_size` by the rounding.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = max(round(max_size * short / long), 1)
    if short == size:
        return height, width
    other = int(size * long / short)
    return (other, size) if width < height else (size, other)


def resize(image: np.ndarray, height: int, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """Resize (H, W, 3) uint8 by an antialiased bicubic filter: Pillow's, but for rounding.

    torch has it as vector code, about ten times faster than Pillow and, where images shrink, four
    times faster than OpenCV's area averages. Its in-place form, because fresh memory for the result
    would cost as much again.
    """
    if min(image.strides) < 0 or not image.flags.writeable:  # what torch does not take
        image = image.copy()
    if out is None:
        out = np.empty((height, width, 3), dtype=np.uint8)
    source, target = (torch.from_numpy(a).permute(2, 0, 1)[None] for a in (image, out))
    _resize_into(source, [height, width], False, None, None, out=target)
    return out


def color_jitter(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> None:
    """Scale brightness, then contrast about the mean grey, then saturation; in place, uint8.

    Each step rounds and clips to 0..255, as if it stood alone. Grey is 0.299 R + 0.587 G + 0.114 B.
    """
    grey = np.array([[0.299, 0.587, 0.114]], dtype=np.float32)
    levels = np.arange(256, dtype=np.float64)
    if brightness != 1:
        cv2.LUT(image, _to_uint8(levels * brightness), dst=image)
    if contrast != 1:
        mean = float(np.dot(grey[0], cv2.mean(image)[:3]))
        cv2.LUT(image, _to_uint8(mean + (levels - mean) * contrast), dst=image)
    if saturation != 1:
        blend = saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * grey
        cv2.transform(image, blend, dst=image)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
