"""Which prediction answers for which object: the cheapest one-to-one assignment in each image.

Costs exist only between the objects of an image and its own predictions. Those of all layers go to
the host in one copy, and the pairs come back in one.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pretrain.models.regions.boxes import exact, generalised_iou
from pretrain.models.regions.decoder import Predictions
from pretrain.objectives.detection.targets import Targets

COST_WEIGHTS = {"class": 4.0, "box": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0}

_INSIDE_LOG = 1e-8
# Instead of a cost that is no finite number, so that every rank gets some assignment. Its loss is
# not finite either, and all ranks skip the step.
_FORBIDDING = 1e12


class Pairs(NamedTuple):
    """Predictions and the objects that they answer for, image after image."""

    images: Tensor
    """(M,) int64."""
    queries: Tensor
    """(M,) int64."""
    targets: Tensor
    """(M,) int64: places in `Targets`."""
    counts: tuple[int, ...]
    """Pairs of each image: numbers of the host."""


@torch.no_grad()
def match(
    predictions: Sequence[Predictions],
    targets: Targets,
    mask_features: Tensor | None = None,
    mask_labels: Tensor | None = None,
    weights: Mapping[str, float] = COST_WEIGHTS,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    giou_eps: float = 0.0,
) -> list[Pairs]:
    """The pairs of each layer's predictions; unannotated images have no objects, so no pairs.

    Where an image has more objects than predictions, as many as there are predictions are paired.

    mask_features: (B, P, width), the features of masks at an image's points; mask_labels: (T, P),
    the objects' masks there. None: masks are not compared.
    """
    totals = []
    for prediction in predictions:
        parts = pair_costs(
            prediction,
            targets,
            mask_features,
            mask_labels,
            alpha=alpha,
            gamma=gamma,
            giou_eps=giou_eps,
        )
        totals.append(sum(weights[name] * cost for name, cost in parts.items()))
    return assign(torch.stack(totals), targets.counts)


def pair_costs(
    prediction: Predictions,
    targets: Targets,
    mask_features: Tensor | None = None,
    mask_labels: Tensor | None = None,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    giou_eps: float = 0.0,
) -> dict[str, Tensor]:
    """Costs without weights, each (T, Q) float32: object t with the predictions of its own image.

    Arguments as in `match`.
    """
    p = exact(prediction.logits).sigmoid()
    positive = alpha * (1 - p) ** gamma * -torch.log(p + _INSIDE_LOG)
    negative = (1 - alpha) * p**gamma * -torch.log(1 - p + _INSIDE_LOG)
    by_class = (positive - negative).transpose(1, 2)
    rows = targets.images * by_class.shape[1] + targets.labels
    boxes = exact(prediction.boxes).index_select(0, targets.images)
    wanted = targets.boxes[:, None]
    costs = {
        "class": by_class.flatten(0, 1).index_select(0, rows),
        "box": (boxes - wanted).abs().sum(-1),
        "giou": -generalised_iou(boxes, wanted, giou_eps),
    }
    if mask_labels is not None:
        logits = exact(prediction.mask_logits(mask_features))
        costs |= _mask_costs(logits, mask_labels, targets.counts)
    return costs


def _mask_costs(logits: Tensor, labels: Tensor, counts: Sequence[int]) -> dict[str, Tensor]:
    """Cross-entropy and dice cost, (T, Q) each, of mask logits (B, Q, P) and masks (T, P)."""
    entropy, dice = [], []
    for own, label in zip(logits, labels.to(logits.dtype).split(list(counts)), strict=True):
        # Of logit x and label y the cross-entropy is softplus(x) - x * y.
        entropy.append((F.softplus(own).sum(-1) - label @ own.T) / own.shape[-1])
        share = own.sigmoid()
        together = share.sum(-1) + label.sum(-1, keepdim=True)
        dice.append(1 - (2 * (label @ share.T) + 1) / (together + 1))
    return {"mask": torch.cat(entropy), "dice": torch.cat(dice)}


def assign(costs: Tensor, counts: Sequence[int]) -> list[Pairs]:
    """The cheapest pairs of each layer and image.

    costs: (layers, T, Q) on any device; counts: the T objects' numbers in each image.
    """
    host = np.nan_to_num(
        costs.cpu().numpy().astype(np.float64),
        nan=_FORBIDDING,
        posinf=_FORBIDDING,
        neginf=_FORBIDDING,
    )
    starts = np.cumsum([0, *counts])
    layers, paired = [], tuple(min(count, costs.shape[2]) for count in counts)
    for cost in host:
        found = [np.zeros((2, 0), dtype=np.int64)]
        for start, count in zip(starts, counts, strict=False):
            if count:
                query, place = linear_sum_assignment(cost[start : start + count].T)
                found.append(np.stack([query, start + place]))
        layers.append(np.concatenate(found, axis=1))
    images = np.repeat(np.arange(len(counts)), paired)
    rows = np.concatenate([images[None], *layers]).astype(np.int64)
    moved = torch.from_numpy(rows).to(costs.device, non_blocking=True)
    return [
        Pairs(moved[0], moved[1 + 2 * layer], moved[2 + 2 * layer], paired)
        for layer in range(len(layers))
    ]
