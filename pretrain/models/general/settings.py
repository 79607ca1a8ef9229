"""Settings of the general decoder, which need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from data_pipeline.settings import Settings
from pretrain.models.encoder_settings import EncoderSettings

if TYPE_CHECKING:
    from pretrain.models.build_context import BuildContext
    from pretrain.models.general.decoder import GeneralDecoder
    from pretrain.models.general.patches import Patches


class ExpertSettings(Settings):
    """Attribute-level conditional experts. Numbers and noise of v2 are not known: v1's."""

    number: int = Field(8, ge=2)
    """Experts of a layer."""
    chosen: int = Field(2, ge=1)
    """Experts that are merged into one layer."""
    every: int = Field(1, ge=1)
    """Layers 0, every, 2 * every, ... have experts. v2: all; v1: every second."""
    attention: bool = False
    """Whether the attention has experts too, as in v1; the MLP always does."""
    noise: float = Field(1.0, ge=0)
    """Standard deviation of the noise on the scores in training, times `number`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.chosen > self.number:
            raise ValueError(f"chosen ({self.chosen}) must not be above number ({self.number})")
        return self


class GeneralDecoderSettings(EncoderSettings):
    """Shape of the decoder that all tasks share; the defaults are those of Uni-Perceiver v2: six
    layers of BERT-base, with experts in all MLPs."""

    reads: ClassVar[str] = "features"
    type: Literal["general_decoder"] = "general_decoder"
    """Selects this module among the kinds that a recipe may name."""
    width: int = Field(768, gt=0)
    """Channels of a token."""
    layers: int = Field(6, gt=0)
    """Number of layers; v1 has 12, for it has no encoders."""
    heads: int = Field(12, gt=0)
    """Attention heads; must divide `width`."""
    hidden: int = Field(3072, gt=0)
    """Hidden channels of the MLPs."""
    norm: Literal["after", "before"] = "after"
    """Where the norms are: behind each sum, as in BERT, or before attention and MLP, as in v1."""
    layer_scale: float | None = None
    """First value of the factors on what attention and MLP add; null: there are none. v1: 0.001."""
    experts: ExpertSettings | None = ExpertSettings()
    """Conditional experts; null: dense layers."""
    max_queries: int = Field(128, gt=0)
    """Longest text in tokens that can be predicted in one pass."""
    temperature: float = Field(0.07, gt=0)
    """First value of the learned temperatures, one for each family of tasks."""
    max_scale: float = Field(100.0, gt=1)
    """The inverse of a temperature is held at or below this."""
    gradient_checkpointing: bool = False
    """Recompute the layers in the backward pass: about a third more time for far less memory."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        if 1 / self.temperature > self.max_scale:
            raise ValueError(
                f"temperature ({self.temperature}) is below 1 / max_scale ({1 / self.max_scale:g}),"
                " where it would not be learned: raise one of them"
            )
        return self

    def build(self, context: BuildContext | None = None) -> GeneralDecoder:
        """The decoder these settings describe, on torch's default device."""
        from pretrain.models.general.decoder import GeneralDecoder

        fields = self.model_dump(exclude={"type", "experts"})
        return GeneralDecoder(**fields, experts=self.experts)


class PatchesSettings(EncoderSettings):
    """Patches of images as tokens, with nothing behind them, as in Uni-Perceiver v1."""

    reads: ClassVar[str] = "images"
    type: Literal["patches"] = "patches"
    """Selects this encoder among the kinds that a recipe may name."""
    image_size: int = Field(224, gt=0)
    """Side of the images in pixels; others are refused."""
    patch_size: int = Field(16, gt=0)
    """Side of a patch in pixels; must divide `image_size`."""
    width: int = Field(768, gt=0)
    """Channels of a token."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size ({self.patch_size}) must divide image_size ({self.image_size})"
            )
        return self

    @property
    def size_multiple(self) -> int:
        """All of the image."""
        return self.image_size

    @property
    def any_sides(self) -> bool:
        """The table of positions is that of one size."""
        return False

    @property
    def pools(self) -> tuple[str, ...]:
        """The ways to one vector per image."""
        return ("mean",)

    def build(self, context: BuildContext | None = None) -> Patches:
        """The encoder these settings describe, on torch's default device."""
        from pretrain.models.general.patches import Patches

        return Patches(**self.model_dump(exclude={"type"}))
