"""Box data: images with the boxes, and perhaps masks, of the objects in them.

Boxes and masks follow the image through crops, resizes, flips and RandAugment exactly: they are
moved by the geometry of the pixels, and cut at the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from data_pipeline.images.transforms import View
from data_pipeline.images.warps import joined
from data_pipeline.reading.reader import Sample
from data_pipeline.samples.class_names import ClassNames, check_class_names
from data_pipeline.samples.images import ImageDataSettings, ImageProcessor
from data_pipeline.samples.labels import NO_LABEL
from data_pipeline.samples.masks import mask_boxes, segmentation_mask, shown_mask
from data_pipeline.samples.members import AbsentValue, bad, check_source
from data_pipeline.samples.objects import Objects, ObjectSource, cut_boxes
from data_pipeline.samples.sample_processor import Item, RngFor
from data_pipeline.samples.target import Target
from data_pipeline.timing import StageClock

if TYPE_CHECKING:
    import torch

    from data_pipeline.samples.tokenizer import Tokenizer


class BoxDataSettings(ImageDataSettings):
    """Images with boxes in WebDataset shards."""

    missing_targets: ClassVar[str] = "unannotated"
    type: Literal["boxes"] = "boxes"
    """Kind of data; follows from the task's objective where it is not given."""
    annotation_source: str = "json"
    """Where the objects are: a JSON member's extension, or "json:KEY" for an object under KEY
    (dots descend). It has boxes ([x0, y0, x1, y1] in pixels of the upright image) and labels, and
    may have crowd (0 or 1), segmentations (as in COCO), and width and height, which must then be
    those of the image. A box that is empty, or sticks out of the image by more than a pixel, makes
    a bad sample, which is named, counted and replaced."""
    classes: int = Field(ge=1)
    """Number of classes; labels run from 0. A label outside of that is a bad sample."""
    class_names: ClassNames = Field(default=[])
    """Names of the classes in the order of their numbers, for objectives that read them; [] = they
    have none."""
    masks: bool = False
    """Whether batches have a mask for each box. Objects without a segmentation are then faults."""
    boxes_from_masks: bool = False
    """Boxes are drawn anew around what a crop leaves of the masks; needs `masks`."""
    min_visible: float = Field(default=0.0, ge=0.0, le=1.0)
    """Boxes of which a crop leaves less than this share of their area are dropped."""
    min_side: float = Field(default=1.0, gt=0.0)
    """So are boxes that are narrower or lower than this in the output, in pixels."""
    unannotated: Literal["without_loss", "fault", "expected"] = "without_loss"
    """Samples without `boxes`, which nobody has looked at (an empty list says that there is
    nothing): `without_loss` keeps them in the batch, marked; `fault` treats them as bad samples;
    `expected` is `without_loss` where it is meant that few samples, or none, have them."""

    _named = model_validator(mode="after")(check_class_names)

    def processor(self, tokenizer: Tokenizer | None, train: bool) -> BoxProcessor:
        """As of `DataSettings`."""
        return BoxProcessor(self, train)

    def facts(self) -> dict[str, Any]:
        """As of `DataSettings`."""
        return {**super().facts(), "classes": self.classes, "class_names": self.class_names}

    @field_validator("annotation_source")
    @classmethod
    def _source(cls, value: str) -> str:
        return check_source("annotation_source", value)

    @model_validator(mode="after")
    def _check_boxes(self) -> Self:
        if self.second_view is not None:
            raise ValueError("second_view is not for boxes, which belong to one view: remove it")
        if self.boxes_from_masks and not self.masks:
            raise ValueError("boxes_from_masks needs masks: set masks to true, or remove it")
        return self


class BoxProcessor(ImageProcessor):
    """An image with its boxes, and perhaps masks."""

    def __init__(self, settings: BoxDataSettings, train: bool) -> None:
        super().__init__(settings, train)
        self.source = ObjectSource(settings.annotation_source, settings.classes)

    @property
    def extensions(self) -> frozenset[str]:
        """Of the image and the annotations."""
        return super().extensions | {self.source.extension}

    def targets(self) -> list[Target]:
        """The annotations: an empty list of boxes is one."""
        required = self.settings.unannotated == "fault"
        where = ("boxes", "annotation_source", self.source.source, self.source.extension)
        return [Target(*where, self.source.read, required)]

    def read(self, sample: Sample, rng_for: RngFor) -> Item:
        """objects: Objects; None where nobody has looked.

        Raises:
            BadSample: objects that are not what they should be.
        """
        return {"objects": self._objects(sample)}

    def load_image(
        self,
        sample: Sample,
        rng_for: RngFor,
        out: dict[str, np.ndarray] | None,
        clock: StageClock | None,
    ) -> Item:
        """images (H, W, 3) uint8; view: View."""
        (view,) = self.load_views(sample, rng_for, out, clock)
        return {"images": view.image, "view": view}

    def finish(self, sample: Sample, item: Item) -> Item:
        """The item with boxes (N, 4) float32, labels (N,) int64, crowd (N,) bool, masks (N, H, W)
        bool or none, and annotated: bool, in place of objects.

        Raises:
            BadSample: boxes of another image, or outside of theirs.
        """
        objects, view = item["objects"], item["view"]
        item = {"images": item["images"], "view": view, "annotated": objects is not None}
        if objects is None:
            objects = Objects.none()
        elif any(side is not None for side in objects.size) and objects.size != view.source:
            raise bad(
                sample,
                f"{self.source.source}: boxes are for height and width {list(objects.size)}, the "
                f"upright image has {list(view.source)}",
            )
        try:
            objects.check_inside(view.source)
        except ValueError as error:
            # Cut away, it would leave an image that counts as looked at and found empty.
            raise bad(sample, f"{self.source.source}: {error}") from None
        return item | self._seen(sample, objects, view)

    def stack(self, items: Sequence[Item | None], images: dict[str, torch.Tensor]) -> Item:
        """counts (B,) int64, boxes of each image; with N the most of them: boxes (B, N, 4) float32,
        x0, y0, x1, y1 in pixels of the output, labels (B, N) int64, NO_LABEL beyond the counts,
        crowd (B, N) bool; masks (sum of counts, H, W) bool, image after image (setting `masks`);
        annotated (B,) bool; sizes (B, 2) int64, height and width without padding; crops (B, 4)
        float64, what that part showed of the upright image before flips (B,) bool mirrored it, and
        warps (B, 2, 3) float64 moved its points (the identity where RandAugment moved nothing),
        image_sizes (B, 2) int64, height and width of the upright image.
        """
        present = [(row, item) for row, item in enumerate(items) if item is not None]
        counts = np.zeros(len(items), dtype=np.int64)
        for row, item in present:
            counts[row] = len(item["labels"])
        shape = len(items), int(counts.max(initial=0))
        arrays = {
            "boxes": np.zeros((*shape, 4), dtype=np.float32),
            "labels": np.full(shape, NO_LABEL, dtype=np.int64),
            "crowd": np.zeros(shape, dtype=bool),
            "annotated": np.zeros(len(items), dtype=bool),
            "sizes": np.ones((len(items), 2), dtype=np.int64),
            "crops": np.tile([0.0, 0.0, 1.0, 1.0], (len(items), 1)),
            "flips": np.zeros(len(items), dtype=bool),
            "warps": np.tile(joined(()), (len(items), 1, 1)),
            "image_sizes": np.ones((len(items), 2), dtype=np.int64),
        }
        for row, item in present:
            for name in ("boxes", "labels", "crowd"):
                arrays[name][row, : counts[row]] = item[name]
            geometry = item["view"].geometry
            arrays["annotated"][row] = item["annotated"]
            arrays["sizes"][row] = geometry.height, geometry.width
            arrays["crops"][row], arrays["flips"][row] = geometry.crop, geometry.flip
            arrays["warps"][row] = joined(geometry.warps)
            arrays["image_sizes"][row] = item["view"].source
        if self.settings.masks:
            none = np.zeros((0, *images["images"].shape[2:]), dtype=bool)
            arrays["masks"] = np.concatenate([none, *(item["masks"] for _, item in present)])
        return arrays | {"counts": counts}

    def _objects(self, sample: Sample) -> Objects | None:
        try:
            objects = self.source.read(sample)
        except AbsentValue:
            if self.settings.unannotated == "fault":
                raise
            return None
        if self.settings.masks and len(objects.labels) and objects.segmentations is None:
            raise bad(sample, f"{self.source.source}: has no segmentations; masks need them")
        return objects

    def _seen(self, sample: Sample, objects: Objects, view: View) -> dict[str, Any]:
        """The objects that are left in an output."""
        boxes, keep = cut_boxes(
            objects.boxes, view.geometry, view.source, self.settings.min_visible
        )
        keep &= (boxes[:, 2:] - boxes[:, :2] >= self.settings.min_side).all(1)
        objects, boxes = objects.taken(keep), boxes[keep]
        if not self.settings.masks:
            return _item(objects, boxes, None)
        height, width = view.geometry.height, view.geometry.width
        masks = np.zeros((len(boxes), *view.image.shape[:2]), dtype=bool)
        for place, segmentation in enumerate(objects.segmentations or ()):
            try:
                seen = segmentation_mask(segmentation, view.geometry, view.source)
            except (ValueError, TypeError, OverflowError) as error:
                raise bad(sample, f"{self.source.source}: {error}") from error
            masks[place, :height, :width] = seen
        if view.geometry.warps:
            masks[:, :height, :width] &= shown_mask(view.geometry)
        keep = masks.any((1, 2))  # a box may be seen where its object is not
        masks, boxes, objects = masks[keep], boxes[keep], objects.taken(keep)
        return _item(objects, mask_boxes(masks) if self.settings.boxes_from_masks else boxes, masks)


def _item(objects: Objects, boxes: np.ndarray, masks: np.ndarray | None) -> dict[str, Any]:
    return {
        "boxes": boxes.astype(np.float32),
        "labels": objects.labels,
        "crowd": objects.crowd,
        "masks": masks,
    }
