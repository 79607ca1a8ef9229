"""Settings of classification, which need no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from data_pipeline.settings import Settings
from pretrain.objectives.pool import Pool

if TYPE_CHECKING:
    from torch import nn

    from pretrain.objectives.classification import Classification


class ClassificationSettings(Settings):
    """Classification of images; the number of classes comes from the task's data."""

    data_type: ClassVar[str] = "labels"
    encoder_fields: ClassVar[dict[str, str]] = {"encoder": "images"}
    type: Literal["classification"] = "classification"
    """Selects this objective among the kinds that a recipe may name."""
    encoder: str = "image"
    """Name of the encoder in `model.encoders` whose tokens the head reads."""
    pool: Pool = "mean"
    """What the linear layer sees of an image: the mean of its tokens, the first one
    (`class_token`), or the vector that the encoder's own `head` makes."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the target spread evenly over all classes."""
    head_std: float = Field(0.02, ge=0)
    """Standard deviation of the linear layer's first weights, where `initial_weights` has none of
    it. A small one (2e-5) lets a pretrained encoder begin without large gradients from new
    classes."""
    smaller_sizes: tuple[int, ...] = ()
    """Further sizes of each image in the same step, in pixels of the shorter side, descending and
    below `image.size`: the loss is the mean over all sizes (ResFormer; its own: 160 and 128 beside
    224). They are resized from the augmented image; `smaller_views` of the data, in place of this,
    are augmented each on its own. Evaluation sees the full size."""
    scale_consistency: float = Field(1.0, ge=0)
    """Weight of the loss that pulls the vector of each smaller size to that of the next larger."""

    @field_validator("smaller_sizes")
    @classmethod
    def _descending(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if list(sizes) != sorted(set(sizes), reverse=True) or min(sizes, default=1) < 1:
            raise ValueError(f"must descend, like [160, 128], not {list(sizes)}")
        return sizes

    def build(
        self,
        encoders: Mapping[str, nn.Module],
        vocabulary: Any,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        classes: int,
        smaller_views: Sequence[int] = (),
    ) -> Classification:
        """The objective for these encoders and the pixel statistics, classes and further views of
        the data.

        `vocabulary` is for objectives with text. Raises ValueError: no encoder of that name, one
        that cannot pool that way, or smaller sizes in two ways.
        """
        from pretrain.models.frozen import training_flops
        from pretrain.objectives.classification import Classification
        from pretrain.objectives.image_tokens import find_encoder, vector_flops, vector_width

        encoder = find_encoder(encoders, self.encoder)
        return Classification(
            classes,
            encoder=self.encoder,
            encoder_width=vector_width(encoder, self.pool),
            encoder_flops=training_flops(encoder, vector_flops(encoder, self.pool)),
            image_mean=image_mean,
            image_std=image_std,
            pool=self.pool,
            label_smoothing=self.label_smoothing,
            head_std=self.head_std,
            smaller_sizes=self.smaller_sizes,
            smaller_views=smaller_views,
            consistency=self.scale_consistency,
        )
