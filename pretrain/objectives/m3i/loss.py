"""The four losses of M3I, from the features of a batch; no parameter is read here.

Rows 2i are images whose dense targets are those of the same view (intra), rows 2i + 1 images whose
targets are those of another view (inter); both have texts and classes, as far as there are any.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from data_pipeline.samples.labels import NO_LABEL
from pretrain.objectives.contrastive.loss import contrastive_sums
from pretrain.objectives.label_loss import label_losses
from pretrain.objectives.m3i.decorrelation import (
    Moments,
    decorrelated_squares,
    normalised_targets,
    target_moments,
)

Kind = Literal["intra", "inter", "text", "category"]
KINDS: tuple[Kind, ...] = ("intra", "inter", "text", "category")

COUNTED_BY = {"intra": "intra", "inter": "inter", "text": "texts", "category": "labels"}
"""Kind of loss -> the count of `count_targets` that its mean is over."""


def counted_by(with_text: bool, with_classes: bool) -> dict[str, tuple[str, ...]]:
    """Metric -> the counts that it is a mean over; of the loss, those of its parts."""
    kinds = ["intra", "inter", *["text"] * with_text, *["category"] * with_classes]
    of_images = ("temperature", "with_text", "labelled", "target_std", "effective_rank")
    return {
        "loss": tuple(COUNTED_BY[kind] for kind in kinds),
        **{kind: (COUNTED_BY[kind],) for kind in kinds},
        "image_to_text": ("texts",),
        "text_to_image": ("texts",),
        "top1": ("labels",),
        **{name: ("images",) for name in of_images},
    }


def count_targets(batch: Mapping[str, Any]) -> dict[str, int]:
    """What the losses of a micro-batch are averaged over: images, intra and inter (images of either
    kind), texts, labels."""
    valid = batch["valid"]
    return {
        "images": int(valid.sum()),
        "intra": int(valid[::2].sum()),
        "inter": int(valid[1::2].sum()),
        "texts": int((batch["loss_mask"][:, 0].any(dim=1) & valid).sum()),
        "labels": int(((batch["labels"] != NO_LABEL) & valid).sum()),
    }


def m3i_losses(
    features: Mapping[str, Tensor],
    totals: Mapping[str, Tensor],
    decorrelation: float,
    label_smoothing: float,
    center: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Moments]:
    """This rank's shares of the losses and metrics of the global batch. A collective.

    features: of all B rows that this rank has of the global batch: prediction, target (B, N, C)
        float32, of the predictor and of the target branch; counted (B, N) bool, the target tokens
        that the loss is about; valid (B,) bool; if there are texts: image, text (B, D) float32 of
        unit length, caption_id (B,) int64, match_class (B,) int64 as in `match_classes`,
        has_text (B,) bool, scale (1,) float32; labels (B,) int64; if there are classes: logits
        (B, K) float32.
    totals: global sums of `count_targets`, 0-dim float32.
    decorrelation, label_smoothing, center: as in `M3ISettings`.

    Returns losses by kind and metrics, 0-dim float32 whose sums over ranks are means over the
    global batch, and the moments of the targets. A kind without targets is 0, with a path for the
    gradient.
    """
    valid, labels = features["valid"], features["labels"]
    images = torch.stack([totals["intra"], totals["inter"]])
    target = normalised_targets(features["target"], valid, totals["images"], center)
    features = {**features, "target": target}
    moments = target_moments(target, valid, images)
    losses = _dense_losses(features, moments, images, decorrelation)
    metrics: dict[str, Tensor] = {}
    if "text" in features:
        loss, image_hits, text_hits = contrastive_sums(
            features["image"],
            features["text"],
            features["scale"],
            features["caption_id"],
            features["has_text"],
            identical_match=True,
            match_class=features["match_class"],
        )
        texts = totals["texts"].clamp(min=1.0)
        mine = valid.sum() / totals["images"].clamp(min=1.0)
        losses["text"] = loss / texts
        metrics["image_to_text"] = image_hits / texts
        metrics["text_to_image"] = text_hits / texts
        metrics["with_text"] = features["has_text"].sum() / totals["images"].clamp(min=1.0)
        metrics["temperature"] = mine / features["scale"].detach()[0]
    if "logits" in features:
        count = totals["labels"].clamp(min=1.0)
        smoothed = label_losses(features["logits"], labels, smoothing=label_smoothing)
        losses["category"] = smoothed.sum() / count
        metrics["top1"] = (features["logits"].argmax(dim=1) == labels).sum() / count
        known = labels != NO_LABEL
        metrics["labelled"] = known.sum() / totals["images"].clamp(min=1.0)
    return losses, metrics, moments


def _dense_losses(
    features: Mapping[str, Tensor], moments: Moments, images: Tensor, decorrelation: float
) -> dict[str, Tensor]:
    """The losses of features: mean squares over the counted tokens of each kind's rows.

    images: (2,) float32, how many images of each kind the global batch has.
    """
    counted = features["counted"] & features["valid"][:, None]
    # Not from the rows at hand, which may all be padding: kinds differ, images of a kind do not.
    tokens = features["counted"].unflatten(0, (-1, 2)).sum(dim=2).amax(dim=0)
    found = {}
    for place, kind in enumerate(("intra", "inter")):
        squares = decorrelated_squares(
            features["prediction"][place::2],
            features["target"][place::2],
            moments.correlation[place],
            decorrelation,
        )
        number = (images[place] * tokens[place]).clamp(min=1.0)
        found[kind] = (squares * counted[place::2]).sum() / number
    return found
