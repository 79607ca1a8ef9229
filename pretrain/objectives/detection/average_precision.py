"""Average precision of boxes and masks as COCO defines it, in numpy.

Each rank compares its own images (`compare`); the small results of all ranks together give the
metrics (`summarise`), the same for any division of the images among ranks. Held to pycocotools by
tests.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
# Pixels; both ends belong to a range.
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
MOST_FOUND = 100


class Truth(NamedTuple):
    """The objects of one image."""

    boxes: np.ndarray
    """(G, 4) x0, y0, x1, y1 in pixels."""
    labels: np.ndarray
    """(G,) int."""
    crowd: np.ndarray
    """(G,) bool: finding one is neither right nor wrong."""
    masks: np.ndarray | None = None
    """(G, H, W) bool; None: boxes are compared."""
    areas: np.ndarray | None = None
    """(G,) pixels, which say whether an object is small; None: those of the masks, or boxes."""


class Found(NamedTuple):
    """What was found in one image."""

    boxes: np.ndarray
    """(D, 4) x0, y0, x1, y1 in pixels."""
    labels: np.ndarray
    """(D,) int."""
    scores: np.ndarray
    """(D,) float."""
    masks: np.ndarray | None = None
    """(D, H, W) bool; None: boxes are compared."""


@dataclass
class Compared:
    """One class of one image, its findings from the most certain on; small, and sent to others."""

    image: int
    """Number of the image in the data, which orders findings of equal score."""
    label: int
    scores: np.ndarray
    """(D,) float64."""
    right: np.ndarray
    """(areas, thresholds, D) bool: found an object."""
    ignored: np.ndarray
    """(areas, thresholds, D) bool: neither right nor wrong."""
    objects: np.ndarray
    """(areas,) int64: objects that should be found."""

    def to_lists(self) -> dict[str, Any]:
        """As plain numbers and lists, for JSON."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}

    @classmethod
    def from_lists(cls, values: dict[str, Any]) -> "Compared":
        """The inverse of `to_lists`."""
        shape = len(AREAS), len(IOU_THRESHOLDS), len(values["scores"])
        flags = {
            name: np.array(values[name], dtype=bool).reshape(shape) for name in ("right", "ignored")
        }
        return cls(
            values["image"],
            values["label"],
            np.array(values["scores"], dtype=np.float64),
            objects=np.array(values["objects"], dtype=np.int64),
            **flags,
        )


def compare(image: int, truth: Truth, found: Found) -> list[Compared]:
    """Compare what was found in an image with what is there, class by class.

    Raises ValueError: scores that are not numbers, or masks on one side only.
    """
    if np.isnan(found.scores).any():
        raise ValueError(f"image {image}: a score is not a number")
    if (truth.masks is None) != (found.masks is None):
        raise ValueError(f"image {image}: masks of objects and of findings, or of neither")
    labels = np.unique(np.concatenate([truth.labels, found.labels]).astype(np.int64))
    return [_compare_class(image, int(label), truth, found) for label in labels]


def summarise(compared: Iterable[Compared]) -> dict[str, float | None]:
    """AP over thresholds 0.5 to 0.95, AP50, AP75, AP of small, medium and large objects, and recall
    (AR) with 1, 10 and 100 findings an image and by size: means over the classes that have objects.

    compared: of all images of the data, in any order. None: no object counts.
    """
    by_class: dict[int, list[Compared]] = {}
    for one in compared:
        by_class.setdefault(one.label, []).append(one)
    curves: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for ones in by_class.values():
        ones.sort(key=lambda one: one.image)
        for place, name in enumerate(AREAS):
            for most in (1, 10, MOST_FOUND) if name == "all" else (MOST_FOUND,):
                curve = _curve(ones, place, most)
                if curve is not None:
                    curves.setdefault((name, most), []).append(curve)
    precision, recall = (
        {key: np.stack([curve[side] for curve in found]) for key, found in curves.items()}
        for side in (0, 1)
    )

    def mean(values: dict, name: str, most: int = MOST_FOUND, threshold: Any = slice(None)):
        return float(values[name, most][:, threshold].mean()) if (name, most) in values else None

    metrics = {
        "AP": mean(precision, "all"),
        "AP50": mean(precision, "all", threshold=0),
        "AP75": mean(precision, "all", threshold=5),
    }
    sizes = [name for name in AREAS if name != "all"]
    metrics |= {f"AP_{name}": mean(precision, name) for name in sizes}
    metrics |= {f"AR{most}": mean(recall, "all", most) for most in (1, 10, MOST_FOUND)}
    return metrics | {f"AR_{name}": mean(recall, name) for name in sizes}


def _compare_class(image: int, label: int, truth: Truth, found: Found) -> Compared:
    own, mine = truth.labels == label, found.labels == label
    order = np.argsort(-found.scores[mine], kind="stable")[:MOST_FOUND]
    scores = found.scores[mine][order].astype(np.float64)
    crowd = truth.crowd[own].astype(bool)
    if truth.masks is None:
        boxes, there = found.boxes[mine][order].astype(np.float64), truth.boxes[own].astype(float)
        ious, sizes, areas = box_ious(boxes, there, crowd), _areas(boxes), _areas(there)
    else:
        masks, there = (
            m.reshape(len(m), m.shape[1] * m.shape[2])
            for m in (found.masks[mine][order], truth.masks[own])
        )
        ious, sizes, areas = mask_ious(masks, there, crowd), masks.sum(1), there.sum(1)
    if truth.areas is not None:
        areas = truth.areas[own]
    right, ignored, objects = [], [], []
    for low, high in AREAS.values():
        unwanted = crowd | (areas < low) | (areas > high)
        hit, neither = _assigned(ious, crowd, unwanted)
        # What found nothing counts against the range of its own size alone.
        neither |= ~hit & ((sizes < low) | (sizes > high))
        right.append(hit & ~neither)
        ignored.append(neither)
        objects.append(int((~unwanted).sum()))
    return Compared(image, label, scores, np.stack(right), np.stack(ignored), np.array(objects))


def _assigned(
    ious: np.ndarray, crowd: np.ndarray, unwanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Who finds what, one finding after the other: (thresholds, D) bool, whether it found
    anything, and whether that was something unwanted.

    ious: (D, G). Each takes the best object that is left; an unwanted one only if there is no
    other, and a crowd is never used up. Of equally good objects it is the last.
    """
    thresholds = len(IOU_THRESHOLDS)
    hit = np.zeros((thresholds, len(ious)), dtype=bool)
    neither = np.zeros_like(hit)
    if not ious.size:
        return hit, neither
    left = np.ones((thresholds, ious.shape[1]), dtype=bool)
    rows = np.arange(thresholds)
    for number, row in enumerate(ious):
        fits = left & (row >= np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None])
        wanted = fits & ~unwanted
        choice = np.where(wanted.any(1, keepdims=True), wanted, fits)
        values = np.where(choice, row, -1.0)[:, ::-1]
        best = ious.shape[1] - 1 - values.argmax(1)
        hit[:, number] = choice.any(1)
        neither[:, number] = hit[:, number] & unwanted[best]
        left[rows, best] &= ~hit[:, number] | crowd[best]
    return hit, neither


def _curve(ones: Sequence[Compared], area: int, most: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Precision at each recall, (thresholds, recalls), and the last recall, (thresholds,), of one
    class; None if it has no objects."""
    objects = sum(int(one.objects[area]) for one in ones)
    if not objects:
        return None
    order = np.argsort(-np.concatenate([one.scores[:most] for one in ones]), kind="stable")
    right, ignored = (
        np.concatenate([getattr(one, name)[area, :, :most] for one in ones], axis=1)[:, order]
        for name in ("right", "ignored")
    )
    hits = right.cumsum(1, dtype=np.float64)
    misses = (~right & ~ignored).cumsum(1, dtype=np.float64)
    recall = hits / objects
    precision = hits / (hits + misses + np.spacing(1))
    # The best precision at this recall or a higher one.
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    found = np.zeros((len(IOU_THRESHOLDS), len(RECALLS)))
    for row, (values, best) in enumerate(zip(recall, precision, strict=True)):
        places = np.searchsorted(values, RECALLS, side="left")
        found[row, places < len(best)] = best[places[places < len(best)]]
    last = recall[:, -1] if recall.shape[1] else np.zeros(len(IOU_THRESHOLDS))
    return found, last


def box_ious(first: np.ndarray, second: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(D, G) intersection over union of boxes (x0, y0, x1, y1); over the first's own area where
    the second is a crowd, (G,) bool."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return _ious(np.maximum(high - low, 0).prod(-1), _areas(first), _areas(second), crowd)


def mask_ious(first: np.ndarray, second: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """The same of masks (D, pixels) and (G, pixels) bool."""
    common = first.astype(np.float32) @ second.astype(np.float32).T
    return _ious(common.astype(np.float64), first.sum(1), second.sum(1), crowd)


def _ious(
    common: np.ndarray, first: np.ndarray, second: np.ndarray, crowd: np.ndarray
) -> np.ndarray:
    whole = np.where(crowd[None], first[:, None], first[:, None] + second[None] - common)
    return np.divide(common, whole, out=np.zeros_like(common, dtype=np.float64), where=whole > 0)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).prod(-1)
