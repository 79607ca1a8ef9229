"""Regions and whole images as tokens of the general decoder (Uni-Perceiver v2, arXiv 2211.09808).

A region is what it means, where it is and how it looks: q = q_sem + B(box) + M(mask). The image is
a few attention pools over its last map, and that map itself.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.models.internimage.heads import AttentionPool
from pretrain.models.regions.boxes import box_code, exact, places_in_image
from pretrain.models.regions.decoder import Regions
from pretrain.models.regions.encoder import averaging, resized, resized_flops

# Side of the masks that M reads.
MASK_SIDE = 28


class ImageTokens(NamedTuple):
    """Tokens of a batch: global ones first, then one for each region that is kept."""

    tokens: Tensor
    """(B, M + N, width)."""
    present: Tensor | None
    """(B, M + N) bool: False for places in padding; None: there is none."""
    chosen: Tensor
    """(B, N) int64: the queries that are kept, the most likely objects first."""


class RegionTokens(nn.Module):
    """Fuses regions, and adds global tokens.

    Args:
        region_width: channels of the regions. map_width: channels of the backbone's last map.
        width: channels of the tokens. kept: regions that are kept, the most likely objects.
        pools: number of attention pools. pool_heads: heads of each.
    """

    def __init__(
        self,
        region_width: int = 256,
        map_width: int = 1024,
        width: int = 768,
        kept: int = 200,
        pools: int = 4,
        pool_heads: int = 16,
    ) -> None:
        super().__init__()
        self.region_width, self.width, self.kept = region_width, width, kept
        self.semantic = nn.Linear(region_width, width)
        self.box = nn.Linear(2 * region_width, width)
        self.mask = nn.Linear(MASK_SIDE**2, width)
        # Logits of masks are large: beside the others' terms, M's is small at first.
        self.mask.initial_std = {"weight": MASK_SIDE**-2}
        self.pools = nn.ModuleList(
            AttentionPool(map_width, pool_heads, width) for _ in range(pools)
        )
        self.flat = nn.Linear(map_width, width)

    def forward(
        self,
        regions: Regions,
        last_map: Tensor,
        canvas: tuple[int, int],
        image_sizes: Tensor | None = None,
    ) -> ImageTokens:
        """Make tokens of regions and of the backbone's last map (B, h, w, map_width); canvas and
        image_sizes as in `PixelDecoder`."""
        found = regions.predictions[-1]
        scores = exact(found.logits).detach().amax(-1)
        chosen = scores.topk(min(self.kept, scores.shape[1]), dim=1).indices
        fused = self.fused(
            _rows(regions.contents, chosen),
            _rows(found.boxes, chosen),
            _rows(found.mask_embeds, chosen),
            regions.mask_features,
        )
        flat, present = last_map.flatten(1, 2), None
        if image_sizes is not None:
            present = places_in_image(image_sizes, canvas, [tuple(last_map.shape[1:3])])
        pooled = [pool(flat, present)[:, None] for pool in self.pools]
        tokens = torch.cat([*pooled, self.flat(flat), fused], dim=1)
        if present is not None:
            always = present.new_ones(len(present), tokens.shape[1] - present.shape[1])
            ends = always.split([len(pooled), fused.shape[1]], dim=1)
            present = torch.cat([ends[0], present, ends[1]], dim=1)
        return ImageTokens(tokens, present, chosen)

    def fused(
        self, contents: Tensor, boxes: Tensor, mask_embeds: Tensor, mask_features: Tensor
    ) -> Tensor:
        """q_sem + B(box) + M(mask): (B, N, width).

        contents, mask_embeds: (B, N, region_width); boxes: (B, N, 4) float32; mask_features:
        (B, h, w, region_width). The mask is its logits, averaged to 28 x 28.
        """
        code = box_code(boxes, self.region_width // 2).to(contents.dtype)
        # A mask is linear in its features, so their average gives that of the mask.
        averaged = resized(mask_features, (MASK_SIDE, MASK_SIDE), averaging).flatten(1, 2)
        masks = mask_embeds @ averaged.transpose(1, 2)
        return self.semantic(contents) + self.box(code) + self.mask(masks)

    def flops(self, finest: tuple[int, int], last: tuple[int, int]) -> int:
        """Multiplications and additions for one image with backbone maps of these (height,
        width)."""
        places = last[0] * last[1]
        linears = (self.semantic, self.box, self.mask)
        regions = sum(2 * linear.weight.numel() for linear in linears)
        regions += 2 * self.region_width * MASK_SIDE**2
        pools = sum(pool.flops(places) for pool in self.pools)
        averaged = resized_flops(finest, (MASK_SIDE, MASK_SIDE), self.region_width)
        flat = 2 * places * self.flat.weight.numel()
        return self.kept * regions + averaged + pools + flat


def _rows(values: Tensor, chosen: Tensor) -> Tensor:
    """values (B, Q, n) of the chosen queries (B, N)."""
    return values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))
