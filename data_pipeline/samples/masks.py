"""Segmentations of COCO as masks: polygons, and run lengths, plain or compressed.

A pixel belongs to a polygon if its centre lies inside, by the even-odd rule.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipeline.images.crops import Geometry
from data_pipeline.images.warps import inverse, joined

_FAR = 1e6  # pixels; arithmetic beyond would overflow


def segmentation_mask(segmentation: Any, geometry: Geometry, source: tuple[int, int]) -> np.ndarray:
    """Mask of one object in an output image.

    Args:
        segmentation: a list of polygons [x, y, x, y, ..], or {"size": [height, width], "counts":
            list or string}, in pixels of the upright image.
        geometry: how the output was made.
        source: height and width of the upright image.

    Returns:
        (height, width) bool of the output, without padding. Warps may have lost parts of it: see
        `shown_mask`.

    Raises:
        ValueError: malformed; the text says how.
    """
    if isinstance(segmentation, dict):
        return seen_by(runs_mask(segmentation, source), geometry)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("a segmentation is neither a list of polygons nor run lengths")
    mask = np.zeros((geometry.height, geometry.width), dtype=bool)
    for polygon in segmentation:
        mask |= polygon_mask(geometry.points(_corners(polygon)), *mask.shape)
    return mask


def check_segmentation(segmentation: Any, source: tuple[int, int]) -> None:
    """Raise ValueError, saying why, for what `segmentation_mask` cannot draw.

    Args: source: height and width of the upright image.
    """
    if isinstance(segmentation, dict):
        _runs(segmentation, source)
    elif isinstance(segmentation, list) and segmentation:
        for polygon in segmentation:
            _corners(polygon)
    else:
        raise ValueError("a segmentation is neither a list of polygons nor run lengths")


def _corners(polygon: Any) -> np.ndarray:
    """(N, 2) x and y of the corners of a polygon of COCO."""
    try:
        points = np.array(polygon, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        points = np.zeros(0)
    if points.ndim != 1 or points.size < 6 or points.size % 2 or not np.isfinite(points).all():
        raise ValueError("a polygon is not a list of three or more pairs of numbers")
    return points.reshape(-1, 2)


def shown_mask(geometry: Geometry) -> np.ndarray:
    """(height, width) bool of the output: where it shows the image, and not what fills the places
    that warps left."""
    height, width = geometry.height, geometry.width
    frame = np.array([[0.0, 0.0], [width, 0.0], [width, height], [0.0, height]])
    return polygon_mask(geometry.left(frame), height, width)


def polygon_mask(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width) bool: pixels whose centre lies inside of a polygon.

    Args:
        points: (N, 2) x and y of its corners in pixels.
    """
    mask = np.zeros((height, width), dtype=bool)
    if not len(points):
        return mask
    points = np.clip(points, -_FAR, _FAR)
    # Only the part of the image that the polygon reaches is worked on.
    left, top = np.clip(np.floor(points.min(0)), 0, (width, height)).astype(int)
    right, bottom = np.clip(np.ceil(points.max(0)), 0, (width, height)).astype(int)
    if right > left and bottom > top:
        window = points - (left, top)
        mask[top:bottom, left:right] = _inside(window, bottom - top, right - left)
    return mask


def _inside(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each edge toggles all pixels to the right of where it crosses the middle of a row."""
    begin, end = points, np.roll(points, -1, axis=0)
    # Rows whose middle lies between the ends, the lower end excluded: each corner counts once.
    limits = np.ceil(np.sort(np.stack([begin[:, 1], end[:, 1]]), axis=0) - 0.5)
    first, stop = np.clip(limits, 0, height).astype(int)
    counts = stop - first
    edge = np.repeat(np.arange(len(points)), counts)
    row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    slope = (end[edge, 0] - begin[edge, 0]) / (end[edge, 1] - begin[edge, 1])
    crossing = begin[edge, 0] + (row + 0.5 - begin[edge, 1]) * slope
    column = np.clip(np.ceil(crossing - 0.5), 0, width).astype(int)
    toggles = np.bincount(row * (width + 1) + column, minlength=height * (width + 1))
    return toggles.reshape(height, width + 1)[:, :width].cumsum(1) % 2 == 1


def runs_mask(runs: dict[str, Any], source: tuple[int, int]) -> np.ndarray:
    """(height, width) bool of COCO run lengths: zeros and ones in turn, down the columns.

    Raises:
        ValueError: not of an image of size `source` (height, width), or malformed.
    """
    counts = _runs(runs, source)
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(source[::-1]).T


def _runs(runs: dict[str, Any], source: tuple[int, int]) -> list[int]:
    """The lengths of the runs of an image of size `source`. Errors: as `runs_mask`."""
    height, width = source
    if list(runs.get("size") or ()) != [height, width]:
        raise ValueError(
            f"run lengths are for height and width {runs.get('size')}, the image has "
            f"{[height, width]}"
        )
    counts = runs.get("counts")
    if isinstance(counts, str):
        counts = _uncompressed(counts)
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError("run lengths are not a list of whole numbers, nor their compressed form")
    if sum(counts) != height * width:
        raise ValueError(f"run lengths sum up to {sum(counts)}, not to {height * width} pixels")
    return counts


def _uncompressed(text: str) -> list[int]:
    """COCO's compressed form: numbers in groups of five bits, lowest first, of which each but the
    last has bit 32 set; from the fourth on, differences from the last but one."""
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64 or shift > 40:
            raise ValueError("compressed run lengths are damaged")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:  # the sign
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError("compressed run lengths are cut")
    return counts


def seen_by(mask: np.ndarray, geometry: Geometry) -> np.ndarray:
    """(height, width) of the output: the mask of the upright image at the centre of each pixel."""
    if geometry.warps:
        return _seen_through_warps(mask, geometry)
    x0, y0, x1, y1 = geometry.crop
    columns = _sampled(x0, x1, geometry.width, mask.shape[1])
    rows = _sampled(y0, y1, geometry.height, mask.shape[0])
    return mask[np.ix_(rows, columns[::-1] if geometry.flip else columns)]


def _seen_through_warps(mask: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Pixels that come from outside of the image have any value."""
    (a, b, c), (d, e, f) = inverse(joined(geometry.warps))
    column, row = np.arange(geometry.width) + 0.5, np.arange(geometry.height)[:, None] + 0.5
    u, v = a * column + b * row + c, d * column + e * row + f
    if geometry.flip:
        u = geometry.width - u
    x0, y0, x1, y1 = geometry.crop
    x, y = x0 + u * ((x1 - x0) / geometry.width), y0 + v * ((y1 - y0) / geometry.height)
    height, width = mask.shape
    rows, columns = np.clip(np.floor(y), 0, height - 1), np.clip(np.floor(x), 0, width - 1)
    return mask[rows.astype(int), columns.astype(int)]


def _sampled(start: float, stop: float, count: int, length: int) -> np.ndarray:
    places = start + (np.arange(count) + 0.5) * ((stop - start) / count)
    return np.clip(np.floor(places), 0, length - 1).astype(int)


def mask_boxes(masks: Sequence[np.ndarray]) -> np.ndarray:
    """(N, 4) x0, y0, x1, y1 around the pixels of each mask; all 0 where there is none."""
    boxes = np.zeros((len(masks), 4))
    for place, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if rows.size:
            boxes[place] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes
