"""Digit scenes are functions of their seed, captions tell the truth, held-out digits stay held
out."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tools.make_shards import scenes as digit_scenes
from tools.make_shards.scenes import COLOURS, DIGIT_WORDS, digit_pool, make_scene, run_lengths


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(index) for index in range(200)]


def test_held_out_digits_are_never_trained_on():
    train, heldout = (set(digit_pool(split).tolist()) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (1437, 360) and not train & heldout
    for seed in (0, 1):
        for index in range(40):
            assert set(make_scene(index, split="heldout", seed=seed).sources) <= heldout
            assert set(make_scene(index, split="train", seed=seed).sources) <= train


def test_a_scene_is_a_function_of_seed_split_and_index():
    again = make_scene(3)
    make_scene(8)
    np.testing.assert_array_equal(make_scene(3).image, again.image)
    assert make_scene(3).captions == again.captions
    others = [make_scene(4), make_scene(3, seed=1), make_scene(3, split="heldout")]
    assert all((other.image != again.image).any() for other in others)


def test_boxes_are_tight_around_masks_and_apart(scenes):
    for scene in scenes:
        for mask, (x0, y0, x1, y1) in zip(scene.masks, scene.boxes, strict=True):
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 20
            for edge in (mask[y0, :], mask[y1 - 1, :], mask[:, x0], mask[:, x1 - 1]):
                assert edge.any()
        if len(scene.boxes) == 2:
            assert not (scene.masks[0] & scene.masks[1]).any()


def test_digits_stand_where_and_look_as_the_captions_say(scenes):
    for scene in scenes:
        half = scene.image.shape[0] / 2
        for mask, box, colour, corner in zip(
            scene.masks, scene.boxes, scene.colours, scene.corners, strict=True
        ):
            assert corner == (
                f"{'top' if box[[1, 3]].mean() < half else 'bottom'} "
                f"{'left' if box[[0, 2]].mean() < half else 'right'}"
            )
            seen = scene.image[mask].mean(0)
            distances = {name: np.abs(seen - rgb).sum() for name, rgb in COLOURS.items()}
            assert min(distances, key=distances.get) == colour


def test_digits_stand_out_from_the_background(scenes):
    for scene in scenes:
        outside = scene.image[~scene.masks.any(0)].astype(float)
        for mask in scene.masks:
            # Brightest channel: all colours are brighter in it than the background may be.
            assert scene.image[mask].max(1).mean() > outside.max(1).mean() + 30


def test_captions_word_the_same_facts_differently(scenes):
    generic = 0
    for scene in scenes:
        assert len(set(scene.captions)) == digit_scenes.CAPTIONS_PER_SCENE
        for number, caption in enumerate(scene.captions):
            for digit, colour, corner in zip(
                scene.digits, scene.colours, scene.corners, strict=True
            ):
                assert colour in caption and corner in caption
                named = f"a {colour} {DIGIT_WORDS[digit]}" in caption
                assert named or (number > 0 and f"a {colour} digit" in caption)
            generic += "digit " in caption.replace("digits", "")
    first = scenes[0]
    assert first.captions[0].startswith(f"a {first.colours[0]} {DIGIT_WORDS[first.digits[0]]} at")
    assert 0.15 < generic / (len(scenes) * 5) < 0.35


def test_labels_are_those_of_scikit_learn(scenes):
    from sklearn.datasets import load_digits

    target = load_digits().target
    for scene in scenes:
        assert tuple(target[list(scene.sources)]) == scene.digits
    assert {digit for scene in scenes for digit in scene.digits} == set(range(10))


def test_share_of_two_digit_scenes(scenes):
    assert 0.4 < np.mean([len(scene.digits) == 2 for scene in scenes]) < 0.6
    assert all(len(make_scene(n, two_digit_share=0).digits) == 1 for n in range(20))
    assert all(len(make_scene(n, two_digit_share=1).digits) == 2 for n in range(20))


def test_large_digits():
    """One of about two thirds of the side; the caption tells the corner of its centre."""
    scenes = [make_scene(n, size=40, large=True) for n in range(60)]
    assert {len(scene.digits) for scene in scenes} == {1}
    for scene in scenes:
        x0, y0, x1, y1 = scene.boxes[0]
        assert 14 <= max(x1 - x0, y1 - y0) <= 31
        (corner,) = scene.corners
        assert corner in scene.captions[0]
        # The box of the ink is not quite centred in the digit's own square.
        if abs(y0 + y1 - 40) > 6:
            assert corner.startswith("bottom" if y0 + y1 > 40 else "top")
        if abs(x0 + x1 - 40) > 10:
            assert corner.endswith("right" if x0 + x1 > 40 else "left")
    assert len({scene.corners for scene in scenes}) == 4


def test_members(scenes):
    for scene in scenes[:20]:
        members = digit_scenes.scene_members(scene)
        record = json.loads(members["json"])
        image = np.asarray(Image.open(io.BytesIO(members["jpg"])).convert("RGB"), dtype=float)
        assert np.abs(image - scene.image).mean() < 6
        assert (record["width"], record["height"]) == (64, 64)
        assert record["captions"] == list(scene.captions)
        assert record["boxes"] == scene.boxes.tolist() and record["labels"] == list(scene.digits)
        if len(scene.digits) == 1:
            assert members["cls"] == str(record["label"]).encode()
        else:
            assert "cls" not in members and "label" not in record
        for mask, encoded in zip(scene.masks, record["segmentations"], strict=True):
            np.testing.assert_array_equal(decode(encoded), mask)


def decode(encoded: dict) -> np.ndarray:
    height, width = encoded["size"]
    values = np.repeat(np.arange(len(encoded["counts"])) % 2, encoded["counts"])
    return values.reshape(width, height).T.astype(bool)


@pytest.mark.parametrize("first", [False, True])
def test_run_lengths_begin_with_unset_pixels(first):
    mask = np.zeros((3, 4), bool)
    mask[0, 0] = first
    mask[2, 1] = True
    encoded = run_lengths(mask)
    assert encoded["counts"] == ([0, 1, 4, 1, 6] if first else [5, 1, 6])
    np.testing.assert_array_equal(decode(encoded), mask)


def test_sizes():
    for size in (32, 33, 96):
        scene = make_scene(0, size=size, two_digit_share=1)
        assert scene.image.shape == (size, size, 3) and scene.masks.shape == (2, size, size)
    for wrong in ({"size": 31}, {"split": "test"}, {"two_digit_share": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            make_scene(0, **wrong)
