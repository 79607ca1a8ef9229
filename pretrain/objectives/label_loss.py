"""Cross-entropy of images with labels or probabilities, and of pairs of images that are mixed."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.samples.labels import NO_LABEL
from pretrain.objectives.mixing import partners


def label_losses(
    logits: Tensor, labels: Tensor, targets: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of each image, (B,) float32; 0 where there is no label.

    logits: (B, classes) float32; labels: (B,) int64; targets: (B, classes) float32, None: all of
    the labels; smoothing: share of the target spread evenly over all classes.
    """
    options = {"reduction": "none", "label_smoothing": smoothing}
    if targets is None:
        return F.cross_entropy(logits, labels, ignore_index=NO_LABEL, **options)
    return F.cross_entropy(logits, targets, **options) * (labels != NO_LABEL)


def mixed_label_loss(
    logits: Tensor, answers: Mapping[str, Tensor], weights: Tensor | None, smoothing: float
) -> Tensor:
    """Loss summed over labelled images, of their own and their partners' answers: 0-dim float32.

    answers: `labels` and perhaps `targets`, as in `label_losses`; weights: (B,), the partners'
    parts in the images, none: nothing is mixed.
    """
    own = label_losses(logits, **answers, smoothing=smoothing)
    if weights is None:
        return own.sum()
    others = {name: partners(rows) for name, rows in answers.items()}
    other = label_losses(logits, **others, smoothing=smoothing)
    return ((1 - weights) * own + weights * other).sum()


def of_larger_part(answers: Mapping[str, Tensor], weights: Tensor | None) -> dict[str, Tensor]:
    """The answers for the larger part of each image; arguments as in `mixed_label_loss`."""
    if weights is None:
        return dict(answers)
    larger = weights > 0.5
    return {
        name: torch.where(larger.view(-1, *[1] * (rows.dim() - 1)), partners(rows), rows)
        for name, rows in answers.items()
    }
