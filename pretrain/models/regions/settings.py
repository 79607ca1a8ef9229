"""Settings of region proposals, which need no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.models.encoder_settings import EncoderSettings

if TYPE_CHECKING:
    from pretrain.models.build_context import BuildContext
    from pretrain.models.regions.proposals import RegionProposals


class RegionSettings(EncoderSettings):
    """Shape of the proposal network. The paper says that it is similar to Mask DINO, whose values
    are the defaults unless the field says otherwise."""

    reads: ClassVar[str] = "regions"
    encoder_fields: ClassVar[dict[str, str]] = {"of": "images"}
    type: Literal["region_proposals"] = "region_proposals"
    """Selects this module among the kinds that a recipe may name."""
    of: str = "image"
    """Backbone whose maps it reads, by its name among the encoders above this one."""
    width: int = Field(256, gt=0, multiple_of=4)
    """Channels of encoder, queries and mask features."""
    levels: int = Field(4, ge=3, le=5)
    """Maps that the encoder reads. Where the backbone has too few, coarser ones are made."""
    finest_stride: Literal[4, 8] = 8
    """Stride of the finest of them; masks are always of stride 4. Mask DINO takes 8 for ResNet-50
    and 4 (with five levels) for Swin-L."""
    heads: int = Field(8, gt=0)
    """Attention heads; must divide `width`."""
    points: int = Field(4, gt=0)
    """Places that a head looks at on each map."""
    encoder_layers: int = Field(6, ge=1)
    """Layers over the pixels of the maps."""
    encoder_hidden: int = Field(1024, gt=0)
    """Hidden channels of their MLPs; Mask DINO has 2048 as well."""
    decoder_layers: int = Field(9, ge=1)
    """Layers over the queries."""
    decoder_hidden: int = Field(2048, gt=0)
    """Hidden channels of their MLPs."""
    queries: int = Field(300, gt=0)
    """Places that become queries. Objects of an image beyond that many are matched with nothing."""
    kept: int = Field(200, gt=0)
    """Regions that become tokens, the most likely objects; from a digest of the paper."""
    token_width: int = Field(768, gt=0)
    """Channels of the tokens: the width of the general decoder."""
    attention_pools: int = Field(4, ge=0)
    """Attention pools over the backbone's last map. The paper's number is not known: ours."""
    pool_heads: int = Field(16, gt=0)
    """Heads of each; must divide the channels of the backbone's last map. Ours."""
    gradient_checkpointing: bool = False
    """Recompute the layers in the backward pass: about a third more time for far less memory."""

    @model_validator(mode="after")
    def _check(self) -> RegionSettings:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        if self.kept > self.queries:
            raise ValueError(
                f"kept ({self.kept}) must not be above queries ({self.queries}): regions are kept "
                "of the queries"
            )
        return self

    def build(self, context: BuildContext) -> RegionProposals:
        """The module these settings describe, over the backbone `of`; on torch's default device.

        Raises ValueError: its maps are not of strides 4, 8 and so on, or as `over`.
        """
        grids = context.encoders[self.of].map_grids()
        strides = [grid.stride for grid in grids]
        if strides != [4 * 2**number for number in range(len(grids))]:
            raise ValueError(
                f"of: {self.of} gives maps of strides {strides}, but region proposals need 4, 8 "
                "and so on: name a backbone of type internimage, swin or resnet"
            )
        return self.over([grid.width for grid in grids])

    def over(self, channels: Sequence[int]) -> RegionProposals:
        """The module these settings describe, for backbone maps of so many channels, the finest
        (stride 4) first; on torch's default device.

        Raises ValueError: pool_heads do not divide the channels of the last map, or too few maps.
        """
        from pretrain.models.regions.proposals import RegionProposals

        if len(channels) < 2:
            raise ValueError(f"region proposals need two maps or more, not channels {channels}")
        if self.attention_pools and channels[-1] % self.pool_heads:
            raise ValueError(
                f"pool_heads ({self.pool_heads}) must divide the {channels[-1]} channels of the "
                "backbone's last map"
            )
        return RegionProposals(channels, **self.model_dump(exclude={"type", "of"}))
