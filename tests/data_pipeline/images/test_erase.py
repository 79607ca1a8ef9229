"""Random erasing."""

import numpy as np
import pytest
from pydantic import ValidationError

from data_pipeline.images.erase import EraseSettings, erase
from data_pipeline.images.transforms import ImageSettings, ImageTransform
from data_pipeline.rng import sample_rng
from tests.data_pipeline.photos import encoded, picture

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.1, 0.05)


def rng(position: int) -> np.random.Generator:
    return sample_rng(0, "task", position, "image")


def erased(position: int, side: int = 64, **options) -> tuple[np.ndarray, np.ndarray]:
    """The image, white before, and where it is changed."""
    image = np.full((side, side, 3), 255, np.uint8)
    erase(image, EraseSettings(**{"probability": 1.0, **options}), MEAN, STD, rng(position))
    return image, (image != 255).any(2)


def test_one_rectangle_of_the_drawn_size():
    shares, aspects = [], []
    for position in range(300):
        _, where = erased(position, fill="mean")
        rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert where.sum() == height * width
        shares.append(height * width / 64**2)
        aspects.append(width / height)
    assert 0.015 < min(shares) < 0.04 and 0.3 < max(shares) < 0.35
    assert abs(np.mean(shares) - (0.02 + 1 / 3) / 2) < 0.02
    assert min(aspects) < 0.4 and max(aspects) > 2.5
    assert abs(np.mean(np.log(aspects))) < 0.12


def test_chance():
    changed = sum(erased(position, probability=0.25)[1].any() for position in range(400))
    assert 70 < changed < 130


def test_noise_has_the_statistics_of_the_data():
    image, where = erased(1, side=400, area=(0.3, 0.3), fill="noise")
    values = image[where] / 255
    assert np.allclose(values.mean(0), MEAN, atol=0.01)
    assert np.allclose(values.std(0), STD, rtol=0.05)


def test_colour_and_mean_are_flat():
    for position in range(10):
        image, where = erased(position, fill="colour")
        assert len(np.unique(image[where], axis=0)) == 1
        image, where = erased(position, fill="mean")
        assert np.abs(image[where] - 255 * np.array(MEAN)).max() <= 0.5
    assert len({erased(p, fill="colour")[0].min(axis=(0, 1)).tobytes() for p in range(10)}) == 10


def test_it_is_keyed_for_training_only_and_moves_no_other_draw():
    data = encoded(picture(2, 48, 48), "PNG")
    plain = ImageSettings(size=48, flip_probability=0.5, contrast=0.4)
    with_erase = plain.model_copy(update={"erase": EraseSettings(probability=1.0)})
    assert np.array_equal(ImageTransform(with_erase)(data, None), ImageTransform(plain)(data, None))
    for position in range(8):
        before = ImageTransform(plain)(data, rng(position))
        after = ImageTransform(with_erase)(data, rng(position))
        assert np.array_equal(after, ImageTransform(with_erase)(data, rng(position)))
        assert 0.01 < (after != before).any(2).mean() < 0.4  # outside of it the same pixels


def test_images_too_small_for_a_rectangle_are_left_alone():
    for position in range(20):
        _, where = erased(position, side=1)
        assert not where.any() or where.all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"area": (0.5, 0.2)}, "area"), ({"ratio": (0, 1)}, "ratio"), ({"fill": "red"}, "fill")],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        EraseSettings(**fields)
