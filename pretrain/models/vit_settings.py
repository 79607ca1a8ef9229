"""Settings of the vision transformer, which need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pretrain.models.encoder_settings import EncoderSettings

if TYPE_CHECKING:
    from pretrain.models.build_context import BuildContext
    from pretrain.models.vit import VisionTransformer


Activation = Literal["quick_gelu", "gelu"]


class VitSettings(EncoderSettings):
    """Shape of a vision transformer; the defaults are CLIP's ViT-B/16."""

    reads: ClassVar[str] = "images"
    type: Literal["vit"] = "vit"
    """Selects this encoder among the kinds that a recipe may name."""
    image_size: int = Field(224, gt=0)
    """Side in pixels that the position table is made for. Images of other sizes are welcome."""
    patch_size: int = Field(16, gt=0)
    """Side of a patch in pixels."""
    width: int = Field(768, gt=0)
    """Channels of a token."""
    layers: int = Field(12, gt=0)
    """Number of transformer blocks."""
    heads: int = Field(12, gt=0)
    """Attention heads; must divide `width`."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden channels of the MLP, as a multiple of `width`."""
    activation: Activation = "quick_gelu"
    """Non-linearity of the MLP; `quick_gelu` is what CLIP and GIT weights were trained with."""
    position_std: float | None = Field(None, gt=0)
    """Standard deviation of the first position embeddings; null = `width` ** -0.5 as in CLIP.
    Beside patches of natural contrast that is faint: runs of a few hundred steps learn *where*
    things are sooner with about 0.5."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass: about a third more time for far less memory."""

    @model_validator(mode="after")
    def _check(self) -> VitSettings:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size ({self.patch_size}) must divide image_size ({self.image_size})"
            )
        return self

    @property
    def size_multiple(self) -> int:
        """Of other sides, what is beyond the last whole patch is left out."""
        return self.patch_size

    @property
    def groups_cells(self) -> bool:
        """By masks of its attention."""
        return True

    @property
    def cells_problem(self) -> str | None:
        """The patches are its cells."""
        return None

    def as_target(self) -> Self:
        """Without recomputation."""
        return self.model_copy(update={"gradient_checkpointing": False})

    @property
    def pools(self) -> tuple[str, ...]:
        """The ways to one vector per image."""
        return ("mean", "class_token")

    def build(self, context: BuildContext | None = None) -> VisionTransformer:
        """The encoder these settings describe, on torch's default device."""
        from pretrain.models.vit import VisionTransformer

        return VisionTransformer(**self.model_dump(exclude={"type"}))
