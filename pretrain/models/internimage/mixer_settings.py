"""What mixes positions in a layer of InternImage: settings of DCNv3 and of what it is held
against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from data_pipeline.settings import Settings

if TYPE_CHECKING:
    from torch import nn

ByStage = Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=4, max_length=4)]
"""A number for each of the four stages."""


def _is_odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError(f"{value} must be odd, or the output would not be as large as the input")
    return value


Odd = Annotated[int, Field(gt=0), AfterValidator(_is_odd)]
"""Side of a kernel that has a middle."""


class DCNv3Settings(Settings):
    """Deformable aggregation."""

    type: Literal["dcnv3"] = "dcnv3"
    """Selects this mixer."""
    kernel_size: Odd = 3
    """Odd side of the regular grid that offsets start from."""
    dw_kernel_size: Odd | None = None
    """Odd side of the depth-wise convolution that offsets are predicted from; null = `kernel_size`.
    """
    offset_scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Factor on the grid and on the offsets."""
    center_feature_scale: bool = False
    """Mix each position's own value in, with a learned weight for each group."""
    remove_center: bool = False
    """Leave the middle point of the grid out."""

    @model_validator(mode="after")
    def _check(self) -> DCNv3Settings:
        if self.remove_center and self.kernel_size == 1:
            raise ValueError("remove_center takes the only point of kernel_size 1 away")
        return self

    def build(self, channels: int, groups: int, stage: int, layer: int) -> nn.Module:
        """The mixer of a layer; `stage` and `layer` count from 0."""
        from pretrain.models.internimage.dcnv3 import DCNv3

        return DCNv3(channels, groups, **self.model_dump(exclude={"type"}))


class HaloSettings(Settings):
    """Attention of windows to themselves and a margin around them (HaloNet)."""

    type: Literal["halo"] = "halo"
    """Selects this mixer."""
    window: int = Field(7, gt=0)
    """Side of a window in positions."""
    halo: int = Field(3, ge=0)
    """Width of the margin in positions."""

    def build(self, channels: int, groups: int, stage: int, layer: int) -> nn.Module:
        """The mixer of a layer, with a head for each group."""
        from pretrain.models.internimage.mixers import WindowAttention

        return WindowAttention(channels, groups, self.window, halo=self.halo, query_positions=True)


class ShiftedWindowSettings(Settings):
    """Attention within windows, which every other layer shifts by half their side (Swin)."""

    type: Literal["shifted_window"] = "shifted_window"
    """Selects this mixer."""
    window: int = Field(7, gt=0)
    """Side of a window in positions."""

    def build(self, channels: int, groups: int, stage: int, layer: int) -> nn.Module:
        """The mixer of a layer, with a head for each group."""
        from pretrain.models.internimage.mixers import WindowAttention

        return WindowAttention(channels, groups, self.window, shift=layer % 2 * (self.window // 2))


class ReducedAttentionSettings(Settings):
    """Attention of all positions to a reduced map (PVT); positions are known through the
    convolutions only."""

    type: Literal["reduced_attention"] = "reduced_attention"
    """Selects this mixer."""
    reductions: ByStage = Field([8, 4, 2, 1])
    """Side of the patch that becomes one key, by stage."""

    def build(self, channels: int, groups: int, stage: int, layer: int) -> nn.Module:
        """The mixer of a layer, with a head for each group."""
        from pretrain.models.internimage.mixers import ReducedAttention

        return ReducedAttention(channels, groups, self.reductions[stage])


class DepthwiseConvSettings(Settings):
    """Depth-wise convolution between two projections."""

    type: Literal["depthwise_conv"] = "depthwise_conv"
    """Selects this mixer."""
    kernel_size: Odd = 7
    """Odd side of the kernel."""

    def build(self, channels: int, groups: int, stage: int, layer: int) -> nn.Module:
        """The mixer of a layer; it has no groups."""
        from pretrain.models.internimage.mixers import DepthwiseConv

        return DepthwiseConv(channels, self.kernel_size)


MixerSettings = Annotated[
    DCNv3Settings
    | HaloSettings
    | ShiftedWindowSettings
    | ReducedAttentionSettings
    | DepthwiseConvSettings,
    Field(discriminator="type"),
]
