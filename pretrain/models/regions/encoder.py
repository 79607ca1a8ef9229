"""From the maps of a backbone to a memory that knows its surroundings, and to features of masks.

The pixel decoder of Mask DINO (arXiv 2206.02777), under its names. All maps are channels-last.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.internimage.channels_last import Conv
from pretrain.models.regions.boxes import map_centres, map_code, places_in_image
from pretrain.models.regions.layers import EncoderLayer, Sizes

_NORM_GROUPS = 32


class Memory(NamedTuple):
    """What the decoder reads."""

    tokens: Tensor
    """(B, S, width): the pixels of all maps, the finest map first, each row by row."""
    sizes: Sizes
    """(height, width) of each map."""
    present: Tensor | None
    """(B, S) bool: False in padding; None: there is none."""
    mask_features: Tensor
    """(B, h, w, width) of the finest map of the backbone."""


class PixelDecoder(nn.Module):
    """Deformable encoder over three to five maps, and mask features on the finest one.

    Args:
        channels: of the backbone's maps, the finest (stride 4) first.
        levels: number of maps that are encoded.
        first_map: index of the finest backbone map among them; 0 or 1. Where the backbone has too
            few maps, convolutions of stride 2 make coarser ones of its last.
        width, layers, heads, points, hidden: of the encoder.
    """

    def __init__(
        self,
        channels: Sequence[int],
        levels: int = 4,
        first_map: int = 1,
        width: int = 256,
        layers: int = 6,
        heads: int = 8,
        points: int = 4,
        hidden: int = 1024,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        used = list(channels[first_map : first_map + levels])
        if not used:
            raise ValueError(f"first_map {first_map} is not among {len(channels)} backbone maps")
        self.first_map, self.width, self.levels = first_map, width, levels
        self.used = len(used)
        # As in Mask DINO: those of the backbone from the coarsest on, then the ones made of it.
        projections = [_projection(count, width, 1) for count in reversed(used)]
        for count in [used[-1], *[width] * levels][: levels - len(used)]:
            projections.append(_projection(count, width, 3))
        self.input_proj = nn.ModuleList(projections)
        self.transformer = DeformableEncoder(
            levels, layers, width, heads, points, hidden, gradient_checkpointing
        )
        self.adapter_1 = NormedConv(channels[0], width, 1)
        self.layer_1 = NormedConv(width, width, 3)
        self.mask_features = Conv(width, width, 1)

    def forward(
        self,
        maps: Sequence[Tensor],
        canvas: tuple[int, int],
        image_sizes: Tensor | None = None,
    ) -> Memory:
        """Encode the maps of a batch.

        maps: (B, H_i, W_i, channels[i]), the finest first. canvas: height and width in pixels of
            the padded images. image_sizes: (B, 2) int64, those without padding; None: no padding.
        """
        sources = list(maps[self.first_map : self.first_map + self.used])
        projected = [
            projection(source)
            for projection, source in zip(self.input_proj, reversed(sources), strict=False)
        ]
        source = sources[-1]
        for projection in self.input_proj[self.used :]:
            source = projection(source)
            projected.insert(0, source)
        sizes = [(x.shape[1], x.shape[2]) for x in projected]
        present = None
        if image_sizes is not None:
            present = places_in_image(image_sizes, canvas, sizes)
        tokens = torch.cat([x.flatten(1, 2) for x in projected], dim=1)
        tokens = self.transformer(tokens, sizes, present)
        counts = [height * width for height, width in sizes]
        parts = tokens.split(counts, dim=1)
        finest = parts[-1].unflatten(1, sizes[-1])
        lateral = self.adapter_1(maps[0])
        joined = lateral + resized(finest, (lateral.shape[1], lateral.shape[2]), bilinear)
        features = self.mask_features(F.relu(self.layer_1(joined)))
        if present is not None:
            present = torch.cat(present.split(counts, dim=1)[::-1], dim=1)
        return Memory(torch.cat(parts[::-1], dim=1), sizes[::-1], present, features)

    def _map_sizes(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """(height, width) of what each `input_proj` gives, in its order."""
        found = list(sizes[self.first_map : self.first_map + self.used])[::-1]
        height, width = found[0]
        for _ in range(self.levels - self.used):
            height, width = (height + 1) // 2, (width + 1) // 2
            found.append((height, width))
        return found

    def places(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Pixels of all encoded maps, for backbone maps of these sizes."""
        return sum(height * width for height, width in self._map_sizes(sizes))

    def flops(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Multiplications and additions for one image with backbone maps of these sizes."""
        found = self._map_sizes(sizes)
        total = self.transformer.flops(self.places(sizes))
        for projection, (height, width) in zip(self.input_proj, found, strict=True):
            total += projection[0].flops(height * width)
        total += resized_flops(found[self.used - 1], sizes[0], self.width)
        fine = sizes[0][0] * sizes[0][1]
        convolutions = (self.adapter_1, self.layer_1, self.mask_features)
        return total + sum(convolution.flops(fine) for convolution in convolutions)


class DeformableEncoder(nn.Module):
    """The layers, and a vector for each map that joins the positions of its pixels."""

    def __init__(
        self,
        levels: int,
        layers: int,
        width: int,
        heads: int,
        points: int,
        hidden: int,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.level_embed = nn.Parameter(torch.zeros(levels, width))
        self.initial_std = {"level_embed": 1.0}
        self.encoder = nn.ModuleDict(
            {
                "layers": nn.ModuleList(
                    EncoderLayer(width, heads, levels, points, hidden) for _ in range(layers)
                )
            }
        )

    def forward(self, tokens: Tensor, sizes: Sizes, present: Tensor | None) -> Tensor:
        """tokens: (B, S, width) of maps of these sizes; present: (B, S) bool or None.

        Returns (B, S, width).
        """
        width = tokens.shape[-1]
        code = torch.cat([map_code(*size, width, tokens.device) for size in sizes])
        level = torch.cat(
            [
                vector.expand(height * columns, width)
                for vector, (height, columns) in zip(self.level_embed, sizes, strict=True)
            ]
        )
        positions = code.to(tokens.dtype) + level
        references = map_centres(sizes, tokens.device)[None]
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.encoder["layers"]:
            arguments = (tokens, positions, references, sizes, present)
            if recompute:
                tokens = checkpoint(
                    layer, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens = layer(*arguments)
        return tokens

    def flops(self, places: int) -> int:
        """Multiplications and additions for so many pixels, without the sampling itself."""
        linears = [module for module in self.encoder.modules() if isinstance(module, nn.Linear)]
        return sum(2 * places * linear.weight.numel() for linear in linears)


class ChannelNorm(nn.GroupNorm):
    """GroupNorm of (B, H, W, C) maps in up to 32 groups."""

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(_NORM_GROUPS, channels), channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, C). Returns the same shape."""
        x = x.permute(0, 3, 1, 2)
        # Not `F.group_norm`, which refuses the map of one pixel of a single image.
        x = torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return x.permute(0, 2, 3, 1)


class NormedConv(Conv):
    """A convolution that keeps the size, without a bias, and the norm after it."""

    def __init__(self, channels: int, channels_out: int, kernel_size: int) -> None:
        super().__init__(channels, channels_out, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = ChannelNorm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, channels). Returns (B, H, W, channels_out)."""
        return self.norm(super().forward(x))


def _projection(channels: int, width: int, kernel_size: int) -> nn.Sequential:
    """To the encoder's width; of kernel 3 to half the size, too."""
    stride = 1 if kernel_size == 1 else 2
    convolution = Conv(channels, width, kernel_size, stride, padding=kernel_size // 2)
    return nn.Sequential(convolution, ChannelNorm(width))


def resized(
    x: Tensor, size: tuple[int, int], weights: Callable[[int, int, torch.device], Tensor]
) -> Tensor:
    """Maps (B, H, W, C) at another size, one axis after the other: (B, height, width, C).

    A product with the weights has a deterministic gradient on GPUs; `F.interpolate` and
    `F.adaptive_avg_pool2d` have none.

    weights: (old length, new length, device) -> (new length, old length), as `bilinear`.
    """
    batch, height, width, channels = x.shape
    down = weights(height, size[0], x.device).to(x.dtype)
    across = weights(width, size[1], x.device).to(x.dtype)
    x = (down @ x.flatten(2)).view(batch * size[0], width, channels)
    return (across @ x).view(batch, *size, channels)


def resized_flops(old: tuple[int, int], new: tuple[int, int], channels: int) -> int:
    """Multiplications and additions of `resized` for one map."""
    return 2 * channels * new[0] * (old[0] * old[1] + new[1] * old[1])


def bilinear(old: int, new: int, device: torch.device) -> Tensor:
    """Weights by which `F.interpolate` resizes an axis, corners not aligned."""
    unit = torch.eye(old, dtype=torch.float32, device=device)[None, None]
    return F.interpolate(unit, (new, old), mode="bilinear", align_corners=False)[0, 0]


def averaging(old: int, new: int, device: torch.device) -> Tensor:
    """Weights by which adaptive average pooling resizes an axis."""
    unit = torch.eye(old, dtype=torch.float32, device=device)[None, None]
    return F.adaptive_avg_pool2d(unit, (new, old))[0, 0]
