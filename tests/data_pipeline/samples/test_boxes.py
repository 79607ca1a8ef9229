"""Boxes and masks: read, moved with the pixels, cut, and put into batches."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from data_pipeline.images import rand_augment
from data_pipeline.images.crops import Geometry
from data_pipeline.images.erase import EraseSettings
from data_pipeline.images.formats import MEMBERS
from data_pipeline.images.rand_augment import RandAugmentSettings
from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.loader import LoaderSettings, StepLoader
from data_pipeline.loader.stream import TaskStream
from data_pipeline.order.order import Order
from data_pipeline.reading.reader import BadSample, Sample, SampleReader
from data_pipeline.rng import sample_rng
from data_pipeline.samples.boxes import BoxDataSettings, BoxProcessor
from data_pipeline.samples.masks import mask_boxes, segmentation_mask, shown_mask
from data_pipeline.samples.objects import cut_boxes
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet
from tests.data_pipeline.photos import encoded
from tests.data_pipeline.samples.test_masks import run_lengths

MODES = ("random_resized_crop", "large_scale_jitter", "center_crop", "keep_aspect")
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)


def scene(height: int = 120, width: int = 160) -> tuple[np.ndarray, dict]:
    """Three plain rectangles on black, one per class, with boxes, polygons and run lengths."""
    pixels = np.zeros((height, width, 3), np.uint8)
    boxes = [[10, 20, 60, 70], [70, 5, 150, 45], [80, 60, 120, 115]]
    for (x0, y0, x1, y1), colour in zip(boxes, COLOURS, strict=True):
        pixels[y0:y1, x0:x1] = colour
    segmentations: list = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes]
    flat = (pixels == COLOURS[2]).all(2).T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    segmentations[2] = {"size": [height, width], "counts": counts}
    record = {
        "boxes": boxes,
        "labels": [0, 1, 2],
        "crowd": [0, 0, 1],
        "segmentations": segmentations,
        "width": width,
        "height": height,
    }
    return pixels, record


def fields(train: bool = True, **options) -> BoxProcessor:
    image = ImageSettings(size=64, flip_probability=0.5)
    options = {"image": image, "shards": ["x"], "classes": 3, **options}
    return BoxProcessor(BoxDataSettings(**options), train)


def load(
    maker: BoxProcessor, record, position: int = 0, pixels=None, kind: str = "PNG", **options
) -> dict:
    data = encoded(scene()[0] if pixels is None else pixels, kind, **options)
    members = {kind.lower(): data, "json": json.dumps(record).encode()}
    return maker.sample(
        Sample(3, "a.tar", "key", members), lambda p: sample_rng(0, "detect", position, p)
    )


def painted(image: np.ndarray, label: int) -> np.ndarray:
    """Where an output shows the object of a class."""
    return (np.abs(image.astype(int) - COLOURS[label]) < 100).all(2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("train", [True, False])
def test_boxes_and_masks_follow_the_pixels(mode, train):
    image = ImageSettings(size=64, mode=mode, flip_probability=0.5, jitter=(0.4, 2.0))
    maker = fields(train, image=image, masks=True)
    seen = flipped = 0
    for position in range(25):
        item = load(maker, scene()[1], position)
        geometry = item["view"].geometry
        flipped += geometry.flip
        for box, label, mask in zip(item["boxes"], item["labels"], item["masks"], strict=True):
            shown = painted(item["images"], label)[: geometry.height, : geometry.width]
            mask = mask[: geometry.height, : geometry.width]
            if min(box[2] - box[0], box[3] - box[1]) < 6:
                continue  # resizing blurs what is small
            seen += 1
            # Colours and masks may differ along the edges, by a pixel.
            edge = 2 * (box[2] - box[0] + box[3] - box[1])
            assert (shown != mask).sum() <= edge, (position, label)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            found = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            assert np.abs(box - found).max() <= 0.51
    assert seen > 20
    assert 3 < flipped < 22 if train else flipped == 0


def test_large_scale_jitter_pads_with_the_mean():
    image = ImageSettings(size=100, mode="large_scale_jitter", jitter=(0.5, 0.5))
    item = load(fields(image=image), scene()[1])
    geometry = item["view"].geometry
    assert (geometry.height, geometry.width) == (38, 50)
    fill = np.rint(255 * np.array(image.mean))
    assert (item["images"][38:] == fill).all() and (item["images"][:, 50:] == fill).all()
    scale = 50 / 160
    assert np.allclose(
        item["boxes"][0], np.array([10, 20 * 38 / 120 / scale, 60, 70 * 38 / 120 / scale]) * scale
    )


def test_large_scale_jitter_in_evaluation_shows_the_whole_image():
    image = ImageSettings(size=80, mode="large_scale_jitter")
    item = load(fields(train=False, image=image), scene()[1])
    assert item["view"].geometry.crop == (0, 0, 160, 120)
    assert item["images"].shape == (80, 80, 3)
    assert np.allclose(item["boxes"], np.array(scene()[1]["boxes"]) / 2)


def test_what_is_cut_away_is_dropped():
    """By the share that is left, and by the side in the output."""
    crop = ImageSettings(size=120, mode="center_crop")  # shows x from 20 to 140
    boxes = [
        [0, 0, 20, 50],
        [10, 0, 30, 50],
        [16, 0, 26, 50],
        [130, 10, 140.5, 20],
        [30, 30, 30.5, 40],
        [-0.9, 0, 25, 9],
    ]
    record = {"boxes": boxes, "labels": [0] * 6}

    def left(**options) -> list:
        return load(fields(False, image=crop, **options), record)["boxes"].tolist()

    kept = [[0, 0, 10, 50], [0, 0, 6, 50], [110, 10, 120, 20], [0, 0, 5, 9]]
    assert left() == kept
    # What lies outside of the image is no part of a box: 5 of 25 columns of the last are left.
    assert left(min_visible=0.2) == kept
    assert left(min_visible=0.55) == [kept[1], kept[2]]
    assert left(min_visible=1.0) == []
    assert left(min_side=6.0) == kept[:3]
    assert left(min_side=0.1) == [*kept[:3], [10, 30, 10.5, 40], kept[3]]


def test_boxes_may_be_drawn_around_what_is_left_of_masks():
    """A triangle of which a crop leaves a tip: its box shrinks to it."""
    crop = ImageSettings(size=120, mode="center_crop")
    record = {"boxes": [[0, 0, 60, 60]], "labels": [1], "segmentations": [[[0, 0, 60, 60, 0, 60]]]}
    plain = load(fields(False, image=crop, masks=True), record)
    tight = load(fields(False, image=crop, masks=True, boxes_from_masks=True), record)
    assert plain["boxes"].tolist() == [[0, 0, 40, 60]]
    x0, y0, x1, y1 = tight["boxes"][0]
    assert (x0, y1) == (0, 60) and abs(x1 - 40) <= 1 and abs(y0 - 20) <= 1
    outside = {**record, "segmentations": [[[0, 0, 10, 10, 0, 10]]]}
    assert len(load(fields(False, image=crop, masks=True), outside)["labels"]) == 0


def test_batch():
    maker = fields(masks=True, image=ImageSettings(size=64, scale=(0.9, 1.0)))
    items = [
        load(maker, scene()[1], 1),
        None,
        load(maker, {"boxes": [], "labels": []}, 2),
        load(maker, {"note": 1}, 3),
    ]
    batch = maker.collate(items, [True, False, True, True])
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
    assert shapes == {
        "images": ((4, 3, 64, 64), torch.uint8),
        "boxes": ((4, 3, 4), torch.float32),
        "labels": ((4, 3), torch.int64),
        "crowd": ((4, 3), torch.bool),
        "counts": ((4,), torch.int64),
        "masks": ((3, 64, 64), torch.bool),
        "annotated": ((4,), torch.bool),
        "sizes": ((4, 2), torch.int64),
        "crops": ((4, 4), torch.float64),
        "flips": ((4,), torch.bool),
        "warps": ((4, 2, 3), torch.float64),
        "image_sizes": ((4, 2), torch.int64),
        "valid": ((4,), torch.bool),
    }
    assert batch["counts"].tolist() == [3, 0, 0, 0]
    assert batch["labels"].tolist() == [[0, 1, 2], [-1] * 3, [-1] * 3, [-1] * 3]
    assert batch["crowd"][0].tolist() == [False, False, True]
    assert batch["annotated"].tolist() == [True, False, True, False]
    assert batch["image_sizes"].tolist() == [[120, 160], [1, 1], [120, 160], [120, 160]]
    # From the output back to the image.
    x0, y0, x1, y1 = batch["crops"][0].tolist()
    scale = torch.tensor([(x1 - x0) / 64, (y1 - y0) / 64] * 2)
    back = batch["boxes"][0] * scale + torch.tensor([x0, y0, x0, y0])
    inside = torch.tensor(scene()[1]["boxes"]).clamp(
        torch.tensor([x0, y0] * 2), torch.tensor([x1, y1] * 2)
    )
    assert torch.allclose(back, inside.float(), atol=1e-3)
    empty = maker.collate([None, None], [False, False])
    assert empty["boxes"].shape == (2, 0, 4) and empty["masks"].shape == (0, 64, 64)
    assert "masks" not in fields().collate([None], [False])


def test_batches_are_the_same_in_workers_and_at_any_start(tmp_path):
    with ShardWriter(tmp_path, "train", max_samples=10) as writer:
        for number in range(30):
            pixels, record = scene()
            part = {
                name: record[name][: number % 4]
                for name in ("boxes", "labels", "crowd", "segmentations")
            }
            writer.write(
                f"{number:03d}", {"png": encoded(pixels, "PNG"), "json": json.dumps(part).encode()}
            )
    shards = ShardSet.open(str(tmp_path))
    image = ImageSettings(size=64, mode="large_scale_jitter", sizes=[48, 64], flip_probability=0.5)
    maker = fields(image=image, masks=True)

    def batches(workers: int, start: int) -> list:
        stream = TaskStream("detect", SampleReader(shards), Order.plan(30, 7, 4), maker, 7, 4, 4)
        options = LoaderSettings(workers=workers)
        steps = (lambda step: ("detect", step)), options, 0, 1, start, 12
        return [window.micro_batches[0] for window in StepLoader({"detect": stream}, *steps)]

    whole = batches(0, 0)
    assert {batch["images"].shape[-1] for batch in whole} == {48, 64}
    assert len({tuple(batch["counts"].tolist()) for batch in whole}) > 5
    for later in (batches(2, 0), batches(0, 5)):
        for a, b in zip(later, whole[-len(later) :], strict=True):
            tensors = {name for name, value in a.items() if isinstance(value, torch.Tensor)}
            assert {"masks", "boxes"} < tensors
            assert all(torch.equal(a[name], b[name]) for name in tensors)


def test_annotations_belong_to_the_upright_image():
    pixels, record = scene()
    turned = np.rot90(pixels)  # counter-clockwise: EXIF 6 turns it back
    exif = Image.Exif()
    exif[0x0112] = 6
    item = load(
        fields(False, image=ImageSettings(size=120, mode="keep_aspect")),
        record,
        pixels=np.ascontiguousarray(turned),
        exif=exif,
    )
    assert np.array_equal(item["images"], pixels)
    assert item["boxes"].tolist() == record["boxes"]


BAD_BOXES = [
    ([10, 10, 10, 20], r"boxes\[1\]: box 10, 10, 10, 20 is empty"),
    ([20, 10, 10, 20], r"boxes\[1\]: box 20, 10, 10, 20 is empty"),
    ([500, 500, 520, 520], r"boxes\[1\]: box 500, 500, 520, 520 is outside of the image of 160 x"),
    ([-2, 0, 20, 20], r"boxes\[1\]: box -2, 0, 20, 20 is outside"),
    ([160.5, 0, 161, 20], r"boxes\[1\]: box 160\.5, 0, 161, 20 is outside"),
]


def box_change(box: list[float]) -> dict:
    """A bad box between two good ones: it may not vanish, as what a crop cuts away does."""
    return {"boxes": [[0, 0, 9, 9], box, [5, 5, 20, 20]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [[1, 2, 3]]}, "boxes are not lists of four numbers"),
        ({"boxes": 7}, "four numbers"),
        ({"boxes": [[1, 2, 3, None]]}, "json: "),
        ({"boxes": [[1, 2, 3, "x"]]}, "json: "),
        ({"boxes": [[1, 2, 3, 1e999]]}, "four numbers"),
        ({"labels": [0]}, "labels are not one for each of 3 boxes"),
        ({"labels": None}, "labels are not one for each"),
        ({"labels": [0, 1, 3]}, r"label 3 is not in 0\.\.2 \(classes\)"),
        ({"labels": [0, 1, True]}, "label True"),
        ({"crowd": [0]}, "crowd are not one for each"),
        ({"segmentations": [[]]}, "segmentations are not one for each"),
        ({"segmentations": None}, "has no segmentations; masks need them"),
        ({"segmentations": [[[1, 2, 3]]] * 3}, "three or more pairs"),
        ({"segmentations": [None] * 3}, "neither a list of polygons"),
        *((box_change(box), message) for box, message in BAD_BOXES),
        ({"width": 120, "height": 160}, r"height and width \[160, 120\], the upright image has"),
    ],
)
def test_bad_annotations_are_bad_samples(change, message):
    maker = fields(masks=True, image=ImageSettings(size=64, mode="center_crop"))
    with pytest.raises(BadSample, match=message) as caught:
        load(maker, {**scene()[1], **change})
    assert (caught.value.shard, caught.value.key, caught.value.row) == ("a.tar", "key", 3)


@pytest.mark.parametrize("record", [[], 7, None, {"boxes": None}, {}])
def test_samples_that_nobody_annotated(record):
    annotated = isinstance(record, dict)
    if annotated:
        assert not load(fields(), record)["annotated"]
    with pytest.raises(BadSample, match="has no boxes" if annotated else "is not an object"):
        load(fields(unannotated="fault"), record)


def test_annotations_may_stand_under_a_key():
    image = ImageSettings(size=64, scale=(1, 1))
    maker = fields(annotation_source="json:objects.coco", image=image)
    item = load(maker, {"objects": {"coco": scene()[1]}})
    assert item["labels"].tolist() == [0, 1, 2]
    assert not load(maker, scene()[1])["annotated"]
    assert maker.extensions == {*MEMBERS, "json"}


def test_erasing_leaves_boxes_alone():
    erased = ImageSettings(size=64, mode="center_crop", erase=EraseSettings(probability=1.0))
    plain = ImageSettings(size=64, mode="center_crop")
    items = [load(fields(image=image), scene()[1]) for image in (erased, plain)]
    assert np.array_equal(items[0]["boxes"], items[1]["boxes"])
    assert not np.array_equal(items[0]["images"], items[1]["images"])


@pytest.fixture
def colourless(monkeypatch) -> None:
    """RandAugment as it is, but that its ten operations on colours leave them."""
    for name in rand_augment.COLOUR_NAMES:
        monkeypatch.setitem(rand_augment._COLOURS, name, lambda *_: None)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1, 6])  # photographs are decoded at 1/2 and 1/4
def test_boxes_and_masks_follow_rand_augment(colourless, mode, scale):
    """Behind crop, scaled decoding, flip and above padding: objects of one colour, and where they
    are said to be."""
    pixels, record = scene()
    pixels = pixels.repeat(scale, 0).repeat(scale, 1)
    record = {"boxes": [[scale * at for at in box] for box in record["boxes"]], "labels": [0, 1, 2]}
    record["segmentations"] = [
        [[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in record["boxes"]
    ]
    whole = (pixels == COLOURS[2]).all(2)
    record["segmentations"][2] = {"size": list(whole.shape), "counts": run_lengths(whole)}
    image = ImageSettings(
        size=128,
        mode=mode,
        flip_probability=0.5,
        scale=(0.3, 1.0),
        jitter=(0.6, 2.0),
        rand_augment=RandAugmentSettings(operations=3, probability=1.0, magnitude_std=3.0),
    )
    maker = fields(image=image, masks=True)
    ious, operations, padded, flipped = [], [], 0, 0
    for position in range(30):
        item = load(maker, record, position, pixels, "JPEG", quality=95, subsampling=0)
        geometry = item["view"].geometry
        flipped += geometry.flip
        padded += item["images"].shape[0] > geometry.height
        operations.append(len(geometry.warps))
        for box, label, mask in zip(item["boxes"], item["labels"], item["masks"], strict=True):
            assert not mask[geometry.height :].any() and not mask[:, geometry.width :].any()
            shown = painted(item["images"], label)
            shown[geometry.height :], shown[:, geometry.width :] = False, False
            # To a pixel: all that is painted lies in the mask or beside it, all of its inside is.
            larger, inside = (
                change(mask.astype(np.uint8), np.ones((3, 3)), borderValue=0).astype(bool)
                for change in (cv2.dilate, cv2.erode)
            )
            assert not (shown & ~larger).any() and not (inside & ~shown).any(), (position, label)
            # The tip of a corner may cover no centre of a pixel.
            beyond = (box - mask_boxes([mask])[0]) * (-1, -1, 1, 1)
            assert beyond.min() >= -0.51 and beyond.max() <= 3, (position, label)
            if mask.sum() > 400:
                ious.append((mask & shown).sum() / (mask | shown).sum())
    assert len(ious) > 30 and min(ious) > 0.85 and np.mean(ious) > 0.95
    assert {0, 1, 2} <= set(operations)
    assert 5 < flipped < 25 and (padded > 5) == (mode == "large_scale_jitter")


def test_what_left_the_picture_does_not_come_back():
    """Two shifts that undo each other: only what stayed inside is left, of image, mask and box."""
    pixels, record = scene()
    fill, warps = (99, 99, 99), []
    for sign in (1, -1):
        warps.append(rand_augment.augment(pixels, "translate_x", 0.5, sign, fill))  # by 36 pixels
    geometry = Geometry((0, 0, 160, 120), 120, 160, warps=tuple(warps))
    assert np.array_equal(shown_mask(geometry), (pixels != 99).any(2))
    assert np.allclose(geometry.points(np.array([[5.0, 7.0]])), [[5, 7]])
    boxes, keep = cut_boxes(np.array(record["boxes"], dtype=float), geometry, (120, 160), 0.0)
    assert keep.all()
    for label, segmentation in enumerate(record["segmentations"]):
        mask = segmentation_mask(segmentation, geometry, (120, 160)) & shown_mask(geometry)
        assert np.array_equal(mask, painted(pixels, label))
        assert np.allclose(mask_boxes([mask])[0], boxes[label])
    assert boxes[0].tolist() == [36, 20, 60, 70]
    _, keep = cut_boxes(np.array(record["boxes"], dtype=float), geometry, (120, 160), 0.5)
    assert keep.tolist() == [False, True, True]


def test_the_batch_leads_back_through_rand_augment():
    augment = RandAugmentSettings(operations=3, probability=1.0)
    image = ImageSettings(size=64, flip_probability=0.5, rand_augment=augment)
    maker = fields(image=image)
    items = [load(maker, scene()[1], position) for position in range(8)]
    batch = maker.collate([None, *items], [False] + [True] * 8)
    assert batch["warps"][0].tolist() == [[1, 0, 0], [0, 1, 0]]
    xy = np.array([[30.0, 40.0], [90.0, 100.0]])
    for row, item in enumerate(items, 1):
        matrix = np.vstack([batch["warps"][row], (0, 0, 1)])
        seen = np.column_stack([item["view"].geometry.points(xy), (1, 1)])
        u, v, _ = np.linalg.solve(matrix, seen.T)
        u = 64 - u if batch["flips"][row] else u
        x0, y0, x1, y1 = batch["crops"][row].tolist()
        back = np.column_stack([x0 + u * (x1 - x0) / 64, y0 + v * (y1 - y0) / 64])
        assert np.allclose(back, xy)
    assert len(np.unique(batch["warps"], axis=0)) > 5


def test_objects_stay_under_their_boxes_with_rand_augment():
    """Colours change, edges do not move: where the object was is where it is."""
    augment = RandAugmentSettings(operations=1, probability=1.0, geometry=False)
    plain = ImageSettings(size=64, mode="large_scale_jitter", flip_probability=0.5)
    changed = plain.model_copy(update={"rand_augment": augment})
    differing = 0
    for position in range(12):
        before, after = (
            load(fields(image=image, masks=True), scene()[1], position)
            for image in (plain, changed)
        )
        assert np.array_equal(before["boxes"], after["boxes"])
        assert np.array_equal(before["masks"], after["masks"])
        differing += not np.array_equal(before["images"], after["images"])
        for mask in after["masks"]:
            inside = mask & np.roll(mask, 2, 0) & np.roll(mask, -2, 0)
            inside &= np.roll(mask, 2, 1) & np.roll(mask, -2, 1)
            inside &= after["masks"].sum(0) == 1
            colours = np.unique(before["images"][inside], axis=0)
            if inside.any() and len(colours) == 1:  # plain before: plain after
                assert len(np.unique(after["images"][inside], axis=0)) == 1
    assert differing > 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_view": ImageSettings()}, "second_view is not for boxes"),
        ({"boxes_from_masks": True}, "boxes_from_masks needs masks"),
        ({"annotation_source": "json:"}, "annotation_source"),
        ({"min_visible": 1.5}, "min_visible"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        BoxDataSettings(shards=["x"], classes=3, **options)
