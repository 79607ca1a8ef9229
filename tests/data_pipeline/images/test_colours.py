"""Colour jitter, greyscale, blur, solarisation and hue."""

import colorsys

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter

from data_pipeline.images.colours import (
    Colours,
    ColourSettings,
    apply_colours,
    color_jitter,
    draw_colours,
)
from tests.data_pipeline.photos import picture

GREY = np.array([0.299, 0.587, 0.114])


def changed(pixels: np.ndarray, **colours) -> np.ndarray:
    image = pixels.copy()
    apply_colours(image, Colours(**colours))
    return image


def draws(seed: int, **settings) -> Colours:
    drawn = np.random.default_rng(seed).random(10)
    return draw_colours(ColourSettings(**settings), drawn[:3], drawn[3:])


def share(name: str, count: int = 600, **settings) -> float:
    """How often a change is drawn."""
    return np.mean(
        [
            getattr(draws(seed, **settings), name) != getattr(Colours(), name)
            for seed in range(count)
        ]
    )


def test_nothing_is_changed_without_settings():
    assert draws(0) == Colours()
    assert np.array_equal(changed(picture(0)), picture(0))


def test_color_jitter_is_what_it_says():
    pixels = picture(10)
    grey = pixels @ GREY
    brighter, flatter, greyer = pixels.copy(), pixels.copy(), pixels.copy()
    color_jitter(brighter, 1.3, 1, 1)
    assert np.array_equal(brighter, np.clip(np.rint(pixels * 1.3), 0, 255))
    color_jitter(flatter, 1, 0.5, 1)
    assert np.abs(flatter - (grey.mean() + (pixels - grey.mean()) * 0.5)).max() < 1.01
    color_jitter(greyer, 1, 1, 0.25)
    assert np.abs(greyer - (grey[:, :, None] * 0.75 + pixels * 0.25)).max() < 1.01
    same = pixels.copy()
    color_jitter(same, 1, 1, 1)
    assert np.array_equal(same, pixels)


def test_greyscale_and_solarisation():
    pixels = picture(1)
    grey = np.repeat((pixels @ GREY)[:, :, None], 3, axis=2)
    assert np.abs(changed(pixels, grayscale=True) - grey).max() < 1.01
    expected = np.where(pixels < 128, pixels, 255 - pixels)
    assert np.array_equal(changed(pixels, solarize=True), expected)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_gaussian(sigma):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    expected = gaussian_filter(pixels.astype(float), (sigma, sigma, 0), mode="mirror", truncate=4)
    assert np.abs(changed(pixels, blur=sigma) - expected).mean() < 0.8


@pytest.mark.parametrize("turns", [-0.4, -0.1, 0.1, 0.5])
def test_hue_turns(turns):
    pixels = picture(2)
    found = changed(pixels, hue=turns)
    steps = round(turns * 256) / 256
    for place in [(5, 5), (20, 60), (40, 30), (59, 79)]:
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[place] / 255))
        expected = np.array(colorsys.hsv_to_rgb((hue + steps) % 1, saturation, value)) * 255
        assert np.abs(found[place] - expected).max() < 9  # hue has 256 steps


def test_a_part_of_an_image_is_changed_in_place():
    """As large-scale jitter needs it, whose padding keeps its colour."""
    every = {
        "brightness": 1.2,
        "contrast": 0.7,
        "saturation": 1.4,
        "hue": 0.1,
        "grayscale": True,
        "blur": 1.0,
        "solarize": True,
    }
    for name, value in every.items():
        canvas = np.full((70, 90, 3), 7, np.uint8)
        canvas[:60, :80] = picture(3)
        apply_colours(canvas[:60, :80], Colours(**{name: value}))
        assert np.array_equal(canvas[:60, :80], changed(picture(3), **{name: value})), name
        assert (canvas[60:] == 7).all() and (canvas[:, 80:] == 7).all(), name


def test_chances():
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    for name in jitter:
        assert abs(share(name, **jitter, jitter_probability=0.8) - 0.8) < 0.05
        assert share(name, **jitter, jitter_probability=0.0) == 0
    assert abs(share("grayscale", grayscale_probability=0.2) - 0.2) < 0.05
    assert abs(share("blur", blur_probability=0.5) - 0.5) < 0.06
    assert abs(share("solarize", solarize_probability=0.2) - 0.2) < 0.05


def test_ranges():
    drawn = [draws(s, brightness=0.4, hue=0.1, blur_probability=1.0) for s in range(500)]
    for name, low, high in [("brightness", 0.6, 1.4), ("hue", -0.1, 0.1), ("blur", 0.1, 2.0)]:
        values = [getattr(colours, name) for colours in drawn]
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
    assert min(draws(s, brightness=3.0).brightness for s in range(50)) == 0


def test_three_augment_makes_one_of_three():
    drawn = [draws(seed, three_augment=True) for seed in range(600)]
    assert all(c.grayscale + (c.blur > 0) + c.solarize == 1 for c in drawn)
    for name in ("grayscale", "blur", "solarize"):
        assert abs(share(name, three_augment=True) - 1 / 3) < 0.06


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blur_sigma": (2.0, 1.0)}, "blur_sigma"),
        ({"three_augment": True, "blur_probability": 0.5}, "remove blur_probability=0.5"),
        ({"hue": 0.6}, "hue"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        ColourSettings(**fields)
