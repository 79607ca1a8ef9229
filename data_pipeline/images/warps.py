"""Affine maps that move the pixels of a picture within its border, and what they leave in it."""

from collections.abc import Sequence

import numpy as np

Affine = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Rows (a, b, c) and (d, e, f): the point (u, v) goes to (a u + b v + c, d u + e v + f), in pixels
from the upper left edge."""


def inverse(matrix: np.ndarray) -> Affine:
    """The map that undoes a (2, 3) one."""
    back = np.linalg.inv(np.vstack([matrix, (0, 0, 1)]))
    return tuple(map(tuple, back[:2].tolist()))


def joined(warps: Sequence[Affine]) -> np.ndarray:
    """(2, 3) float64: all of them, the first first; the identity if there are none."""
    matrix = np.eye(3)
    for warp in warps:
        matrix = np.vstack([warp, (0, 0, 1)]) @ matrix
    return matrix[:2]


def moved(points: np.ndarray, warp: Affine | np.ndarray) -> np.ndarray:
    """(N, 2) points, moved."""
    matrix = np.asarray(warp)
    return points @ matrix[:, :2].T + matrix[:, 2]


def clipped(outline: np.ndarray, width: int, height: int) -> np.ndarray:
    """What a picture shows of a convex polygon: (N, 2) -> (M, 2), without corners if nothing."""
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        inner = sign * (outline[:, axis] - limit)
        if not (inner >= 0).all():
            outline = _half(outline, inner, axis, limit)
    return outline


def area(outline: np.ndarray) -> float:
    """Of a polygon without crossings, in square pixels."""
    x, y = outline.T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def _half(outline: np.ndarray, inner: np.ndarray, axis: int, limit: int) -> np.ndarray:
    """The part where `inner`, the distance of each corner from a line, is not negative."""
    corners = []
    for before, at in zip(range(-1, len(outline) - 1), range(len(outline)), strict=True):
        if (inner[before] >= 0) != (inner[at] >= 0):
            share = inner[before] / (inner[before] - inner[at])
            crossing = outline[before] + share * (outline[at] - outline[before])
            crossing[axis] = limit  # without the rounding
            corners.append(crossing)
        if inner[at] >= 0:
            corners.append(outline[at])
    return np.array(corners).reshape(-1, 2)
