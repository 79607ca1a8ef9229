"""Boxes of VOC, YOLO and COCO on their way into json members: one check for all of them."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.images.decode import DecodeError, read_header
from data_pipeline.samples.masks import check_segmentation
from data_pipeline.samples.objects import box_fault
from data_pipeline.shards.packing import SampleFault
from tools.make_shards.sources import listed

_ANY_PIXELS = 1 << 62


class Box(NamedTuple):
    """One object; `corners` are x0, y0, x1, y1 in pixels, x1 and y1 behind the last one."""

    corners: tuple[float, float, float, float]
    name: Any
    """Of its class, or another mark that `labels` of BoxCheck has."""
    where: str
    more: Mapping[str, Any]
    """Further fields of the json member -> the value of this box."""
    segmentation: Any = None
    """As in COCO, or None."""


@dataclass
class BoxCheck:
    """Turns the boxes of images into fields of their json members, and collects the bad ones."""

    labels: Mapping[Any, int]
    """Name of a class -> its label."""
    unknown: str
    """What is said of a class that is not in `labels`: "class {!r} is not in the classes"."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Field -> value of boxes that lack it; other fields are there where any box has them."""
    bad: list[str] = field(default_factory=list)
    boxes: int = 0
    emptied: int = 0
    """Images that have lost all of their boxes."""

    def fields(self, boxes: Sequence[Box], size: tuple[int, int] | None) -> dict[str, list]:
        """Return boxes, labels, crowd, areas and whatever the good ones of an image have.

        Args: size: width and height that the boxes are for; None: not known, since the image cannot
        be read, which is found when it is packed.
        """
        faults = [self._fault(box, size) for box in boxes]
        self.bad += filter(None, faults)
        self.boxes += len(boxes)
        kept = [box for box, fault in zip(boxes, faults, strict=True) if fault is None]
        self.emptied += bool(boxes) and not kept
        corners = [_cut(box.corners, size) for box in kept]
        fields: dict[str, list] = {
            "boxes": corners,
            "labels": [self.labels[box.name] for box in kept],
            "crowd": [box.more.get("crowd", 0) for box in kept],
            "areas": [
                box.more.get("areas", (x1 - x0) * (y1 - y0))
                for box, (x0, y0, x1, y1) in zip(kept, corners, strict=True)
            ],
        }
        if any(box.segmentation for box in kept):
            fields["segmentations"] = [box.segmentation for box in kept]
        for name in sorted({name for box in kept for name in box.more} - fields.keys()):
            fields[name] = [box.more.get(name, self.defaults.get(name)) for box in kept]
        return fields

    def finish(self, drop: bool) -> dict[str, int]:
        """Return the details for the manifest. Errors: SampleFault for bad boxes, unless `drop`."""
        if self.bad and not drop:
            raise SampleFault(
                f"{len(self.bad)} of {self.boxes} boxes are bad:{listed(self.bad)}\n"
                "(--on-bad-box drop leaves them out)"
            )
        details = {"dropped_boxes": len(self.bad)}
        return details | ({"images_left_without_boxes": self.emptied} if self.emptied else {})

    def _fault(self, box: Box, size: tuple[int, int] | None) -> str | None:
        if box.name not in self.labels:
            return f"{box.where}: {self.unknown.format(box.name)}"
        source = None if size is None else size[::-1]
        fault = box_fault(box.corners, source)
        if fault is None and box.segmentation and source is not None:
            try:
                check_segmentation(box.segmentation, source)
            except (ValueError, TypeError, OverflowError) as error:
                fault = str(error)
        return fault and f"{box.where}: {fault}"


def _cut(corners: tuple[float, ...], size: tuple[int, int] | None) -> list[float]:
    if size is None:
        return list(corners)
    x0, y0, x1, y1 = corners
    return [max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1])]


def add_on_bad_box(parser: argparse.ArgumentParser) -> None:
    """Add --on-bad-box, for `BoxCheck.finish`."""
    parser.add_argument(
        "--on-bad-box",
        choices=("error", "drop"),
        default="error",
        help="boxes outside of the image, empty, of an unknown class, or with a polygon that is "
        "none (default %(default)s)",
    )


def upright_size(path: Path) -> tuple[int, int] | None:
    """Return width and height as a viewer shows the image; None if it is none."""
    try:
        header = read_header(path.read_bytes(), _ANY_PIXELS)
    except (OSError, DecodeError):
        return None  # said when the image is packed
    return header.width, header.height
