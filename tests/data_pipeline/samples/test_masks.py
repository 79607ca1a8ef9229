"""Polygons and run lengths as masks, in closed form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.images.crops import Geometry
from data_pipeline.samples.masks import (
    mask_boxes,
    polygon_mask,
    runs_mask,
    seen_by,
    segmentation_mask,
)

SIZE = (30, 40)
WHOLE = Geometry((0, 0, 40, 30), 30, 40)


def compressed(counts: list[int]) -> str:
    """The format's own description, the other way round."""
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            group = value & 31
            value >>= 5
            more = value != -1 if group & 16 else value != 0
            text += chr(48 + (group | 32 if more else group))
    return text


def run_lengths(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[False], mask.T.ravel()])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()


def centres(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)


@given(st.integers(0, 2**32), st.floats(0.05, 0.95))
@settings(max_examples=50)
def test_run_lengths_are_read_back(seed, share):
    mask = np.random.default_rng(seed).random(SIZE) < share
    counts = run_lengths(mask)
    for form in (counts, compressed(counts)):
        assert np.array_equal(runs_mask({"size": list(SIZE), "counts": form}, SIZE), mask)


def test_a_known_string():
    """As the COCO tools write it, for a mask of 9 x 10."""
    counts, text = [6, 1, 40, 4, 5, 4, 5, 4, 21], "61X13mN000`0"
    mask = runs_mask({"size": [9, 10], "counts": text}, (9, 10))
    assert run_lengths(mask) == counts
    assert compressed(counts) == text


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"size": [40, 30], "counts": [1200]}, r"for height and width \[40, 30\]"),
        ({"counts": [1200]}, "for height and width None"),
        ({"size": [30, 40], "counts": [1199]}, "sum up to 1199, not to 1200"),
        ({"size": [30, 40], "counts": [10**18]}, "sum up to"),
        ({"size": [30, 40], "counts": [1201, -1]}, "whole numbers"),
        ({"size": [30, 40], "counts": None}, "whole numbers"),
        ({"size": [30, 40], "counts": "P"}, "cut"),
        ({"size": [30, 40], "counts": "\x7f~"}, "damaged"),
        ({"size": [30, 40], "counts": "o" * 30}, "damaged"),
    ],
)
def test_damaged_run_lengths(runs, message):
    with pytest.raises(ValueError, match=message):
        runs_mask(runs, SIZE)


def test_rectangles_and_triangles():
    x, y = centres(*SIZE)
    rectangle = np.array([[3.0, 4.0], [17.0, 4.0], [17.0, 21.0], [3.0, 21.0]])
    assert np.array_equal(polygon_mask(rectangle, *SIZE), (x > 3) & (x < 17) & (y > 4) & (y < 21))
    triangle = np.array([[0.0, 0.0], [40.0, 0.0], [0.0, 30.0]])
    assert np.array_equal(polygon_mask(triangle, *SIZE), x / 40 + y / 30 < 1)
    assert np.array_equal(polygon_mask(triangle[::-1], *SIZE), x / 40 + y / 30 < 1)


@given(st.integers(0, 2**32), st.integers(3, 9))
@settings(max_examples=60)
def test_polygons_follow_the_even_odd_rule(seed, corners):
    """Against counting, for each pixel, the edges to its left; also where they cross, and reach
    out of the image."""
    points = np.random.default_rng(seed).uniform(-15, 55, (corners, 2))
    x, y = centres(*SIZE)
    inside = np.zeros(SIZE, dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
        crosses = (y0 <= y) != (y1 <= y)
        inside ^= crosses & (x0 + (y - y0) / (y1 - y0) * (x1 - x0) <= x)
    assert np.array_equal(polygon_mask(points, *SIZE), inside)


def test_parts_that_share_an_edge_neither_overlap_nor_gape():
    left = polygon_mask(np.array([[2, 2], [20.5, 2], [13.5, 25], [2, 25]]), *SIZE)
    right = polygon_mask(np.array([[20.5, 2], [35, 2], [35, 25], [13.5, 25]]), *SIZE)
    both = polygon_mask(np.array([[2, 2], [35, 2], [35, 25], [2, 25]]), *SIZE)
    assert not (left & right).any()
    assert np.array_equal(left | right, both)


def test_far_away_and_flat_polygons_have_no_pixels():
    for points in ([[1e300, 0], [2e300, 5], [1e300, 9]], [[5, 5], [20, 5], [9, 5]]):
        assert not polygon_mask(np.array(points), *SIZE).any()


def test_segmentations_of_several_polygons_are_joined():
    two = [[2, 2, 10, 2, 10, 10, 2, 10], [5, 5, 30, 5, 30, 20, 5, 20]]
    x, y = centres(*SIZE)
    expected = (x > 2) & (x < 10) & (y > 2) & (y < 10) | (x > 5) & (x < 30) & (y > 5) & (y < 20)
    assert np.array_equal(segmentation_mask(two, WHOLE, SIZE), expected)


@pytest.mark.parametrize("flip", [False, True])
def test_both_kinds_follow_a_crop(flip):
    """A rectangle on the pixel grid of an output twice as large as its crop."""
    geometry = Geometry((10, 5, 30, 25), 40, 40, flip)
    polygon = [[12, 7, 22, 7, 22, 19, 12, 19]]
    full = segmentation_mask(polygon, WHOLE, SIZE)
    runs = {"size": list(SIZE), "counts": run_lengths(full)}
    x, y = centres(40, 40)
    x = 40 - x if flip else x
    expected = (x > 4) & (x < 24) & (y > 4) & (y < 28)
    assert np.array_equal(segmentation_mask(polygon, geometry, SIZE), expected)
    assert np.array_equal(segmentation_mask(runs, geometry, SIZE), expected)


def test_masks_are_seen_at_the_centres():
    mask = np.random.default_rng(0).random(SIZE) < 0.5
    assert np.array_equal(seen_by(mask, WHOLE), mask)
    flipped = Geometry((0, 0, 40, 30), 30, 40, flip=True)
    assert np.array_equal(seen_by(mask, flipped), mask[:, ::-1])
    half = Geometry((0, 0, 40, 30), 15, 20)
    assert np.array_equal(seen_by(mask, half), mask[1::2, 1::2])


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "neither a list"),
        ([], "neither a list"),
        ([[1, 2, 3, 4]], "three or more pairs"),
        ([[1, 2, 3, 4, 5, 6, 7]], "three or more pairs"),
        ([[1, 2, 3, 4, 5, float("nan")]], "three or more pairs"),
        ([7], "three or more pairs"),
    ],
)
def test_malformed_segmentations(segmentation, message):
    with pytest.raises(ValueError, match=message):
        segmentation_mask(segmentation, WHOLE, SIZE)


def test_boxes_around_masks():
    masks = np.zeros((2, *SIZE), dtype=bool)
    masks[0, 3:9, 5:6] = True
    assert mask_boxes(masks).tolist() == [[5, 3, 6, 9], [0, 0, 0, 0]]
