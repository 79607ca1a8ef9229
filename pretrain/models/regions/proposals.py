"""General region proposals of Uni-Perceiver v2: from the maps of a backbone to regions and tokens.

Coordinates are fractions of the canvas, the padded image. The state dict has Mask DINO's names
behind its prefix `sem_seg_head.`, but for the box head, which is `predictor.bbox_embed` once
instead of once a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.models.encoder import Encoder, Output
from pretrain.models.regions.decoder import KnownBoxes, RegionDecoder, Regions
from pretrain.models.regions.encoder import PixelDecoder
from pretrain.models.regions.settings import (
    RegionSettings,  # noqa: F401
)
from pretrain.models.regions.tokens import ImageTokens, RegionTokens


class RegionProposals(Encoder):
    """Finds what may be an object, of whatever class, with its box and mask.

    It reads the maps of a backbone, and tasks share it like one.

    Args:
        channels: of the backbone's maps, of strides 4, 8, 16 and so on, the finest first.
        others: fields of `RegionSettings`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: int = 256,
        levels: int = 4,
        finest_stride: int = 8,
        heads: int = 8,
        points: int = 4,
        encoder_layers: int = 6,
        encoder_hidden: int = 1024,
        decoder_layers: int = 9,
        decoder_hidden: int = 2048,
        queries: int = 300,
        kept: int = 200,
        token_width: int = 768,
        attention_pools: int = 4,
        pool_heads: int = 16,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.maps = token_width, len(channels)
        self.pixel_decoder = PixelDecoder(
            channels,
            levels,
            {4: 0, 8: 1}[finest_stride],
            width,
            encoder_layers,
            heads,
            points,
            encoder_hidden,
            gradient_checkpointing,
        )
        self.predictor = RegionDecoder(
            levels,
            width,
            decoder_layers,
            heads,
            points,
            decoder_hidden,
            queries,
            gradient_checkpointing,
        )
        self.tokens = RegionTokens(
            width, channels[-1], token_width, kept, attention_pools, pool_heads
        )

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type that `forward` expects of the maps."""
        return self.predictor.class_embed.weight.dtype

    def forward(
        self,
        maps: Sequence[Tensor],
        canvas: tuple[int, int],
        image_sizes: Tensor | None = None,
        known: KnownBoxes | None = None,
    ) -> Regions:
        """Find the regions of a batch.

        maps: (B, H_i, W_i, channels[i]) in `dtype`, the finest first.
        canvas: height and width in pixels of the padded images.
        image_sizes: (B, 2) int64 height and width without padding; None: nothing is padded.
        known: boxes with noise to be put right, in the training of detection.

        Raises ValueError: fewer places than queries.
        """
        return self.predictor(self.pixel_decoder(maps, canvas, image_sizes), known)

    def image_tokens(
        self,
        maps: Sequence[Tensor],
        regions: Regions,
        canvas: tuple[int, int],
        image_sizes: Tensor | None = None,
    ) -> ImageTokens:
        """Tokens of the image for the general decoder; arguments as in `forward`."""
        return self.tokens(regions, maps[-1], canvas, image_sizes)

    def flops(self, height: int, width: int, want: Output = "tokens", known: int = 0) -> int:
        """As `Encoder.flops`, the backbone left out; known: boxes that are put right. What
        deformable attention does at its points is left out too; it is little."""
        strides = [4 * 2**number for number in range(self.maps)]
        sizes = [(-(-height // stride), -(-width // stride)) for stride in strides]
        encoder = self.pixel_decoder
        places = encoder.places(sizes)
        # The masks of the selected places, which give the first boxes.
        masks = 2 * self.predictor.queries * sizes[0][0] * sizes[0][1] * encoder.width
        return (
            encoder.flops(sizes)
            + self.predictor.flops(places, known)
            + masks
            + self.tokens.flops(sizes[0], sizes[-1])
        )

    def layer_names(self) -> list[tuple[str, ...]]:
        """One layer: it is trained from nothing, so nothing in it lies deeper than the rest."""
        return [("pixel_decoder", "predictor", "tokens")]
