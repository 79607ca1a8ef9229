"""Digit scenes: real handwritten digits, coloured and pasted onto textured canvases.

A data set that needs no download (the digits come with scikit-learn) and carries a target for each
kind of training: captions, a class, boxes and masks. Scene i is a function of (seed, split, i)
alone. Scenes of the split "heldout" use digits that no scene of "train" uses.
"""

import functools
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from data_pipeline.rng import sample_rng

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (235, 60, 50),
    "green": (70, 205, 80),
    "blue": (75, 120, 255),
    "yellow": (250, 220, 60),
    "purple": (195, 85, 235),
    "white": (245, 245, 245),
}
CORNERS = ("top left", "top right", "bottom left", "bottom right")
CAPTIONS_PER_SCENE = 5
LICENCE = (
    "Digits: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine "
    "Learning Repository, CC BY 4.0, as distributed with scikit-learn (load_digits). Scenes: "
    "generated, no further rights claimed."
)

_HELD_OUT_DIGITS = 360
# The split of the digits must be the same for every seed: scenes for training made with one seed
# and held-out scenes made with another must still not share a digit.
_SPLIT_SEED = 1797
_SMALLEST_SIZE = 32
_JPEG_QUALITY = 92
_NOISE_STD = 5.0

# {a} and {b} are noun phrases of the digits, {at_a} and {at_b} their corners.
_ONE = (
    "there is {a} at the {at_a}",
    "{a} in the {at_a} corner",
    "the {at_a} corner shows {a}",
    "the picture has {a} at the {at_a}",
    "at the {at_a} stands {a}",
)
_TWO = (
    "there is {a} at the {at_a} and {b} at the {at_b}",
    "{a} in the {at_a} corner and {b} in the {at_b} corner",
    "the {at_a} corner shows {a} , the {at_b} corner {b}",
    "two digits : {a} at the {at_a} and {b} at the {at_b}",
    "{b} at the {at_b} and {a} at the {at_a}",
)
_GENERIC_SHARE = 0.3


@dataclass(frozen=True)
class Scene:
    """One scene with everything that is known about it."""

    image: np.ndarray
    """(S, S, 3) uint8 RGB."""
    masks: np.ndarray
    """(digits, S, S) bool, in reading order: top to bottom, then left to right."""
    boxes: np.ndarray
    """(digits, 4) int: x0, y0, x1, y1 in pixels around each mask; x1 and y1 are behind it."""
    digits: tuple[int, ...]
    colours: tuple[str, ...]
    corners: tuple[str, ...]
    sources: tuple[int, ...]
    """Which of scikit-learn's digit images were used."""
    captions: tuple[str, ...]
    """CAPTIONS_PER_SCENE texts; the first is "a red seven at the top left" or two such, joined."""


def digit_pool(split: Split) -> np.ndarray:
    """Return the numbers of the digit images of a split: 1,437 for training, 360 held out."""
    images, _ = _digits()
    order = np.random.Generator(np.random.Philox(_SPLIT_SEED)).permutation(len(images))
    chosen = order[:_HELD_OUT_DIGITS] if split == "heldout" else order[_HELD_OUT_DIGITS:]
    return np.sort(chosen)


def make_scene(
    index: int,
    *,
    split: Split = "train",
    seed: int = 0,
    size: int = 64,
    two_digit_share: float = 0.5,
    large: bool = False,
) -> Scene:
    """Draw scene `index` of a split.

    Args: size: side of the square image in pixels, at least 32; two_digit_share: probability of a
    second digit; large: one digit of about two thirds of the side, anywhere, whose corner is that
    of its centre: a small vision transformer learns to read these in minutes.
    Errors: ValueError for arguments out of range.
    """
    if split not in SPLITS or size < _SMALLEST_SIZE or not 0 <= two_digit_share <= 1:
        raise ValueError(
            f"split {split!r}, size {size}, two_digit_share {two_digit_share}: must be one of "
            f"{SPLITS}, at least {_SMALLEST_SIZE}, and between 0 and 1"
        )
    rng = sample_rng(seed, f"digit_scenes/{split}", index, "scene")
    images, labels = _digits()
    count = 2 if rng.random() < two_digit_share and not large else 1
    places = np.sort(rng.choice(len(CORNERS), count, replace=False))
    sources = rng.choice(digit_pool(split), count, replace=False)
    colours = [list(COLOURS)[c] for c in rng.integers(len(COLOURS), size=count)]
    canvas = _background(rng, size)
    masks = []
    for place, source, colour in zip(places, sources, colours, strict=True):
        if large:
            opacity, places = _place_anywhere(images[source], size, rng)
        else:
            opacity = _place(images[source], int(place), size, rng)
        shade = np.array(COLOURS[colour]) * rng.uniform(0.88, 1.0) + rng.normal(0, 6, 3)
        canvas += opacity[..., None] * (shade - canvas)
        masks.append(opacity > 0.5)
    canvas += rng.normal(0, _NOISE_STD, canvas.shape)
    digits = tuple(int(labels[source]) for source in sources)
    corners = tuple(CORNERS[place] for place in places)
    return Scene(
        image=np.clip(np.rint(canvas), 0, 255).astype(np.uint8),
        masks=np.stack(masks),
        boxes=np.stack([_box(mask) for mask in masks]),
        digits=digits,
        colours=tuple(colours),
        corners=corners,
        sources=tuple(int(source) for source in sources),
        captions=_captions(rng, digits, tuple(colours), corners),
    )


def scene_members(scene: Scene) -> dict[str, bytes]:
    """Return the members of a scene for a shard: jpg, json and, for a single digit, cls.

    The json member: captions (5 str), boxes (xyxy pixels), labels (digit of each box),
    segmentations (COCO run lengths), colours, corners, sources, width, height, and `label` if the
    scene has one digit.
    """
    height, width, _ = scene.image.shape
    record: dict[str, object] = {
        "captions": scene.captions,
        "width": width,
        "height": height,
        "boxes": scene.boxes.tolist(),
        "labels": scene.digits,
        "segmentations": [run_lengths(mask) for mask in scene.masks],
        "colours": scene.colours,
        "corners": scene.corners,
        "sources": scene.sources,
    }
    single = len(scene.digits) == 1
    if single:
        record["label"] = scene.digits[0]
    buffer = io.BytesIO()
    # Full colour resolution: thin coloured strokes would bleed otherwise.
    Image.fromarray(scene.image).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    members = {"jpg": buffer.getvalue(), "json": json.dumps(record, allow_nan=False).encode()}
    return members | ({"cls": str(scene.digits[0]).encode()} if single else {})


@dataclass(frozen=True)
class BuildScene:
    """Makes the members of digit scene number `item`; processes that pack read it by its name."""

    split: Split
    seed: int
    size: int
    two_digit_share: float
    large: bool

    def __call__(self, item: int) -> dict[str, bytes]:
        """Draw the scene and encode it."""
        scene = make_scene(
            item,
            split=self.split,
            seed=self.seed,
            size=self.size,
            two_digit_share=self.two_digit_share,
            large=self.large,
        )
        return scene_members(scene)


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Encode an (H, W) bool mask as uncompressed COCO RLE.

    Counts alternate between unset and set pixels, column by column, beginning with unset ones.
    """
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return images (1797, 8, 8) float32 in [0, 1] and labels (1797,)."""
    from sklearn.datasets import load_digits  # slow to import, and needed here only

    bunch = load_digits()
    return (bunch.images / 16.0).astype(np.float32), bunch.target


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a smooth, muted texture (size, size, 3) float64: coarse and finer blobs."""
    import cv2  # not for `--help`

    level = rng.uniform(45, 105)
    canvas = np.full((size, size, 3), level)
    for cells, strength in ((3, 24.0), (7, 12.0)):
        blobs = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        canvas += cv2.resize(blobs, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(canvas, 15, 150)


def _place(digit: np.ndarray, place: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Scale an (8, 8) digit up and put it into its corner: opacity (size, size) in [0, 1]."""
    half = size // 2
    side = int(rng.integers(round(0.4 * size), half - 1))
    x, y = rng.integers(1, half - side, size=2)
    return _opacity(digit, side, (place // 2) * half + int(y), (place % 2) * half + int(x), size)


def _place_anywhere(
    digit: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Scale an (8, 8) digit to about two thirds of the side: opacity, and its corner (1,)."""
    side = int(rng.integers(round(0.6 * size), round(0.75 * size) + 1))
    left, top = (int(at) for at in rng.integers(0, size - side + 1, size=2))
    low, right = (2 * at + side > size for at in (top, left))
    return _opacity(digit, side, top, left, size), np.array([2 * low + right])


def _opacity(digit: np.ndarray, side: int, top: int, left: int, size: int) -> np.ndarray:
    import cv2

    # The strokes of these digits touch the border; without a margin they would look cut off.
    glyph = cv2.resize(np.pad(digit, 1), (side, side), interpolation=cv2.INTER_CUBIC)
    # Ink edges become steep but stay antialiased.
    glyph = np.clip((glyph - 0.25) / 0.5, 0, 1)
    opacity = np.zeros((size, size))
    opacity[top : top + side, left : left + side] = glyph * glyph * (3 - 2 * glyph)
    return opacity


def _box(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def _captions(
    rng: np.random.Generator,
    digits: tuple[int, ...],
    colours: tuple[str, ...],
    corners: tuple[str, ...],
) -> tuple[str, ...]:
    """Word the same facts in several ways; some texts say "digit" instead of which one."""
    named = [f"a {c} {DIGIT_WORDS[d]}" for c, d in zip(colours, digits, strict=True)]
    generic = [f"a {c} digit" for c in colours]
    captions = [" and ".join(f"{n} at the {at}" for n, at in zip(named, corners, strict=True))]
    templates = _ONE if len(digits) == 1 else _TWO
    for number in rng.permutation(len(templates))[: CAPTIONS_PER_SCENE - 1]:
        a_and_b = generic if rng.random() < _GENERIC_SHARE else named
        captions.append(
            templates[number].format(a=a_and_b[0], b=a_and_b[-1], at_a=corners[0], at_b=corners[-1])
        )
    return tuple(captions)
