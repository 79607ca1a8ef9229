"""Which part of an image is taken, and how it is resized."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.images.warps import Affine, clipped, moved


class Box(NamedTuple):
    """A rectangle of whole pixels of the upright image."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Geometry:
    """How the upright image became the output: `crop` was resized to `width` x `height`, mirrored
    if `flip`, and then moved by `warps`. All count pixels, from the upper left edge."""

    crop: tuple[float, float, float, float]
    """x0, y0, x1, y1: what the output shows of the upright image."""
    height: int
    """Of the output, without padding."""
    width: int
    """Of the output, without padding."""
    flip: bool = False
    """Mirrored left to right."""
    warps: tuple[Affine, ...] = ()
    """What moved the pixels then, one after the other, without changing areas. What one of them
    moves out of the picture is lost to the next."""

    def points(self, xy: np.ndarray) -> np.ndarray:
        """(N, 2) points (x, y) of the upright image -> (N, 2) points (u, v) of the output."""
        uv = self.placed(xy)
        for warp in self.warps:
            uv = moved(uv, warp)
        return uv

    def placed(self, xy: np.ndarray) -> np.ndarray:
        """As `points`, before the warps."""
        x0, y0, x1, y1 = self.crop
        uv = (xy - (x0, y0)) * (self.width / (x1 - x0), self.height / (y1 - y0))
        if self.flip:
            uv[:, 0] = self.width - uv[:, 0]
        return uv

    def left(self, outline: np.ndarray) -> np.ndarray:
        """What the output shows of a convex polygon: (N, 2) as `placed` -> (M, 2), M perhaps 0."""
        outline = clipped(outline, self.width, self.height)
        for warp in self.warps:
            outline = clipped(moved(outline, warp), self.width, self.height)
        return outline


def fitting_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box | None:
    """Draw a box with an area share from `scale` and a width / height from `ratio`.

    Ten tries, of 22 draws in all, whether needed or not; None if no box fits into the image.
    """
    draws = rng.random(22).tolist()
    place_x, place_y = draws[20:]
    for share, aspect in zip(draws[:10], draws[10:20], strict=True):
        area = width * height * (scale[0] + share * (scale[1] - scale[0]))
        shape = math.exp(math.log(ratio[0]) + aspect * math.log(ratio[1] / ratio[0]))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(place_x * (width - w + 1)), int(place_y * (height - h + 1)), w, h)
    return None


def random_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """As `fitting_box`; if none fits, the largest centred box within the range of ratios."""
    box = fitting_box(width, height, scale, ratio, rng)
    if box is not None:
        return box
    w = min(width, max(round(height * ratio[1]), 1))
    h = min(height, max(round(width / ratio[0]), 1))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def jittered_box(
    width: int, height: int, size: int, jitter: tuple[float, float], rng: np.random.Generator
) -> tuple[Box, float]:
    """Large-scale jitter: the part of the image that a square of `size` pixels shows.

    Returns:
        the box, at a random place, and the drawn scale, a factor from `jitter` times that at which
        the whole image just fits into the square.
    """
    draw, place_x, place_y = rng.random(3).tolist()
    factor = jitter[0] + draw * (jitter[1] - jitter[0])
    scale = factor * min(size / width, size / height)
    w, h = (min(side, max(round(size / scale), 1)) for side in (width, height))
    return Box(int(place_x * (width - w + 1)), int(place_y * (height - h + 1)), w, h), scale


def align(box: Box, width: int, height: int, factor: int, origin: tuple[int, int]) -> Box:
    """Move the edges of `box` to the nearest lines that lie a multiple of `factor` from `origin`.

    Args:
        width, height: of the image, which the box stays inside of; at least `factor`.
        origin: x and y of a line, 0 to factor - 1; see `decode.grid_origin`.
    """
    x0, x1 = _aligned(box.x, box.x + box.width, width, factor, origin[0])
    y0, y1 = _aligned(box.y, box.y + box.height, height, factor, origin[1])
    return Box(x0, y0, x1 - x0, y1 - y0)


def at_scale(box: Box, factor: int, origin: tuple[int, int]) -> Box:
    """Where an aligned `box` lies in the image decoded at 1 / factor.

    Args:
        origin: x and y of the first line of the grid. A first pixel that is cut by the edge of the
            image stands before it.
    """
    x, y = ((at - start) // factor + (start > 0) for at, start in zip(box[:2], origin, strict=True))
    return Box(x, y, box.width // factor, box.height // factor)


def around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of them."""
    if len(boxes) == 1:
        return boxes[0]
    x, y = min(box.x for box in boxes), min(box.y for box in boxes)
    right, bottom = max(b.x + b.width for b in boxes), max(b.y + b.height for b in boxes)
    return Box(x, y, right - x, bottom - y)


def _aligned(start: int, stop: int, length: int, factor: int, origin: int) -> tuple[int, int]:
    last = (length - origin) // factor
    start, stop = (max(round((at - origin) / factor), 0) for at in (start, stop))
    start = min(start, last - 1)
    stop = min(max(stop, start + 1), last)
    return origin + start * factor, origin + stop * factor


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
    import torch

    if min(image.strides) < 0 or not image.flags.writeable:  # what torch does not take
        image = image.copy()
    if out is None:
        out = np.empty((height, width, 3), dtype=np.uint8)
    source, target = (torch.from_numpy(a).permute(2, 0, 1)[None] for a in (image, out))
    resize_into = torch.ops.aten._upsample_bicubic2d_aa.out
    resize_into(source, [height, width], False, None, None, out=target)
    return out
