"""Settings of InternImage, which need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from data_pipeline.settings import Settings
from pretrain.models.encoder_settings import EncoderSettings
from pretrain.models.internimage.mixer_settings import ByStage, DCNv3Settings, MixerSettings
from pretrain.models.internimage.sizes import SIZES

if TYPE_CHECKING:
    from pretrain.models.build_context import BuildContext
    from pretrain.models.internimage.internimage import InternImage


class ConvHeadSettings(Settings):
    """1x1 convolution, batch norm, GELU and mean over the last map: 12 x `channels` wide.

    Batch norm couples the samples of a micro-step, over all ranks: another `micro_batch` gives
    slightly other gradients."""

    type: Literal["conv"] = "conv"
    """Selects this head."""


class ProjectorSettings(Settings):
    """Attention pooling of the last two maps (the image projector of M3I); sides of images must be
    multiples of 32."""

    type: Literal["projector"] = "projector"
    """Selects this head."""
    width: int = Field(1024, gt=0)
    """Channels of the joined maps."""
    heads: int = Field(16, gt=0)
    """Attention heads; must divide `width`."""
    output: int = Field(768, gt=0)
    """Width of the vector."""

    @model_validator(mode="after")
    def _check(self) -> ProjectorSettings:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


HeadSettings = Annotated[ConvHeadSettings | ProjectorSettings, Field(discriminator="type")]


class InternImageSettings(EncoderSettings):
    """Shape of an InternImage; `size` fills in a published one."""

    reads: ClassVar[str] = "images"
    type: Literal["internimage"] = "internimage"
    """Selects this encoder among the kinds that a recipe may name."""
    size: Literal["T", "S", "B", "L", "XL", "H", "G"] | None = None
    """A published model, whose values the fields below then have unless they are given too."""
    channels: int = Field(64, gt=0)
    """Channels of the first stage; each stage has twice those of the one before."""
    depths: ByStage = Field([4, 4, 18, 4])
    """Layers of each stage."""
    groups: ByStage = Field([4, 8, 16, 32])
    """Groups of DCNv3 (attention heads of other mixers) in each stage."""
    mixer: MixerSettings = DCNv3Settings()
    """What mixes positions; the block around it is the same for all kinds."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden channels of the MLP, as a multiple of the stage's."""
    post_norm: bool = False
    """Norms behind mixer and MLP instead of before them."""
    res_post_norm: bool = False
    """Norms behind mixer and MLP besides those before them."""
    layer_scale: float | None = Field(None, allow_inf_nan=False)
    """First value of learned factors on what a layer adds to each channel; null = no factors."""
    post_norm_layers: list[int] = Field([])
    """Layers of the third stage, from 0, behind which the residual stream is normalised."""
    stage_norm: bool = True
    """A norm at the end of each stage."""
    head: HeadSettings | None = None
    """Makes one vector of an image, for objectives with `pool: head`; null = none."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Chance that a sample skips a branch of the last layer; it rises from 0 in the first one."""
    gradient_checkpointing: bool = False
    """Recompute the layers in the backward pass: about a third more time for far less memory."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_size(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        mixer = data.get("mixer")
        if isinstance(mixer, dict):
            mixer = {"type": "dcnv3", **mixer}
        known = SIZES.get(data.get("size"), {}) if isinstance(data.get("size"), str) else {}
        if isinstance(mixer, dict) and mixer["type"] == "dcnv3":
            mixer = {**known.get("mixer", {}), **mixer}
        return {**known, **data, **({"mixer": mixer} if "mixer" in data else {})}

    @model_validator(mode="after")
    def _check(self) -> InternImageSettings:
        for stage, groups in enumerate(self.groups):
            if self.channels * 2**stage % groups:
                raise ValueError(
                    f"groups[{stage}] ({groups}) must divide the {self.channels * 2**stage} "
                    "channels of its stage"
                )
        if self.channels % 2:
            raise ValueError(f"channels ({self.channels}) must be even: the stem begins with half")
        if self.res_post_norm and (self.post_norm or self.layer_scale is not None):
            raise ValueError(
                "res_post_norm goes with neither post_norm nor layer_scale: the norms that it adds "
                "would have no place"
            )
        if sorted(set(self.post_norm_layers)) != self.post_norm_layers:
            raise ValueError(
                f"post_norm_layers: {self.post_norm_layers} must rise: a layer has one such norm"
            )
        if wrong := [n for n in self.post_norm_layers if not 0 <= n < self.depths[2]]:
            raise ValueError(
                f"post_norm_layers: the third stage has layers 0..{self.depths[2] - 1}, not {wrong}"
            )
        return self

    @property
    def size_multiple(self) -> int:
        """Sides of images must be multiples of this."""
        return 32 if isinstance(self.head, ProjectorSettings) else 1

    @property
    def any_sides(self) -> bool:
        """Whether images of other sides are taken too."""
        return self.size_multiple == 1

    @property
    def pools(self) -> tuple[str, ...]:
        """The ways to one vector per image."""
        return ("mean",) if self.head is None else ("mean", "head")

    @property
    def pool_hint(self) -> str:
        """As of `EncoderSettings`."""
        return ", and with a `head` also that"

    @property
    def smallest_cell(self) -> int:
        """A pixel of the last map."""
        return 32

    @property
    def cells_problem(self) -> str | None:
        """As of `EncoderSettings`: the cells are what a projector pools."""
        if isinstance(self.head, ProjectorSettings):
            return None
        return "which an internimage has with `head: {type: projector}` alone: give it that"

    def as_target(self) -> Self:
        """Without drop path and recomputation."""
        return self.model_copy(update={"drop_path": 0.0, "gradient_checkpointing": False})

    def build(self, context: BuildContext | None = None) -> InternImage:
        """The encoder these settings describe, on torch's default device."""
        from pretrain.models.internimage.internimage import InternImage

        fields = {name: getattr(self, name) for name in type(self).model_fields}
        for name in ("type", "size", "mixer"):
            del fields[name]
        return InternImage(**fields, mixer=self.mixer.build)
