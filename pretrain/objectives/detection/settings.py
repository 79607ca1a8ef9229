"""Settings of detection, which need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from data_pipeline.settings import Settings

if TYPE_CHECKING:
    from pretrain.objectives.detection.loss import DetectionLoss


class DetectionWeights(Settings):
    """Weights of the terms of matching, and of the losses; the defaults are Mask DINO's."""

    class_weight: float = Field(4.0, ge=0)
    """Of whether a prediction names the object's class."""
    box_weight: float = Field(5.0, ge=0)
    """Of the distance of centres and sides."""
    giou_weight: float = Field(2.0, ge=0)
    """Of generalised intersection over union."""
    mask_weight: float = Field(5.0, ge=0)
    """Of the cross-entropy of the mask."""
    dice_weight: float = Field(5.0, ge=0)
    """Of the mask's dice coefficient."""

    def by_name(self) -> dict[str, float]:
        """The weights by the names of the terms: class, box, giou, mask, dice."""
        return {name.removesuffix("_weight"): value for name, value in self}


class DetectionLossSettings(Settings):
    """Matching and losses of boxes and masks; the defaults are Mask DINO's unless a field says
    otherwise."""

    weights: DetectionWeights = DetectionWeights()
    """Of the losses."""
    costs: DetectionWeights = DetectionWeights()
    """Of the same terms where predictions are matched with objects."""
    alpha: float = Field(0.25, gt=0, lt=1)
    """Weight of what is there in the focal loss; what is not has 1 - alpha."""
    gamma: float = Field(2.0, ge=0)
    """Exponent of the focal loss."""
    giou_eps: float = Field(0.0, ge=0)
    """Joins the denominators of generalised IoU. Mask DINO has 1e-6, which small boxes feel: ours
    is the definition."""
    crowd_cover: float = Field(0.5, gt=0, le=1)
    """A prediction of whose box a crowd covers this part is not called wrong. Ours."""
    points: int = Field(12_544, gt=0)
    """Points at which masks are compared, in matching and in the loss."""
    oversample: float = Field(3.0, ge=1)
    """Candidates for the loss's points, as a multiple of them."""
    importance: float = Field(0.75, ge=0, le=1)
    """Part of the loss's points that is taken where a mask is least certain."""
    denoising_queries: int = Field(100, ge=0)
    """Queries for known boxes with noise, in as many groups as fit; 0: no denoising."""
    denoising_noise: float = Field(0.4, ge=0, le=1)
    """How far a known box is moved: centres by up to this times half a side, sides by up to this
    times their length."""

    def build(self) -> DetectionLoss:
        """The loss these settings describe."""
        from pretrain.objectives.detection.loss import DetectionLoss

        return DetectionLoss(
            self.weights.by_name(),
            self.costs.by_name(),
            self.alpha,
            self.gamma,
            self.giou_eps,
            self.crowd_cover,
        )
