"""Outlines that are moved and cut, against pixels and closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.images.crops import Geometry
from data_pipeline.images.rand_augment import NAMES, augment
from data_pipeline.images.warps import area, clipped, inverse, joined, moved
from data_pipeline.samples.masks import polygon_mask, seen_by, segmentation_mask, shown_mask
from data_pipeline.samples.objects import cut_boxes
from tests.data_pipeline.samples.test_masks import run_lengths

MOVING = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def warp(name: str, share: float, sign: int, height: int, width: int):
    return augment(np.zeros((height, width, 3), np.uint8), name, share, sign, (0, 0, 0))


def convex(seed: int, corners: int) -> np.ndarray:
    """Corners on an ellipse that reaches out of a picture of 40 x 30."""
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    middle, radius = rng.uniform(-10, 50, 2), rng.uniform(3, 50, 2)
    return middle + radius * np.column_stack([np.cos(angles), np.sin(angles)])


@given(st.integers(0, 2**32), st.integers(3, 8))
@settings(max_examples=80)
def test_clipping_leaves_what_lies_in_the_picture(seed, corners):
    outline = convex(seed, corners)
    rest = clipped(outline, 40, 30)
    assert ((rest >= 0) & (rest <= (40, 30))).all()
    assert np.array_equal(polygon_mask(rest, 30, 40), polygon_mask(outline, 30, 40))
    # Pixels ten times as small count its area.
    fine = polygon_mask(10 * outline, 300, 400)
    assert abs(area(rest) - fine.sum() / 100) < 2
    again = clipped(rest, 40, 30)
    assert np.array_equal(again, rest)


def test_areas():
    assert area(np.array([[0, 0], [8, 0], [0, 3]])) == 12
    assert area(np.array([[0, 0], [0, 3], [8, 0]])) == 12
    assert area(np.zeros((0, 2))) == 0
    assert area(clipped(np.array([[50.0, 1], [60, 1], [60, 9]]), 40, 30)) == 0


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("sign", [-1, 1])
def test_operations_say_where_they_move_pixels(name, sign):
    """A bright spot is found where the map says."""
    fill = (0, 0, 0)
    for share in (0.2, 0.6, 1.0):
        for x, y in [(50, 40), (60.5, 50), (70, 45.5)]:
            image = np.zeros((90, 120, 3), np.uint8)
            columns, rows = np.arange(120) + 0.5, np.arange(90)[:, None] + 0.5
            image[:] = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)[:, :, None]
            forward = augment(image, name, share, sign, fill)
            ((u, v),) = moved(np.array([[x, y]]), forward)
            light = image[:, :, 0] / image[:, :, 0].sum()
            if 5 < u < 115 and 5 < v < 85:
                assert abs((light * columns).sum() - u) < 0.1
                assert abs((light * rows).sum() - v) < 0.1
            assert np.linalg.det(np.array(forward)[:, :2]) == pytest.approx(1)  # areas stay


def test_colours_move_nothing():
    image = np.arange(60 * 80 * 3, dtype=np.uint8).reshape(60, 80, 3)
    for name in set(NAMES) - set(MOVING):
        assert augment(image.copy(), name, 0.7, 1, (0, 0, 0)) is None


def test_maps_in_a_row():
    first, second = warp("rotate", 0.4, 1, 30, 40), warp("shear_x", 0.8, -1, 30, 40)
    points = np.array([[1.0, 2.0], [30.0, 7.0]])
    both = moved(moved(points, first), second)
    assert np.allclose(moved(points, joined([first, second])), both)
    assert np.allclose(moved(both, inverse(joined([first, second]))), points)
    assert np.array_equal(joined(()), [[1, 0, 0], [0, 1, 0]])


def test_a_box_that_is_turned():
    """By 30 degrees about the middle of the picture, where it is: nothing of it is cut."""
    geometry = Geometry((0, 0, 40, 30), 60, 80, warps=(warp("rotate", 1.0, 1, 60, 80),))
    box = np.array([[15.0, 12.0, 25.0, 18.0]])  # 20 x 12 pixels of the output
    found, keep = cut_boxes(box, geometry, (30, 40), 1.0)
    middle = np.array([40, 30])
    turned = np.array([20 * np.cos(np.pi / 6) + 6, 10 + 12 * np.cos(np.pi / 6)]) / 2
    assert keep.all() and np.allclose(found, [[*(middle - turned), *(middle + turned)]])


@pytest.mark.parametrize(
    ("name", "sign", "left"),
    [
        ("translate_x", 1, [0, 30, 14, 40]),
        ("translate_x", -1, [56, 30, 80, 40]),
        ("translate_y", 1, [20, 0, 50, 4]),
        ("translate_y", -1, [20, 66, 50, 76]),
    ],
)
def test_what_a_shift_moves_out_counts_as_if_it_were_cropped(name, sign, left):
    """By 36 of 80 pixels, in the lower right quarter of an image."""
    warps = (warp(name, 1.0, sign, 80, 80),)
    geometry = Geometry((40, 40, 80, 80), 80, 80, warps=warps)
    box = np.array([[50.0, 55, 65, 60]])  # 30 x 10 pixels of the output
    share = (left[2] - left[0]) * (left[3] - left[1]) / 300
    for least in (0.0, share - 0.001, share + 0.001):
        found, keep = cut_boxes(box, geometry, (80, 80), min(least, 1.0))
        assert np.allclose(found, [left])
        assert keep.all() == (least < share or share == 1)
    # Of 65 pixels of its width a crop leaves 50, and the second shift 44 of them: 0.77 and 0.88 are
    # more than 0.7, but not both together.
    box[0, 0] = 32.5
    for at, kept in ((Geometry(geometry.crop, 80, 80), True), (geometry, left[1] == 66)):
        assert cut_boxes(box, at, (80, 80), 0.7)[1].all() == kept


def test_what_is_left_of_a_box_after_two_turns():
    """The box around what is left of the box, not of the box around it: as exact as its mask."""
    warps = warp("rotate", 1.0, 1, 60, 80), warp("rotate", 0.8, -1, 60, 80)
    geometry = Geometry((0, 0, 40, 30), 60, 80, flip=True, warps=warps)
    rng = np.random.default_rng(0)
    for _ in range(50):
        x0, y0 = corner = rng.uniform(0, (25, 18))
        x1, y1 = corner + rng.uniform(3, 12, 2)
        ((box,), (keep,)) = cut_boxes(np.array([[x0, y0, x1, y1]]), geometry, (30, 40), 0.0)
        mask = segmentation_mask([[x0, y0, x1, y0, x1, y1, x0, y1]], geometry, (30, 40))
        mask &= shown_mask(geometry)
        assert keep == mask.any()
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        around = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        assert np.abs(box - around).max() < 2.5  # corners are sharp


@pytest.mark.parametrize("flip", [False, True])
def test_run_lengths_and_polygons_are_moved_alike(flip):
    """They differ where a corner of a pixel of the image, as large as 4 x 4 of the output, is."""
    for name in MOVING:
        for sign in (-1, 1):
            warps = warp(name, 0.7, sign, 80, 120), warp("rotate", 0.3, 1, 80, 120)
            geometry = Geometry((5, 5, 35, 25), 80, 120, flip, warps)
            polygon = [[8, 9, 30, 9, 30, 21, 8, 21]]
            full = segmentation_mask(polygon, Geometry((0, 0, 40, 30), 30, 40), (30, 40))
            runs = {"size": [30, 40], "counts": run_lengths(full)}
            shown = shown_mask(geometry)
            from_polygon = segmentation_mask(polygon, geometry, (30, 40)) & shown
            from_runs = segmentation_mask(runs, geometry, (30, 40)) & shown
            assert from_polygon.sum() > 1000
            assert (from_polygon != from_runs).sum() <= 3, name  # rounding at the very edge


def test_all_may_leave_the_picture():
    """Shifts of 0.45 of the width, three times."""
    away = warp("translate_x", 1.0, 1, 30, 40)
    geometry = Geometry((0, 0, 40, 30), 30, 40, warps=(away,) * 3)
    assert not shown_mask(geometry).any()
    assert geometry.left(np.array([[1.0, 1], [9, 1], [9, 9]])).shape == (0, 2)
    boxes, keep = cut_boxes(np.array([[2.0, 2, 9, 9], [5, 5, 5, 9]]), geometry, (30, 40), 0.0)
    assert not keep.any() and np.isfinite(boxes).all()
    assert seen_by(np.ones((30, 40), dtype=bool), geometry).shape == (30, 40)
