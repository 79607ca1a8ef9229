"""Image settings and the transform that turns encoded bytes into one uint8 image.

Every random choice comes from the generator that is passed in, as draws from [0, 1): the same
pixels for the same generator in any process, with any number of threads.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from pydantic import Field, field_validator, model_validator

from data_pipeline.images.colours import Colours, ColourSettings, apply_colours, draw_colours
from data_pipeline.images.crops import (
    Box,
    Geometry,
    align,
    around,
    at_scale,
    jittered_box,
    keep_aspect_size,
    random_box,
    resize,
)
from data_pipeline.images.decode import (
    MAX_PIXELS,
    DecodeError,
    ImageHeader,
    Scratch,
    decode,
    grid_origin,
    largest_factor,
    read_header,
)
from data_pipeline.images.erase import EraseSettings, erase
from data_pipeline.images.rand_augment import RandAugmentSettings, rand_augment
from data_pipeline.images.warps import Affine
from data_pipeline.rng import substream
from data_pipeline.settings import Settings
from data_pipeline.timing import StageClock

# Statistics of the CLIP image encoders, in units of the full range (pixel / 255).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Numbers of the streams of draws beside the one that is passed in.
_ERASE, _RAND_AUGMENT = 1, 2


class ImageSettings(ColourSettings):
    """How an encoded image becomes a uint8 array; normalisation happens later, on the device."""

    size: int = Field(default=224, ge=1)
    """Output height and width in pixels; the length of the shorter side in mode keep_aspect."""
    sizes: list[int] | None = Field(default=None, min_length=1)
    """Training draws one of these in place of `size` for each step, the same on all ranks;
    evaluation uses `size`. null: always `size`. Not for mode keep_aspect."""
    mode: Literal["random_resized_crop", "center_crop", "keep_aspect", "large_scale_jitter"] = (
        "random_resized_crop"
    )
    """random_resized_crop draws a box per sample; center_crop resizes the shorter side and cuts
    the middle; keep_aspect resizes without cutting (images differ in size: micro-batches of 1);
    large_scale_jitter shrinks or enlarges by a draw from `jitter`, cuts what is too large at a
    random place and pads what is too small (evaluation: the whole image, padded)."""
    max_size: int | None = Field(default=None, ge=1)
    """Bound in pixels on the longer side; mode keep_aspect only."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's share of the image area; mode random_resized_crop."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height, drawn log-uniformly; mode random_resized_crop."""
    jitter: tuple[float, float] = (0.1, 2.0)
    """Range of the scale in mode large_scale_jitter; at 1 the image just fits into `size`."""
    flip_probability: float = Field(default=0.0, ge=0.0, le=1.0)
    """Chance of a left-right flip in training. 0 by default: captions may say left and right."""
    rand_augment: RandAugmentSettings | None = None
    """RandAugment in training, after the flip and before the other changes of colour; null: none.
    Beside it timm, and so InternImage, has no colour jitter."""
    erase: EraseSettings | None = None
    """Random erasing in training, last of all; null: none."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Mean per channel that the device subtracts, in units of pixel / 255 (default: CLIP)."""
    std: tuple[float, float, float] = CLIP_STD
    """Standard deviation per channel that the device divides by (default: CLIP)."""
    scaled_decode_margin: float | None = Field(default=1.5, ge=1.0)
    """In training JPEGs are decoded at 1/2, 1/4 or 1/8 when the reduced crop still measures this
    multiple of the output size; null: always at full size. For modes random_resized_crop and
    large_scale_jitter. Crops are then cut on the grid of the reduced image."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Larger images are refused before they are decoded, as bad samples."""

    @model_validator(mode="after")
    def _check(self) -> "ImageSettings":
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale: needs 0 < low <= high <= 1, got {list(self.scale)}")
        for name in ("ratio", "jitter"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: needs 0 < low <= high, got {[low, high]}")
        if self.max_size is not None and self.mode != "keep_aspect":
            raise ValueError(f"max_size is for mode keep_aspect; mode is {self.mode}: remove it")
        if self.max_size is not None and self.max_size < self.size:
            raise ValueError(f"max_size {self.max_size} is smaller than size {self.size}")
        if self.sizes is not None and self.mode == "keep_aspect":
            raise ValueError("sizes is not for mode keep_aspect: remove it")
        if self.sizes is not None and min(self.sizes) < 1:
            raise ValueError(f"sizes: must be positive, got {self.sizes}")
        if min(self.std) <= 0:
            raise ValueError(f"std: must be positive, got {list(self.std)}")
        return self

    @property
    def fixed_size(self) -> bool:
        """Whether all images come out as (size, size, 3)."""
        return self.mode != "keep_aspect"

    @property
    def largest_size(self) -> int:
        """The largest output that training may ask for, in pixels."""
        return max([self.size, *(self.sizes or ())])


class HeldOutImageSettings(Settings):
    """What is said of held-out images. All else is as in training, or drawn in training alone."""

    size: int | None = Field(default=None, ge=1)
    """As in training; null: the same."""
    mode: Literal["center_crop", "keep_aspect", "large_scale_jitter"] | None = None
    """As in training; large_scale_jitter keeps the whole image and pads it. null: the same, with a
    centre crop for the random one."""
    max_size: int | None = Field(default=None, ge=1)
    """Bound in pixels on the longer side; mode keep_aspect only. null: the same."""

    @field_validator("mode", mode="before")
    @classmethod
    def _nothing_is_drawn(cls, mode: Any) -> Any:
        return "center_crop" if mode == "random_resized_crop" else mode

    def beside(self, training: ImageSettings) -> ImageSettings:
        """The whole of the settings of held-out images, from those of training."""
        mode = self.mode or training.mode
        changes = {
            "size": self.size or training.size,
            "mode": "center_crop" if mode == "random_resized_crop" else mode,
            "max_size": self.max_size or (training.max_size if mode == "keep_aspect" else None),
            "sizes": None,
        }
        return training.model_copy(update=changes)


class View(NamedTuple):
    """One image as it was made."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    geometry: Geometry
    """Where its pixels come from; those beyond its height and width are padding."""
    colours: Colours
    """What was done to its colours, but for `rand_augment`."""
    source: tuple[int, int]
    """Height and width of the upright image."""


class Cut(NamedTuple):
    """What is to be made of an image, as far as it is decided before decoding."""

    box: Box
    """The part that is resized; on the grid of `factor`."""
    factor: int
    """The image may be decoded at 1 / factor."""
    height: int
    """What the part is resized to."""
    width: int
    source: tuple[int, int]
    """Height and width of the upright image."""


class ImageTransform:
    """Encoded bytes to a uint8 RGB image of the size that the settings name."""

    def __init__(self, settings: ImageSettings) -> None:
        self.settings = settings
        self.fill = tuple(round(255 * value) for value in settings.mean)
        self.scratch = Scratch()
        self._resized = Scratch()

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
        return make_views(data, [self], [rng], [out], clock)[0].image

    def plan(self, header: ImageHeader, rng: np.random.Generator | None) -> Cut:
        """Choose the part of the image and its size. Raises DecodeError (see `__call__`)."""
        settings, size = self.settings, self.settings.size
        width, height = header.width, header.height
        whole = Box(0, 0, width, height)
        if settings.mode == "large_scale_jitter":
            if rng is None:
                box, scale = whole, min(size / width, size / height)
            else:
                box, scale = jittered_box(width, height, size, settings.jitter, rng)
            resized = (min(size, max(round(s * scale), 1)) for s in (box.height, box.width))
            return self._reduced(header, box, *resized, train=rng is not None)
        if settings.mode == "random_resized_crop" and rng is not None:
            box = random_box(width, height, settings.scale, settings.ratio, rng)
            return self._reduced(header, box, size, size, train=True)
        return Cut(whole, 1, *self._shorter_side_to_size(height, width), (height, width))

    def render(
        self,
        region: np.ndarray,
        cut: Cut,
        rng: np.random.Generator | None,
        out: np.ndarray | None,
    ) -> View:
        """Resize and augment.

        Args:
            region: (H, W, 3) uint8, the part of the image that `cut.box` is, at any scale.
            cut: from `plan`, drawn from the same generator.
            rng, out: as in `__call__`.
        """
        image, top, left = self._resize(region, cut, out)
        draws = np.zeros(4) if rng is None else rng.random(4)
        flip = rng is not None and bool(draws[0] < self.settings.flip_probability)
        geometry = _geometry(cut, top, left, *image.shape[:2], flip)
        shown = image[: geometry.height, : geometry.width]
        if flip:
            cv2.flip(shown, 1, dst=shown)
        if rng is None:
            return View(image, geometry, Colours(), cut.source)
        colours, warps = self._augment(shown, draws[1:], rng)
        return View(image, replace(geometry, warps=warps), colours, cut.source)

    def _reduced(self, header: ImageHeader, box: Box, height: int, width: int, train: bool) -> Cut:
        margin, source = self.settings.scaled_decode_margin, (header.height, header.width)
        if margin is None or not train:
            return Cut(box, 1, height, width, source)
        limit = min(box.width / width, box.height / height) / margin
        factor = largest_factor(header, limit)
        box = align(box, header.width, header.height, factor, grid_origin(header, factor))
        return Cut(box, factor, height, width, source)

    def _resize(
        self, region: np.ndarray, cut: Cut, out: np.ndarray | None
    ) -> tuple[np.ndarray, int, int]:
        """The output, and the row and column of the resized part that it begins with."""
        size, shape = self.settings.size, (cut.height, cut.width)
        if not self.settings.fixed_size:
            return resize(region, *shape), 0, 0
        if out is None:
            out = np.empty((size, size, 3), dtype=np.uint8)
        if shape == (size, size):
            return resize(region, size, size, out), 0, 0
        buffer = self._resized.take(cut.height * cut.width * 3)[: cut.height * cut.width * 3]
        resized = resize(region, *shape, buffer.reshape(*shape, 3))
        if self.settings.mode == "large_scale_jitter":
            out[:] = self.fill
            out[: cut.height, : cut.width] = resized
            return out, 0, 0
        top, left = (cut.height - size) // 2, (cut.width - size) // 2
        out[:] = resized[top : top + size, left : left + size]
        return out, top, left

    def _shorter_side_to_size(self, height: int, width: int) -> tuple[int, int]:
        settings = self.settings
        to_height, to_width = keep_aspect_size(height, width, settings.size, settings.max_size)
        if to_height * to_width > settings.max_pixels:  # a line of pixels, blown up
            raise DecodeError(
                f"image of shape {(height, width)} would be resized to {(to_height, to_width)}"
            )
        return to_height, to_width

    def _augment(
        self, image: np.ndarray, jitter: np.ndarray, rng: np.random.Generator
    ) -> tuple[Colours, tuple[Affine, ...]]:
        """Change the image in place; returns what was done to its colours, and what moved."""
        settings, warps = self.settings, ()
        # All draws are made whatever the settings are: changing one leaves the others' draws alone.
        colours = draw_colours(settings, jitter, rng.random(7))
        if settings.rand_augment is not None:
            own = substream(rng, _RAND_AUGMENT)
            warps = rand_augment(image, settings.rand_augment, self.fill, own)
        apply_colours(image, colours)
        if settings.erase is not None:
            erase(image, settings.erase, settings.mean, settings.std, substream(rng, _ERASE))
        return colours, warps


def _geometry(cut: Cut, top: int, left: int, height: int, width: int, flip: bool) -> Geometry:
    """Of an output of `height` x `width` that begins at (top, left) of the resized part."""
    height, width = min(height, cut.height), min(width, cut.width)
    # Products before quotients: where all of the part is shown its edges stay whole numbers.
    xs = (cut.box.x + at * cut.box.width / cut.width for at in (left, left + width))
    ys = (cut.box.y + at * cut.box.height / cut.height for at in (top, top + height))
    (x0, x1), (y0, y1) = xs, ys
    return Geometry((x0, y0, x1, y1), height, width, flip)


def make_views(
    data: bytes,
    transforms: Sequence[ImageTransform],
    rngs: Sequence[np.random.Generator | None],
    outs: Sequence[np.ndarray | None],
    clock: StageClock | None = None,
    made: int | None = None,
) -> list[View]:
    """Apply several transforms to one image, which is decoded once.

    Arguments, but for one of each per transform, and errors: as `ImageTransform.__call__`.
    made: only the first so many are returned, with the pixels that they have among all.
    """
    header = read_header(data, transforms[0].settings.max_pixels)
    cuts = [transform.plan(header, rng) for transform, rng in zip(transforms, rngs, strict=True)]
    # Factors are powers of two: what lies on the grid of one lies on that of any smaller one.
    # Of all views, so that the pixels of one do not depend on which of the others are made.
    factor = min(cut.factor for cut in cuts)
    origin = grid_origin(header, factor)
    places = [at_scale(cut.box, factor, origin) for cut in cuts[:made]]
    window = around(places)
    pixels = decode(data, header, factor, transforms[0].scratch, window)
    if clock is not None:
        clock.lap("decode")
    views = []
    for place, transform, cut, rng, out in zip(places, transforms, cuts, rngs, outs, strict=False):
        x, y = place.x - window.x, place.y - window.y
        region = pixels[y : y + place.height, x : x + place.width]
        views.append(transform.render(region, cut, rng, out))
    if clock is not None:
        clock.lap("transform")
    return views
