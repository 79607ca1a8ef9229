"""Crops, sizes and colours; the same generator gives the same pixels."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from data_pipeline.crops import keep_aspect_size, random_box, resize
from data_pipeline.decode import DecodeError
from data_pipeline.rng import sample_rng
from data_pipeline.transforms import ImageSettings, ImageTransform
from tests.data_pipeline.photos import encoded, jpeg, picture

GOLDENS = Path(__file__).parents[1] / "goldens"


def rng(position: int = 0) -> np.random.Generator:
    return sample_rng(0, "task", position, "image")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(((a.astype(float) - b.astype(float)) ** 2).mean(), 1e-9))


def test_keep_aspect_sizes_are_those_of_the_original():
    for case in json.loads((GOLDENS / "git_orig_minmax_resize.json").read_text()):
        found = keep_aspect_size(case["h"], case["w"], case["min"], case["max"])
        assert list(found) == case["out_h_w"], case


@pytest.mark.parametrize("mode", ["random_resized_crop", "center_crop"])
def test_fixed_sizes(mode):
    transform = ImageTransform(ImageSettings(size=32, mode=mode))
    for height, width in [(60, 80), (31, 33), (32, 32), (5, 300), (300, 5), (1, 1)]:
        for draws in (rng(), None):
            image = transform(encoded(picture(1, height, width), "PNG"), draws)
            assert image.shape == (32, 32, 3)
            assert image.dtype == np.uint8


def test_same_generator_same_pixels_other_generator_others():
    settings = ImageSettings(size=32, flip_probability=0.5, brightness=0.4, saturation=0.4)
    data = jpeg(picture(2))
    first = ImageTransform(settings)(data, rng(5))
    assert np.array_equal(ImageTransform(settings)(data, rng(5)), first)
    assert not np.array_equal(ImageTransform(settings)(data, rng(6)), first)


def test_out_is_written_in_place():
    transform = ImageTransform(ImageSettings(size=32, flip_probability=0.5, contrast=0.5))
    batch = np.zeros((3, 32, 32, 3), dtype=np.uint8)
    for position in range(20):
        returned = transform(jpeg(picture(3)), rng(position), batch[1])
        assert np.shares_memory(returned, batch)
        assert np.array_equal(batch[1], transform(jpeg(picture(3)), rng(position)))
        assert not batch[0].any() and not batch[2].any()
    transform(jpeg(picture(3)), None, batch[2])
    assert np.array_equal(batch[2], transform(jpeg(picture(3)), None))


def test_evaluation_cuts_the_middle():
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 20:60] = 200
    image = ImageTransform(ImageSettings(size=40))(encoded(pixels, "PNG"), None)
    assert (image == 200).all()


def test_keep_aspect_keeps_it():
    transform = ImageTransform(ImageSettings(size=32, max_size=64, mode="keep_aspect"))
    assert transform(jpeg(picture(4, 60, 80)), None).shape == (32, 42, 3)
    assert transform(jpeg(picture(4, 60, 240)), None).shape == (16, 64, 3)
    assert transform(jpeg(picture(4, 80, 60)), rng()).shape == (42, 32, 3)


def test_lines_of_pixels_do_not_explode():
    settings = ImageSettings(size=224, mode="keep_aspect", max_pixels=100_000)
    with pytest.raises(DecodeError, match="would be resized"):
        ImageTransform(settings)(encoded(picture(5, 1, 1000), "PNG"), None)


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


def test_scaled_decode_gives_the_same_picture():
    """Reduced decoding may change rounding, not content: compared where crops are large."""
    data = jpeg(picture(6, 600, 800))
    shared = {"size": 32, "scale": (0.5, 1.0)}
    full = ImageTransform(ImageSettings(**shared, scaled_decode_margin=None))
    scaled = ImageTransform(ImageSettings(**shared, scaled_decode_margin=2.0))
    pairs = [(full(data, rng(i)), scaled(data, rng(i))) for i in range(20)]
    assert all(psnr(a, b) > 36 for a, b in pairs)
    assert not any(np.array_equal(a, b) for a, b in pairs)  # it did decode at another scale
    assert np.array_equal(full(data, None), scaled(data, None))  # never in evaluation


def test_scaled_decode_respects_its_margin(monkeypatch):
    import data_pipeline.transforms as transforms

    factors = []
    original = transforms.decode

    def spy(data, header, factor, scratch):
        factors.append(factor)
        return original(data, header, factor, scratch)

    monkeypatch.setattr(transforms, "decode", spy)
    data = jpeg(picture(7, 512, 512))
    for margin in (1.0, 2.0, 4.0, 8.1):
        settings = ImageSettings(size=64, scale=(1, 1), ratio=(1, 1), scaled_decode_margin=margin)
        ImageTransform(settings)(data, rng())
    assert factors == [8, 4, 2, 1]


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


def test_flip_happens_as_often_as_asked():
    data = encoded(picture(9, 32, 32), "PNG")
    settings = {"size": 32, "mode": "center_crop"}
    plain = ImageTransform(ImageSettings(**settings))(data, None)
    for probability, low, high in [(0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)]:
        transform = ImageTransform(ImageSettings(**settings, flip_probability=probability))
        images = [transform(data, rng(i)) for i in range(200)]
        assert low <= sum(np.array_equal(image, plain[:, ::-1]) for image in images) <= high


def test_threads_do_not_change_pixels():
    transform = ImageTransform(ImageSettings(size=200))
    data, threads = jpeg(picture(11, 300, 400)), (cv2.getNumThreads(), torch.get_num_threads())
    try:
        cv2.setNumThreads(4)
        torch.set_num_threads(4)
        many = transform(data, rng())
        cv2.setNumThreads(0)
        torch.set_num_threads(1)
        assert np.array_equal(transform(data, rng()), many)
    finally:
        cv2.setNumThreads(threads[0])
        torch.set_num_threads(threads[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"ratio": (0, 1)}, "ratio"),
        ({"max_size": 300}, "mode keep_aspect"),
        ({"mode": "keep_aspect", "size": 300, "max_size": 200}, "smaller than size"),
        ({"std": (0, 1, 1)}, "std"),
        ({"jitter": (2.0, 0.1)}, "jitter"),
        ({"mode": "keep_aspect", "sizes": [32]}, "sizes is not for mode keep_aspect"),
        ({"sizes": [32, 0]}, "sizes: must be positive"),
        ({"sise": 3}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        ImageSettings(**fields)
