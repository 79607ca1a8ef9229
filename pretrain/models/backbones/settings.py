"""Settings of the backbones that transformers gives, which need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pretrain.models.encoder_settings import EncoderSettings

if TYPE_CHECKING:
    from pretrain.models.backbones.resnet import ResNet
    from pretrain.models.backbones.swin import Swin
    from pretrain.models.build_context import BuildContext


class BackboneSettings(EncoderSettings):
    """Base of backbones with four maps."""

    reads: ClassVar[str] = "images"

    @property
    def smallest_cell(self) -> int:
        """A pixel of the last map."""
        return 32

    @property
    def pools(self) -> tuple[str, ...]:
        """The ways to one vector per image."""
        return ("mean",)


class SwinSettings(BackboneSettings):
    """Shape of a Swin transformer; the defaults are Swin-B's at 384 pixels. Swin-L: channels 192,
    heads [6, 12, 24, 48]. Nothing is dropped in training."""

    type: Literal["swin"] = "swin"
    """Selects this encoder among the kinds that a recipe may name."""
    channels: int = Field(128, gt=0)
    """Channels of the first stage; each further one has twice as many."""
    depths: tuple[int, int, int, int] = (2, 2, 18, 2)
    """Blocks of each stage."""
    heads: tuple[int, int, int, int] = (4, 8, 16, 32)
    """Attention heads of each stage."""
    window: int = Field(12, gt=1)
    """Side of the windows in places: 12 for weights from 384 pixels, 7 for those from 224."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass: about a third more time for far less memory."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for stage, heads in enumerate(self.heads):
            if self.channels * 2**stage % heads:
                raise ValueError(
                    f"heads[{stage}] ({heads}) must divide the {self.channels * 2**stage} channels "
                    "of its stage"
                )
        return self

    def as_target(self) -> Self:
        """Without recomputation."""
        return self.model_copy(update={"gradient_checkpointing": False})

    def build(self, context: BuildContext | None = None) -> Swin:
        """The encoder these settings describe, on torch's default device."""
        from pretrain.models.backbones.swin import Swin

        return Swin(**self.model_dump(exclude={"type"}))


class ResNetSettings(BackboneSettings):
    """Shape of a ResNet of bottlenecks; the defaults are ResNet-50's. Its batch norms keep the
    statistics and factors that `initial_weights` brings: those of a rank's micro-batch would couple
    its samples."""

    type: Literal["resnet"] = "resnet"
    """Selects this encoder among the kinds that a recipe may name."""
    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Bottlenecks of each stage."""
    channels: tuple[int, int, int, int] = (256, 512, 1024, 2048)
    """Channels of each stage's map; multiples of 4."""
    stem: int = Field(64, gt=0)
    """Channels of the stem."""
    stride_in_first: bool = False
    """Whether the first of a bottleneck's three convolutions has its stride (the original), and not
    the second (torchvision's)."""

    def build(self, context: BuildContext | None = None) -> ResNet:
        """The encoder these settings describe, on torch's default device."""
        from pretrain.models.backbones.resnet import ResNet

        return ResNet(**self.model_dump(exclude={"type"}))
