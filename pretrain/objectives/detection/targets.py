"""The objects of a batch as targets of detection."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain.models.regions.boxes import centred


@dataclass(frozen=True)
class Targets:
    """Objects of all images in one list, image after image; crowds are kept apart."""

    boxes: Tensor
    """(T, 4) float32: centre and size, fractions of the canvas."""
    labels: Tensor
    """(T,) int64."""
    images: Tensor
    """(T,) int64: places of their images in the batch, ascending."""
    counts: tuple[int, ...]
    """Objects of each image: numbers of the host."""
    annotated: Tensor
    """(B,) bool: False where nobody has looked for objects, and in padding rows."""
    crowd_boxes: Tensor
    """(B, R, 4): where objects were not told apart; without area beyond an image's number."""
    crowd_labels: Tensor
    """(B, R) int64; -1 beyond an image's number."""
    masks: Tensor | None = None
    """(T, H, W) bool on the canvas; None: there are none."""

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> "Targets":
        """The targets of a batch of box data (`BoxProcessor.collate`), on its device.

        The host reads counts and boxes, so on a GPU this waits for them.
        """
        canvas = batch["images"].shape[-2:]
        device = batch["images"].device
        boxes, labels, crowd, counts = (
            batch[name].cpu() for name in ("boxes", "labels", "crowd", "counts")
        )
        real = _real(counts, crowd)
        single = real & ~crowd
        scale = torch.tensor([canvas[1], canvas[0]] * 2, dtype=boxes.dtype)
        boxes = centred(boxes / scale)
        masks = batch.get("masks")
        if masks is not None:
            kept = single[real].nonzero()[:, 0]
            masks = masks.index_select(0, kept.to(device))
        crowds = real & crowd
        # Crowds to the front, so that there are no more columns than some image has crowds.
        columns = crowds.sum(1)
        order = (~crowds).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(columns.max())]
        there = crowds.gather(1, order)
        crowd_boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)) * there[..., None]
        crowd_labels = labels.gather(1, order).where(there, torch.tensor(-1))
        return cls(
            boxes=boxes[single].to(device),
            labels=labels[single].to(device),
            images=single.nonzero()[:, 0].to(device),
            counts=tuple(single.sum(1).tolist()),
            annotated=batch["annotated"],
            crowd_boxes=crowd_boxes.to(device),
            crowd_labels=crowd_labels.to(device),
            masks=masks,
        )

    def without_classes(self) -> "Targets":
        """The same objects, all of one class: for the proposal network."""
        return replace(
            self,
            labels=torch.zeros_like(self.labels),
            crowd_labels=self.crowd_labels.clamp(max=0),
        )


def box_count(batch: Mapping[str, Any]) -> int:
    """Boxes of a micro-batch that are targets; their global sum is what losses are divided by."""
    return int((_real(batch["counts"], batch["crowd"]) & ~batch["crowd"]).sum())


def _real(counts: Tensor, crowd: Tensor) -> Tensor:
    """(B, N) bool: the places of the list that hold a box."""
    return torch.arange(crowd.shape[1], device=crowd.device) < counts[:, None]
