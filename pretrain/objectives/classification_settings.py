"""Settings of classification, which need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from pretrain.objectives.objective_settings import ObjectiveSettings
from pretrain.objectives.pool import Pool

if TYPE_CHECKING:
    from pretrain.models.build_context import BuildContext
    from pretrain.objectives.classification import Classification


class ClassificationSettings(ObjectiveSettings):
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

    @property
    def wanted_pool(self) -> Pool:
        """As of `ObjectiveSettings`."""
        return self.pool

    @property
    def further_sizes(self) -> tuple[int, ...]:
        """As of `ObjectiveSettings`."""
        return self.smaller_sizes

    def build(self, context: BuildContext) -> Classification:
        """The objective for the context's encoders, and the pixel statistics, classes and further
        views of the data.

        Raises ValueError: no encoder of that name, one
        that cannot pool that way, or smaller sizes in two ways.
        """
        from pretrain.models.frozen import training_flops
        from pretrain.objectives.classification import Classification
        from pretrain.objectives.image_tokens import find_encoder, vector_flops, vector_width

        encoder = find_encoder(context.encoders, self.encoder)
        return Classification(
            context.classes,
            encoder=self.encoder,
            encoder_width=vector_width(encoder, self.pool),
            encoder_flops=training_flops(encoder, vector_flops(encoder, self.pool)),
            image_mean=context.image_mean,
            image_std=context.image_std,
            pool=self.pool,
            label_smoothing=self.label_smoothing,
            head_std=self.head_std,
            smaller_sizes=self.smaller_sizes,
            smaller_views=context.smaller_views,
            consistency=self.scale_consistency,
        )
