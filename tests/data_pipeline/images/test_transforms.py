"""Crops, sizes and colours; the same generator gives the same pixels."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from data_pipeline.images.crops import at_scale
from data_pipeline.images.decode import DecodeError, decode, grid_origin, read_header
from data_pipeline.images.transforms import ImageSettings, ImageTransform, View
from data_pipeline.rng import sample_rng
from tests.data_pipeline.photos import encoded, jpeg, photograph, picture


def rng(position: int = 0) -> np.random.Generator:
    return sample_rng(0, "task", position, "image")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(((a.astype(float) - b.astype(float)) ** 2).mean(), 1e-9))


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


def scaled_and_whole(data: bytes, settings: ImageSettings, draws) -> tuple[View, View, int]:
    """One crop made from the reduced image and from the full one, and the factor."""
    transform = ImageTransform(settings)
    header = read_header(data, settings.max_pixels)
    cut = transform.plan(header, draws())
    views = []
    for factor in (cut.factor, 1):
        place = at_scale(cut.box, factor, grid_origin(header, factor))
        region = decode(data, header, factor, window=place)
        after_plan = draws()
        transform.plan(header, after_plan)
        views.append(transform.render(region, cut, after_plan, None))
    return *views, cut.factor


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["random_resized_crop", "large_scale_jitter"])
def test_scaled_decode_shows_the_same_region(mode, orientation):
    """Also where neither side is a multiple of the factor, and the grid begins inside."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = photograph(orientation, 589, 805)
    data = encoded(pixels, "JPEG", quality=92, exif=exif, subsampling=2)
    settings = ImageSettings(size=48, mode=mode, scale=(0.1, 1.0), jitter=(0.3, 2.0))
    factors = set()
    for position in range(12):
        scaled, whole, factor = scaled_and_whole(data, settings, lambda p=position: rng(p))
        factors.add(factor)
        assert scaled.geometry == whole.geometry
        if factor > 1:
            assert psnr(scaled.image, whole.image) > 39
            # A step of one reduced pixel to the side would be seen.
            assert psnr(np.roll(scaled.image, 1, 1), whole.image) < 34
    assert len(factors) > 1


def test_scaled_decode_is_faithful_enough():
    """At the margin that recipes have by default."""
    data = encoded(photograph(1, 1000, 1500), "JPEG", quality=90)
    settings = ImageSettings(size=128, scale=(0.35, 1.0))
    found = [scaled_and_whole(data, settings, lambda p=p: rng(p)) for p in range(6)]
    assert all(factor > 1 for *_, factor in found)
    assert np.mean([psnr(scaled.image, whole.image) for scaled, whole, _ in found]) > 43


def test_odd_jpegs_are_reduced_to_the_same_picture():
    """Bytes after the end send a JPEG through Pillow, which has another filter."""
    data = encoded(photograph(2, 589, 805), "JPEG", quality=92)
    transform = ImageTransform(ImageSettings(size=48))
    for position in range(6):
        plain, odd = (transform(d, rng(position)) for d in (data, data + b"tail" * 100))
        assert psnr(plain, odd) > 35


def test_evaluation_never_decodes_at_another_scale():
    data = jpeg(picture(6, 600, 800))
    for mode in ("random_resized_crop", "large_scale_jitter"):
        images = [
            ImageTransform(ImageSettings(size=32, mode=mode, scaled_decode_margin=m))(data, None)
            for m in (None, 1.0)
        ]
        assert np.array_equal(*images)


def test_scaled_decode_respects_its_margin(monkeypatch):
    import data_pipeline.images.transforms as transforms

    factors = []
    original = transforms.decode

    def spy(data, header, factor, scratch, window):
        factors.append(factor)
        return original(data, header, factor, scratch, window)

    monkeypatch.setattr(transforms, "decode", spy)
    data = jpeg(picture(7, 512, 512))
    for margin in (1.0, 2.0, 4.0, 8.1):
        settings = ImageSettings(size=64, scale=(1, 1), ratio=(1, 1), scaled_decode_margin=margin)
        ImageTransform(settings)(data, rng())
    assert factors == [8, 4, 2, 1]


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
