"""Image settings and the transforms that turn encoded bytes into one uint8 image."""

from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.settings import Settings

# Statistics of the CLIP image encoders, in units of the full range (pixel / 255).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
