"""The objects of an image: read from a sample, and moved into an output of its transform."""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.images.crops import Geometry
from data_pipeline.images.warps import area
from data_pipeline.reading.reader import Sample
from data_pipeline.samples.members import AbsentValue, MemberSource, bad

# Rounding of coordinates, and different ideas of where pixels begin; cut at the border.
_TOLERANCE_PIXELS = 1.0


class Objects(NamedTuple):
    """The objects of one image, in pixels of the upright image or of an output."""

    boxes: np.ndarray
    """(N, 4) float64: x0, y0, x1, y1."""
    labels: np.ndarray
    """(N,) int64."""
    crowd: np.ndarray
    """(N,) bool: several objects in one box."""
    segmentations: list[Any] | None
    """As in COCO; none if there are none."""
    size: tuple[Any, Any]
    """Height and width that the boxes are for; None where the sample does not say."""

    @classmethod
    def none(cls) -> "Objects":
        """No objects."""
        empty = np.zeros(0, dtype=np.int64)
        return cls(np.zeros((0, 4)), empty, empty.astype(bool), [], (None, None))

    def check_inside(self, source: tuple[int, int]) -> None:
        """Raise ValueError naming the first box that is empty or outside of its image.

        Args: source: height and width of the upright image.
        """
        for number, box in enumerate(self.boxes.tolist()):
            if fault := box_fault(box, source):
                raise ValueError(f"boxes[{number}]: {fault}")

    def taken(self, keep: np.ndarray) -> "Objects":
        """Those objects where (N,) bool is True."""
        kept = None
        if self.segmentations is not None:
            kept = [s for s, k in zip(self.segmentations, keep, strict=True) if k]
        return Objects(self.boxes[keep], self.labels[keep], self.crowd[keep], kept, self.size)


class ObjectSource(MemberSource):
    """Finds the objects of a sample; see `boxes.BoxDataSettings.annotation_source`."""

    def __init__(self, source: str, classes: int) -> None:
        super().__init__(source)
        self.classes = classes

    def read(self, sample: Sample) -> Objects:
        """All objects.

        Raises:
            AbsentValue: no such member or key, or no boxes in it.
            BadSample: not what it should be.
        """
        found = self.value(sample)
        try:
            record = json.loads(found) if isinstance(found, str) else found
            if not isinstance(record, dict):
                raise ValueError("is not an object")
            if record.get("boxes") is None:
                raise bad(sample, f"{self.source} has no boxes", AbsentValue)
            return self._objects(record)
        except AbsentValue:
            raise
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise bad(sample, f"{self.source}: {error}") from error

    def _objects(self, record: dict[str, Any]) -> Objects:
        boxes = np.array(record["boxes"], dtype=np.float64)
        if boxes.size == 0:
            boxes = boxes.reshape(0, 4)
        if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
            raise ValueError("boxes are not lists of four numbers")
        fields = {name: record.get(name) for name in ("labels", "crowd", "segmentations")}
        if fields["crowd"] is None:
            fields["crowd"] = [0] * len(boxes)
        for name, values in fields.items():
            if values is None and name == "segmentations":
                continue
            if not isinstance(values, list) or len(values) != len(boxes):
                raise ValueError(f"{name} are not one for each of {len(boxes)} boxes")
        for label in fields["labels"]:
            if type(label) is not int or not 0 <= label < self.classes:
                raise ValueError(f"label {label!r} is not in 0..{self.classes - 1} (classes)")
        return Objects(
            boxes,
            np.array(fields["labels"], dtype=np.int64),
            np.array(fields["crowd"], dtype=bool),
            fields["segmentations"],
            (record.get("height"), record.get("width")),
        )


def box_fault(corners: Sequence[float], source: tuple[int, int] | None) -> str | None:
    """Say what is wrong with a box: the one check of packers and loader. None: nothing.

    Args: corners: x0, y0, x1, y1 in pixels; source: height and width of the upright image, None if
    they are not known. A box may stick out by a pixel.
    """
    x0, y0, x1, y1 = corners
    box = f"box {x0:g}, {y0:g}, {x1:g}, {y1:g}"
    if not all(map(math.isfinite, corners)):
        return f"{box} is not of finite numbers"
    if not (x0 < x1 and y0 < y1):
        return f"{box} is empty"
    if source is not None and (
        max(-x0, -y0, x1 - source[1], y1 - source[0]) > _TOLERANCE_PIXELS
        or min(x1, y1, source[1] - x0, source[0] - y0) <= 0
    ):
        return f"{box} is outside of the image of {source[1]} x {source[0]} pixels"
    return None


def cut_boxes(
    boxes: np.ndarray, geometry: Geometry, source: tuple[int, int], min_visible: float
) -> tuple[np.ndarray, np.ndarray]:
    """Move boxes into an output and cut them at its border.

    A box that a warp turns or shears becomes the upright one around what it leaves of it.

    Args:
        boxes: (N, 4) x0, y0, x1, y1 in pixels of the upright image, which is `source` (height,
            width) in size; what lies outside of it does not count as part of a box.
        min_visible: least share of a box's area that must be left.

    Returns:
        (N, 4) in pixels of the output; (N,) bool, whether enough is left, and any.
    """
    inside = _clipped(boxes, (0.0, 0.0, float(source[1]), float(source[0])))
    cut = _clipped(inside, geometry.crop)
    areas, left = _areas(inside), _areas(cut)
    keep = (left > 0) & (left >= min_visible * areas)
    corners = [geometry.placed(cut[:, :2]), geometry.placed(cut[:, 2:])]
    # A flip exchanges left and right.
    placed = np.hstack([np.minimum(*corners), np.maximum(*corners)])
    if geometry.warps:
        for place in np.flatnonzero(keep):
            placed[place], share = _warped(placed[place], geometry)
            keep[place] = share > 0 and share * left[place] >= min_visible * areas[place]
    return placed, keep


def _warped(box: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, float]:
    """The box around what warps leave of a box, and the share of its area that they leave."""
    x0, y0, x1, y1 = box
    outline = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    rest = geometry.left(outline)
    # Nine digits: a box that is turned and not cut keeps all of its area.
    share = round(area(rest) / area(outline), 9)
    return (np.hstack([rest.min(0), rest.max(0)]) if share else box), share


def _clipped(boxes: np.ndarray, border: tuple[float, ...]) -> np.ndarray:
    x0, y0, x1, y1 = border
    return np.clip(boxes, [x0, y0, x0, y0], [x1, y1, x1, y1])


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
