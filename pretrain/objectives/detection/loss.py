"""Losses of detection and instance segmentation (those of Mask DINO), as shares of a global batch.

Each is a sum over this micro-batch, divided by the number of boxes of the global batch: summed over
all micro-batches and ranks it is the loss of one rank with the whole batch. Nothing asks how many
boxes there are here: without any, all modules run, and give zeros with a gradient of zeros.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.regions.boxes import covered, exact, generalised_iou
from pretrain.models.regions.decoder import Predictions, Regions
from pretrain.objectives.detection.denoising import Denoising
from pretrain.objectives.detection.matching import COST_WEIGHTS, Pairs, match
from pretrain.objectives.detection.points import MaskPoints, features_at, masks_at
from pretrain.objectives.detection.targets import Targets

LOSS_WEIGHTS = {"class": 4.0, "box": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0}


class PointValues(NamedTuple):
    """What the loss of masks reads."""

    features: Tensor
    """(B, C + F, width): mask features at candidates and free points."""
    labels: Tensor | None
    """(T, C + F): the objects' masks there; None: objects have no masks."""
    candidates: int
    """C: how many of the points are candidates."""
    uncertain: int
    """How many candidates are taken."""


class DetectionLoss:
    """Matching, and the losses of all layers.

    Args:
        weights: of the losses class, box, giou, mask and dice.
        costs: of the same terms in matching.
        alpha, gamma: of the focal loss.
        giou_eps: joins the denominators of generalised IoU; Mask DINO has 1e-6.
        crowd_cover: a prediction without an object, of whose box a crowd covers this part or more,
            is not called wrong for naming the crowd's class.
    """

    def __init__(
        self,
        weights: Mapping[str, float] = LOSS_WEIGHTS,
        costs: Mapping[str, float] = COST_WEIGHTS,
        alpha: float = 0.25,
        gamma: float = 2.0,
        giou_eps: float = 0.0,
        crowd_cover: float = 0.5,
    ) -> None:
        self.weights, self.costs = dict(weights), dict(costs)
        self.alpha, self.gamma = alpha, gamma
        self.giou_eps, self.crowd_cover = giou_eps, crowd_cover

    def shares(
        self,
        regions: Regions,
        targets: Targets,
        points: MaskPoints,
        boxes: float | Tensor,
        denoising: Denoising | None = None,
    ) -> dict[str, Tensor]:
        """This micro-batch's share of the global batch's losses.

        boxes: boxes of the global batch (`box_count` of all micro-batches and ranks).
        denoising: what the decoder's known boxes were.

        Returns 0-dim float32 tensors: `loss` over all layers, weighted, the only one with a
        gradient; `class`, `box`, `giou`, `mask` and `dice` of the last layer and `denoising` of all
        layers, as they are in `loss` but for the weights of the five; `unmatched`, the part of the
        boxes that have no prediction, as there are more of them than queries.
        """
        values, at_matching = self._point_values(regions.mask_features, targets, points)
        pairs = match(
            regions.predictions,
            targets,
            *at_matching,
            self.costs,
            alpha=self.alpha,
            gamma=self.gamma,
            giou_eps=self.giou_eps,
        )
        boxes = torch.as_tensor(boxes, dtype=torch.float32, device=targets.boxes.device)
        boxes = boxes.clamp(min=1.0)
        found = [
            self.losses(prediction, targets, own, values)
            for prediction, own in zip(regions.predictions, pairs, strict=True)
        ]
        loss = sum(self._weighted(losses) for losses in found)
        shares = {name: value.detach() / boxes for name, value in found[-1].items()}
        if denoising is not None:
            part = sum(
                self._weighted(
                    self.losses(prediction, targets, denoising.pairs, values, denoising.weights)
                )
                for prediction in regions.denoising
            )
            shares["denoising"] = part.detach() / boxes
            loss = loss + part
        unmatched = sum(targets.counts) - sum(pairs[0].counts)
        return shares | {"loss": loss / boxes, "unmatched": unmatched / boxes}

    def losses(
        self,
        prediction: Predictions,
        targets: Targets,
        pairs: Pairs,
        values: PointValues,
        pair_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sums of one layer's losses, without weights: class, box, giou, mask and dice.

        pair_weights: (M,) of the pairs; predictions without a pair then have no loss at all. None:
        1 for each, and what is without a pair should say that it is nothing.
        """
        batch, queries, classes = prediction.logits.shape
        rows = pairs.images * queries + pairs.queries
        labels = targets.labels.index_select(0, pairs.targets)
        logits = exact(prediction.logits)
        wanted = torch.zeros_like(logits).flatten()
        wanted = wanted.index_fill(0, rows * classes + labels, 1.0).view_as(logits)
        if pair_weights is None:
            weights = self._judged(prediction, targets, wanted)
            pair_weights = torch.ones_like(pairs.images, dtype=logits.dtype)
        else:
            weights = logits.new_zeros(batch * queries)
            weights = weights.index_copy(0, rows, pair_weights.to(logits.dtype))
            weights = weights.view(batch, queries, 1)
        found = exact(prediction.boxes).flatten(0, 1).index_select(0, rows)
        right = targets.boxes.index_select(0, pairs.targets)
        giou = generalised_iou(found, right, self.giou_eps)
        mask, dice = self._mask_losses(prediction, pairs, rows, values)
        return {
            "class": (focal_loss(logits, wanted, self.alpha, self.gamma) * weights).sum(),
            "box": ((found - right).abs().sum(-1) * pair_weights).sum(),
            "giou": ((1 - giou) * pair_weights).sum(),
            "mask": (mask * pair_weights).sum(),
            "dice": (dice * pair_weights).sum(),
        }

    def _weighted(self, losses: Mapping[str, Tensor]) -> Tensor:
        return sum(self.weights[name] * value for name, value in losses.items())

    def _judged(self, prediction: Predictions, targets: Targets, wanted: Tensor) -> Tensor:
        """(B, Q, classes) of 0 and 1: what predictions may be told about each class."""
        weights = targets.annotated[:, None, None].to(wanted.dtype)
        boxes = exact(prediction.boxes).detach()
        inside = covered(boxes, targets.crowd_boxes.to(boxes.dtype)) >= self.crowd_cover
        classes = torch.arange(wanted.shape[-1], device=wanted.device)
        of_class = (targets.crowd_labels[..., None] == classes).to(wanted.dtype)
        left_out = (inside.to(wanted.dtype) @ of_class > 0) & (wanted == 0)
        return weights * ~left_out

    def _point_values(
        self, mask_features: Tensor, targets: Targets, points: MaskPoints
    ) -> tuple[PointValues, tuple[Tensor | None, Tensor | None]]:
        """For the loss; and features and labels for matching."""
        candidates = points.candidates.shape[1]
        places = torch.cat([points.candidates, points.free], dim=1)
        features, labels = features_at(mask_features, places), None
        at_matching: tuple[Tensor | None, Tensor | None] = (None, None)
        if targets.masks is not None:
            labels = masks_at(targets.masks, places.index_select(0, targets.images))
            own = points.matching.index_select(0, targets.images)
            with torch.no_grad():
                read = features_at(mask_features, points.matching)
            at_matching = read, masks_at(targets.masks, own)
        return PointValues(features, labels, candidates, points.uncertain), at_matching

    def _mask_losses(
        self, prediction: Predictions, pairs: Pairs, rows: Tensor, values: PointValues
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and dice loss of each pair, (M,)."""
        embeds = prediction.mask_embeds.flatten(0, 1).index_select(0, rows)
        logits = exact(
            torch.cat(
                [
                    own @ features.T
                    for own, features in zip(
                        embeds.split(list(pairs.counts)), values.features, strict=True
                    )
                ]
            )
        )
        if values.labels is None:
            nothing = logits.sum(-1) * 0.0  # the head runs as it does where there are masks
            return nothing, nothing
        labels = values.labels.index_select(0, pairs.targets).to(logits.dtype)
        split = [values.candidates, logits.shape[1] - values.candidates]
        (logits, free), (labels, free_labels) = logits.split(split, 1), labels.split(split, 1)
        least_certain = logits.detach().abs().topk(values.uncertain, dim=1, largest=False).indices
        logits = torch.cat([logits.gather(1, least_certain), free], dim=1)
        labels = torch.cat([labels.gather(1, least_certain), free_labels], dim=1)
        return mask_losses(logits, labels)


def focal_loss(logits: Tensor, wanted: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss (arXiv 1708.02002) of each logit; wanted: 0 or 1 for each."""
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    p = logits.sigmoid()
    miss = p + wanted - 2 * p * wanted  # 1 - p where it is wanted, else p
    return (alpha * wanted + (1 - alpha) * (1 - wanted)) * miss**gamma * entropy


def mask_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the points, and dice loss with 1 for smoothing: (M,) each.

    logits, labels: (M, P); labels are 0 to 1.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
    share = logits.sigmoid()
    common, both = (share * labels).sum(-1), share.sum(-1) + labels.sum(-1)
    return entropy, 1 - (2 * common + 1) / (both + 1)
