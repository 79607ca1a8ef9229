"""RandAugment: each operation against Pillow's, and the draws."""

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageEnhance, ImageOps
from pydantic import ValidationError

from data_pipeline.images.rand_augment import NAMES, RandAugmentSettings, augment, rand_augment
from data_pipeline.images.transforms import ImageSettings, ImageTransform
from data_pipeline.rng import sample_rng
from tests.data_pipeline.photos import encoded, picture

FILL = (124, 116, 104)
SHARES = (0.0, 0.3, 0.87, 1.0)

ENHANCERS = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}


def rng(position: int) -> np.random.Generator:
    return sample_rng(0, "task", position, "image")


def changed(pixels: np.ndarray, name: str, share: float = 1.0, sign: int = 1) -> np.ndarray:
    image = pixels.copy()
    augment(image, name, share, sign, FILL)
    return image


def noisy(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-20, 21, (60, 80, 3))
    return np.clip(picture(seed) * 0.8 + 30 + noise, 0, 255).astype(np.uint8)


def test_there_are_the_fifteen_of_timm():
    levels = {"auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add"}
    geometry = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
    assert len(NAMES) == 15
    assert set(NAMES) == levels | geometry | set(ENHANCERS)


@pytest.mark.parametrize("seed", range(4))
def test_operations_on_levels_are_those_of_pillow(seed):
    pixels = noisy(seed)
    image = Image.fromarray(pixels)
    assert np.array_equal(changed(pixels, "auto_contrast"), ImageOps.autocontrast(image))
    assert np.array_equal(changed(pixels, "equalize"), ImageOps.equalize(image))
    assert np.array_equal(changed(pixels, "invert"), ImageOps.invert(image))
    for share in SHARES:
        solarized = ImageOps.solarize(image, 256 - int(share * 256))
        assert np.array_equal(changed(pixels, "solarize", share), solarized)
        posterized = ImageOps.posterize(image, max(4 - int(share * 4), 1))
        assert np.array_equal(changed(pixels, "posterize", share), posterized)
        added = ImageChops.add(image, Image.new("RGB", image.size, (int(share * 110),) * 3))
        expected = np.where(pixels < 128, np.asarray(added), pixels)
        assert np.array_equal(changed(pixels, "solarize_add", share), expected)


@pytest.mark.parametrize("name", ["auto_contrast", "equalize"])
def test_flat_channels_stay_as_they_are(name):
    pixels = noisy(5)
    pixels[:, :, 1] = 77
    operation = {"auto_contrast": ImageOps.autocontrast, "equalize": ImageOps.equalize}[name]
    assert np.array_equal(changed(pixels, name), operation(Image.fromarray(pixels)))


@pytest.mark.parametrize("name", ENHANCERS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_enhancements_are_those_of_pillow(name, share, sign):
    """But for rounding: Pillow cuts fractions off, and rounds the mean grey before it is used."""
    pixels = noisy(6)
    factor = max(1 + sign * share * 0.9, 0.1)
    expected = np.asarray(ENHANCERS[name](Image.fromarray(pixels)).enhance(factor))
    difference = changed(pixels, name, share, sign).astype(int) - expected
    assert np.abs(difference).max() <= 2
    assert np.abs(difference).mean() < 0.9
    assert (factor == 1) == np.array_equal(expected, pixels)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("share", SHARES)
def test_geometry_is_that_of_pillow(share, sign):
    """Compared inside the image: at its border Pillow does not blend with the fill colour, and
    the two bicubic filters differ a little."""
    pixels = picture(7)
    image, bicubic = Image.fromarray(pixels), Image.Resampling.BICUBIC
    amount = share * sign

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, bicubic, fillcolor=FILL)

    expected = {
        "rotate": image.rotate(amount * 30, bicubic, fillcolor=FILL),
        "shear_x": affine(1, amount * 0.3, 0, 0, 1, 0),
        "shear_y": affine(1, 0, 0, amount * 0.3, 1, 0),
        "translate_x": affine(1, 0, amount * 0.45 * 80, 0, 1, 0),
        "translate_y": affine(1, 0, 0, 0, 1, amount * 0.45 * 60),
    }
    for name, theirs in expected.items():
        difference = np.abs(changed(pixels, name, share, sign).astype(int) - np.asarray(theirs))
        assert np.median(difference) <= 1, name
        assert (difference > 8).mean() < 0.04, name  # the line along the border
        if share == 0:
            assert not difference.any(), name


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2), (3, 5)])
def test_tiny_images_survive(shape):
    pixels = picture(8, *shape)
    for name in NAMES:
        assert changed(pixels, name).shape == pixels.shape


def test_views_are_changed_in_place():
    for name in NAMES:
        canvas = np.zeros((70, 90, 3), np.uint8)
        part = canvas[:60, :80]
        part[:] = noisy(9)
        expected = changed(noisy(9), name, 0.9)
        augment(part, name, 0.9, 1, FILL)
        assert np.array_equal(canvas[:60, :80], expected), name
        assert not canvas[60:].any() and not canvas[:, 80:].any(), name


def test_draws_decide():
    settings = RandAugmentSettings()
    pixels = noisy(10)
    images = []
    for position in range(60):
        image = pixels.copy()
        rand_augment(image, settings, FILL, rng(position))
        again = pixels.copy()
        rand_augment(again, settings, FILL, rng(position))
        assert np.array_equal(image, again)
        images.append(image)
    untouched = sum(np.array_equal(image, pixels) for image in images)
    assert 5 < untouched < 28  # two operations, each with a chance of one half: a quarter
    assert len({image.tobytes() for image in images}) > 30


def test_every_operation_is_drawn_in_both_directions(monkeypatch):
    import data_pipeline.images.rand_augment as module

    drawn = []
    monkeypatch.setattr(
        module, "augment", lambda i, name, share, sign, f: drawn.append((name, share, sign))
    )
    for position in range(400):
        rand_augment(noisy(11), RandAugmentSettings(probability=1), FILL, rng(position))
    assert len(drawn) == 800
    assert {(name, sign) for name, _, sign in drawn} == {(n, s) for n in NAMES for s in (-1, 1)}
    shares = np.array([share for _, share, _ in drawn])
    assert abs(shares.mean() - 0.9) < 0.02 and shares.max() == 1.0
    assert abs(shares.std() - 0.05) < 0.01


def test_without_geometry_every_pixel_stays_in_its_place(monkeypatch):
    import data_pipeline.images.rand_augment as module

    drawn = set()
    monkeypatch.setattr(module, "augment", lambda i, name, *others: drawn.add(name))
    settings = RandAugmentSettings(probability=1, geometry=False)
    for position in range(200):
        rand_augment(noisy(11), settings, FILL, rng(position))
    assert drawn == set(NAMES) - {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


def test_it_moves_no_other_draw():
    """Switching RandAugment on leaves crop, flip and colours as they were."""
    data = encoded(picture(12), "PNG")
    plain = ImageSettings(size=32, flip_probability=0.5, brightness=0.4)
    idle = plain.model_copy(update={"rand_augment": RandAugmentSettings(probability=0)})
    for position in range(5):
        expected = ImageTransform(plain)(data, rng(position))
        assert np.array_equal(ImageTransform(idle)(data, rng(position)), expected)


def test_it_is_for_training_only():
    data = encoded(picture(13, 32, 32), "PNG")
    settings = ImageSettings(size=32, rand_augment=RandAugmentSettings(probability=1))
    assert np.array_equal(ImageTransform(settings)(data, None), picture(13, 32, 32))
    assert not np.array_equal(ImageTransform(settings)(data, rng(1)), picture(13, 32, 32))


def test_impossible_settings_are_refused():
    with pytest.raises(ValidationError, match="magnitude"):
        RandAugmentSettings(magnitude=10.5)
