"""Average precision against pycocotools: stored values, and itself where it is installed
(`pip install -e '.[coco]'`). Run this file as a module to store the values anew."""

import json
from pathlib import Path

import numpy as np
import pytest

from pretrain.objectives.detection.average_precision import (
    Compared,
    Found,
    Truth,
    compare,
    summarise,
)

GOLDEN = Path(__file__).parents[3] / "goldens" / "average_precision.json"
NAMES = [
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
]
SIDE = 200


def scenes(images: int = 18) -> list[tuple[Truth, Found]]:
    """Objects of all sizes, crowds, images without objects or findings, findings of equal score, of
    wrong class, twice, and more than 100 of them."""
    random = np.random.RandomState(0)  # whose numbers never change
    return [_scene(random, image) for image in range(images)]


def _scene(random: np.random.RandomState, image: int) -> tuple[Truth, Found]:
    count = 0 if image == 3 else random.randint(1, 8)
    boxes = _boxes(random, count)
    labels, crowd = random.randint(0, 3, count), random.rand(count) < 0.15
    repeats = [0, 1, 3, 60][0 if image == 5 else 3 if image == 7 else random.randint(1, 3)]
    moved = np.repeat(boxes, repeats, axis=0)
    moved = moved + random.randint(-3, 4, moved.shape)
    found = np.concatenate([moved, _boxes(random, 3)]).clip(0, SIDE)
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    names = np.concatenate([np.repeat(labels, repeats), random.randint(0, 3, 3)])
    names = np.where(random.rand(len(names)) < 0.1, random.randint(0, 3, len(names)), names)
    scores = np.round(random.rand(len(names)), 1)
    return (
        Truth(boxes, labels, crowd, _masks(random, boxes)),
        Found(found, names, scores, _masks(random, found)),
    )


def _boxes(random: np.random.RandomState, count: int) -> np.ndarray:
    side = np.exp(random.uniform(np.log(8), np.log(190), (count, 2))).astype(int)
    low = (random.rand(count, 2) * (SIDE - side)).astype(int)
    return np.concatenate([low, low + side], axis=1).astype(np.float64)


def _masks(random: np.random.RandomState, boxes: np.ndarray) -> np.ndarray:
    """Boxes without a corner."""
    masks = np.zeros((len(boxes), SIDE, SIDE), dtype=bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
        mask[y0:y1, x0:x1] = True
        mask[y0 : (y0 + y1) // 2, x0 : x0 + int((x1 - x0) * random.uniform(0, 0.6))] = False
    return masks


def without_masks(scene: tuple[Truth, Found]) -> tuple[Truth, Found]:
    return scene[0]._replace(masks=None), scene[1]._replace(masks=None)


def ours(found: list[tuple[Truth, Found]], kind: str) -> dict:
    if kind == "boxes":
        found = [without_masks(scene) for scene in found]
    return summarise(one for image, scene in enumerate(found) for one in compare(image, *scene))


def theirs(found: list[tuple[Truth, Found]], kind: str) -> dict:
    """By pycocotools."""
    from pycocotools import mask as masks
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entry(image, box, mask, label):
        runs = masks.encode(np.asfortranarray(mask.astype(np.uint8)))
        size = np.prod(box[2:] - box[:2]) if kind == "boxes" else mask.sum()
        return {
            "image_id": image,
            "category_id": int(label),
            "area": float(size),
            "bbox": [*box[:2], *(box[2:] - box[:2])],
            "segmentation": runs,
        }

    annotations, results = [], []
    for image, (truth, guess) in enumerate(found):
        for box, mask, label, crowd in zip(
            truth.boxes, truth.masks, truth.labels, truth.crowd, strict=True
        ):
            annotations.append(
                entry(image, box, mask, label) | {"id": len(annotations) + 1, "iscrowd": int(crowd)}
            )
        for box, mask, label, score in zip(
            guess.boxes, guess.masks, guess.labels, guess.scores, strict=True
        ):
            one = entry(image, box, mask, label) | {"score": float(score)}
            if kind == "boxes":
                del one["segmentation"]
            else:
                del one["bbox"]
            results.append(one)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": n, "height": SIDE, "width": SIDE} for n in range(len(found))],
        "categories": [{"id": n} for n in range(3)],
        "annotations": annotations,
        "info": {},
    }
    truth.createIndex()
    run = COCOeval(truth, truth.loadRes(results), {"boxes": "bbox", "masks": "segm"}[kind])
    run.evaluate()
    run.accumulate()
    run.summarize()
    return {
        name: None if value == -1 else value
        for name, value in zip(NAMES, run.stats.tolist(), strict=True)
    }


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_stored_values_of_pycocotools(kind):
    stored = json.loads(GOLDEN.read_text(encoding="utf-8"))[kind]
    found = ours(scenes(), kind)
    assert list(found) == NAMES and len(set(found.values())) > 8
    assert found == pytest.approx(stored, abs=1e-12)


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_pycocotools_itself(kind, capsys):
    pytest.importorskip("pycocotools")
    assert ours(scenes(), kind) == pytest.approx(theirs(scenes(), kind), abs=1e-12)


def test_ranks_share_the_images_in_any_way():
    """What they send each other is JSON, and comes in any order."""
    parts = [[], []]
    for image, scene in enumerate(scenes()):
        for one in compare(image, *without_masks(scene)):
            parts[image % 2].append(json.loads(json.dumps(one.to_lists())))
    received = [Compared.from_lists(one) for part in parts[::-1] for one in part]
    assert summarise(received) == ours(scenes(), "boxes")


def test_nothing_to_find_is_no_zero():
    nothing = Truth(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))
    one = Found(np.array([[0.0, 0, 9, 9]]), np.zeros(1, int), np.ones(1))
    assert set(summarise(compare(0, nothing, one)).values()) == {None}
    assert set(summarise([]).values()) == {None}
    small = Truth(np.array([[0.0, 0, 9, 9]]), np.zeros(1, int), np.zeros(1, bool))
    found = summarise(compare(0, small, one))
    assert found["AP"] == found["AP_small"] == pytest.approx(1.0)
    assert found["AR1"] == 1.0
    assert found["AP_large"] is None
    missed = summarise(compare(0, small, Found(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))))
    assert missed["AP"] == missed["AR100"] == 0.0


def test_faults_are_named():
    truth = Truth(np.array([[0.0, 0, 9, 9]]), np.zeros(1, int), np.zeros(1, bool))
    found = Found(truth.boxes, truth.labels, np.array([np.nan]))
    with pytest.raises(ValueError, match="image 7: a score is not a number"):
        compare(7, truth, found)
    with pytest.raises(ValueError, match="image 7: masks of objects and of findings"):
        compare(7, truth, found._replace(scores=np.ones(1), masks=np.ones((1, 9, 9), bool)))


if __name__ == "__main__":
    values = {kind: theirs(scenes(), kind) for kind in ("boxes", "masks")}
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
