"""Crops, their geometry and grid, and resizing."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.images.crops import (
    Box,
    Geometry,
    align,
    jittered_box,
    keep_aspect_size,
    random_box,
    resize,
)
from data_pipeline.rng import sample_rng
from tests.data_pipeline.photos import picture

GOLDENS = Path(__file__).parents[2] / "goldens"


def rng(position: int = 0) -> np.random.Generator:
    return sample_rng(0, "task", position, "image")


def test_keep_aspect_sizes_are_those_of_the_original():
    for case in json.loads((GOLDENS / "git_orig_minmax_resize.json").read_text()):
        found = keep_aspect_size(case["h"], case["w"], case["min"], case["max"])
        assert list(found) == case["out_h_w"], case


def test_boxes_stay_inside_and_in_range():
    for position in range(300):
        x, y, w, h = random_box(80, 60, (0.2, 0.9), (0.5, 2.0), rng(position))
        assert 0 <= x <= x + w <= 80
        assert 0 <= y <= y + h <= 60
        assert 0.18 < w * h / 4800 < 0.95
        assert 0.45 < w / h < 2.2


def test_boxes_reach_every_place():
    boxes = np.array([random_box(100, 100, (0.25, 0.25), (1, 1), rng(i)) for i in range(2000)])
    assert set(boxes[:, 2]) == {50}
    for place in (boxes[:, 0], boxes[:, 1]):
        assert (place.min(), place.max()) == (0, 50)
        assert abs(place.mean() - 25) < 2


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000)])
def test_without_a_fit_the_largest_centred_box_is_taken(width, height):
    x, y, w, h = random_box(width, height, (1.0, 1.0), (3 / 4, 4 / 3), rng())
    assert (w, h) == ((13, 10) if width > height else (10, 13))
    assert abs(2 * x + w - width) <= 1
    assert abs(2 * y + h - height) <= 1


def test_resize_averages_where_it_shrinks():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert abs(resize(stripes, 32, 32).astype(int) - 128)[:, 2:-2].max() <= 1
    # One side shrinks, the other grows: no aliasing in the one, no blocks in the other.
    mixed = resize(stripes, 128, 32)
    assert mixed.shape == (128, 32, 3)
    assert abs(mixed.astype(int) - 128)[:, 2:-2].max() <= 1


@pytest.mark.parametrize("size", [(224, 224), (60, 300), (7, 9), (131, 1), (400, 500), (480, 640)])
def test_resize_is_that_of_pillow(size):
    noise = np.random.default_rng(3).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    for pixels in (noise, picture(3, 480, 640)[100:250, 30:500]):
        theirs = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
        difference = np.abs(resize(pixels, *size).astype(int) - np.asarray(theirs))
        assert difference.max() <= 2 and (difference > 1).mean() < 1e-3


def test_resize_takes_flipped_and_swapped_views():
    pixels = picture(8)
    fixed = pixels.copy()
    fixed.flags.writeable = False  # as Pillow's pictures come
    views = pixels[::-1], pixels[:, ::-1], pixels.swapaxes(0, 1), pixels[10:40, 5:50], fixed
    for view in views:
        assert np.array_equal(resize(view, 20, 24), resize(np.ascontiguousarray(view), 20, 24))


@settings(max_examples=60)
@given(
    st.integers(16, 300),
    st.integers(16, 300),
    st.sampled_from([1, 2, 4, 8]),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_aligned_boxes(width, height, factor, flip_x, flip_y, data):
    x, y = data.draw(st.integers(0, width - 9)), data.draw(st.integers(0, height - 9))
    w, h = data.draw(st.integers(9, width - x)), data.draw(st.integers(9, height - y))
    origin = (width % factor if flip_x else 0, height % factor if flip_y else 0)
    found = align(Box(x, y, w, h), width, height, factor, origin)
    assert (found.x - origin[0]) % factor == (found.y - origin[1]) % factor == 0
    assert found.width % factor == found.height % factor == 0
    assert found.width > 0 and found.height > 0
    assert 0 <= found.x <= found.x + found.width <= width
    assert 0 <= found.y <= found.y + found.height <= height
    for was, now in [(x, found.x), (y, found.y), (x + w, found.x + found.width)]:
        assert abs(was - now) < factor  # half of it, but for the cut pixels at an edge
    if factor == 1:
        assert found == Box(x, y, w, h)


def test_jittered_boxes():
    """At scale 1 the whole image fits; below it shrinks, above it is cut at a random place."""
    places = set()
    for position in range(300):
        box, scale = jittered_box(200, 100, 50, (0.1, 2.0), rng(position))
        assert 0.1 * 0.25 <= scale <= 2.0 * 0.25
        assert box.width == min(200, round(50 / scale))
        assert box.height == min(100, round(50 / scale))
        assert 0 <= box.x <= 200 - box.width and 0 <= box.y <= 100 - box.height
        if box.width < 120:  # at scales from 1.67 on
            places.add(box.x)
    assert min(places) < 10 and max(places) > 70
    assert jittered_box(200, 100, 50, (1, 1), rng()) == (Box(0, 0, 200, 100), 0.25)


def test_geometry_maps_the_crop_to_the_output():
    geometry = Geometry((20.0, 20.0, 100.0, 140.0), 30, 40)
    corners = np.array([[20.0, 20.0], [100.0, 140.0], [60.0, 20.0]])
    assert geometry.points(corners).tolist() == [[0, 0], [40, 30], [20, 0]]
    flipped = Geometry(geometry.crop, 30, 40, flip=True)
    assert flipped.points(corners).tolist() == [[40, 0], [0, 30], [20, 0]]
