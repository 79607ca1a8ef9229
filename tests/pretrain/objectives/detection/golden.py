"""The reference cases of matching and losses: float64, checked against the released Mask DINO."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.models.regions.decoder import Predictions
from pretrain.objectives.detection.targets import Targets

GOLDENS = Path(__file__).parents[3] / "goldens"
NAMES = ("box_c5", "mask_c5", "mask_binary")


def load(name: str) -> dict[str, Tensor]:
    return load_file(GOLDENS / f"det_match_{name}.safetensors")


def per_image(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
    return [tensors[f"{name}.{image}"] for image in range(len(tensors["pred_boxes"]))]


def predictions(tensors: dict[str, Tensor]) -> tuple[Predictions, Tensor | None]:
    """And mask features: whole masks are the features, of which each query picks its own."""
    boxes = tensors["pred_boxes"]
    picks = torch.eye(boxes.shape[1], dtype=boxes.dtype).expand(len(boxes), -1, -1)
    features = tensors.get("pred_masks")
    if features is not None:
        features = features.permute(0, 2, 3, 1).contiguous()
    return Predictions(tensors["pred_logits"], boxes, picks), features


def targets(tensors: dict[str, Tensor]) -> Targets:
    labels = per_image(tensors, "target_labels")
    counts = tuple(map(len, labels))
    batch = len(counts)
    return Targets(
        boxes=torch.cat(per_image(tensors, "target_boxes")),
        labels=torch.cat(labels),
        images=torch.arange(batch).repeat_interleave(torch.tensor(counts)),
        counts=counts,
        annotated=torch.ones(batch, dtype=torch.bool),
        crowd_boxes=torch.zeros(batch, 0, 4),
        crowd_labels=torch.zeros(batch, 0, dtype=torch.int64),
        masks=torch.cat(per_image(tensors, "target_masks")),
    )
