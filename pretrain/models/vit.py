"""CLIP-style vision transformer that hands on all of its tokens."""

from collections.abc import Collection
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.encoder import Encoded, Encoder, Grid, Output
from pretrain.models.sample_draws import SampleDraws
from pretrain.models.vit_settings import (  # noqa: F401
    Activation,
    VitSettings,
)

# `1.702 * x` is the slope that lets a logistic curve stand in for the normal distribution in GELU.
_QUICK_GELU_SLOPE = 1.702


class VisionTransformer(Encoder):
    """Pre-norm transformer over patches and a class token, normalised before and after the blocks.

    Arguments are the fields of `VitSettings`.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        activation: Activation = "quick_gelu",
        position_std: float | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.patch_size = patch_size
        self.gradient_checkpointing = gradient_checkpointing
        hidden = round(width * mlp_ratio)
        self.embedding = PatchEmbedding(image_size, patch_size, width, position_std or width**-0.5)
        self.norm_before = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, activation, layers) for _ in range(layers)
        )
        self.norm_after = nn.LayerNorm(width)

    def forward(self, images: Tensor, draws: SampleDraws | None = None) -> Tensor:
        """Encode normalised images; nothing is drawn.

        images: (B, 3, H, W) in `dtype`. Rows and columns beyond the last whole patch are ignored.
        Returns (B, 1 + H//p * W//p, width); the class token comes first.
        """
        return self._tokens(images, None, None)

    def encode(
        self,
        images: Tensor,
        want: Collection[Output],
        draws: SampleDraws | None = None,
        *,
        joined: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Encoded:
        """As `Encoder.encode`: the cells are the patches, which make one map.

        groups: the class token looks at itself alone, and so belongs to none; all look at it.
        """
        self.unwanted(want, ("tokens", "cells", "maps"))
        tokens = self._tokens(images, joined, groups)
        maps = None
        if "maps" in want:
            sides = self.grid("cells").sides(*images.shape[-2:])
            maps = [tokens[:, 1:].unflatten(1, sides)]
        return Encoded(
            tokens=tokens if "tokens" in want else None,
            cells=tokens[:, 1:] if "cells" in want else None,
            maps=maps,
        )

    def _tokens(self, images: Tensor, joined: Tensor | None, groups: Tensor | None) -> Tensor:
        tokens = self.norm_before(self.embedding(images, joined))
        mask = None if groups is None else _group_mask(groups.flatten(1))
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                tokens = checkpoint(
                    block, tokens, mask, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens = block(tokens, mask)
        return self.norm_after(tokens)

    def grid(self, of: Literal["stem", "cells"]) -> Grid:
        """The whole patches, from the stem on."""
        return Grid(self.width, self.patch_size, partial=False)

    def map_grids(self) -> tuple[Grid, ...]:
        """The patches."""
        return (self.grid("cells"),)

    def layer_names(self) -> list[tuple[str, ...]]:
        """Names of the submodules of each layer, from the input on (as in BEiT)."""
        blocks = [(f"blocks.{index}",) for index in range(len(self.blocks))]
        return [("embedding", "norm_before"), *blocks, ("norm_after",)]

    def tokens(self, height: int, width: int) -> int:
        """Number of tokens for an image of `height` x `width` pixels."""
        return 1 + (height // self.patch_size) * (width // self.patch_size)

    def flops(self, height: int, width: int, want: Output = "tokens") -> int:
        """As `Encoder.flops`, matrix products only: every output costs the same."""
        tokens, channels = self.tokens(height, width), self.width
        patches = 2 * (tokens - 1) * 3 * self.patch_size**2 * channels
        hidden = self.blocks[0].mlp.hidden
        linear = 2 * tokens * (4 * channels * channels + 2 * channels * hidden)
        attention = 4 * tokens * tokens * channels
        return patches + len(self.blocks) * (linear + attention)


class PatchEmbedding(nn.Module):
    """Patches as tokens behind a class token, with learned positions that fit any grid."""

    def __init__(self, image_size: int, patch_size: int, width: int, position_std: float) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.patches = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(1 + self.grid**2, width))
        self.initial_std = {"class_token": width**-0.5, "positions": position_std}

    def forward(self, images: Tensor, joined: Tensor | None = None) -> Tensor:
        """images: (B, 3, H, W); joined: (B, H//p, W//p, width), or nothing.

        Returns (B, 1 + H//p * W//p, width).
        """
        height, width = images.shape[-2:]
        if height < self.patch_size or width < self.patch_size:
            raise ValueError(
                f"an image of {height} x {width} pixels holds no patch of {self.patch_size} x "
                f"{self.patch_size}; enlarge the images or choose a smaller patch_size"
            )
        patches = self.patches(images)
        positions = self._positions_for(patches.shape[-2], patches.shape[-1])
        patches = patches.flatten(2).transpose(1, 2)
        if joined is not None:
            patches = patches + joined.flatten(1, 2)
        # Not len(images), which is a constant in an exported graph.
        class_token = self.class_token.expand(images.shape[0], 1, -1)
        return torch.cat([class_token, patches], dim=1) + positions

    def _positions_for(self, rows: int, columns: int) -> Tensor:
        """The position table, resized to a grid of rows x columns: (1 + rows * columns, width)."""
        if rows == self.grid and columns == self.grid:
            return self.positions
        # Bicubic weights in bfloat16 would move every position; the table is small, so use float32.
        table = self.positions[1:].float().unflatten(0, (self.grid, self.grid))
        down = _bicubic(self.grid, rows, table.device)
        across = _bicubic(self.grid, columns, table.device)
        table = across @ (down @ table.flatten(1)).unflatten(1, (self.grid, -1))
        return torch.cat([self.positions[:1], table.flatten(0, 1).to(self.positions.dtype)])


def _bicubic(size: int, new_size: int, device: torch.device) -> Tensor:
    """Weights (new_size, size), float32, by which `F.interpolate` resizes one side of a map. A
    product with them has a deterministic gradient on GPUs; its own has none."""
    unit = torch.eye(size, dtype=torch.float32, device=device)[None, None]
    return F.interpolate(unit, (new_size, size), mode="bicubic", align_corners=False)[0, 0]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, width: int, heads: int, hidden: int, activation: Activation, layers: int
    ) -> None:
        super().__init__()
        # CLIP's scales: what is added to the residual stream shrinks with the depth.
        residual_std = width**-0.5 * (2 * layers) ** -0.5
        self.norm_attention = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, residual_std)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden, activation, residual_std)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens: (B, N, width); mask as in `SelfAttention`. Returns the shape of tokens."""
        tokens = tokens + self.attention(self.norm_attention(tokens), mask)
        return tokens + self.mlp(self.norm_mlp(tokens))


class SelfAttention(nn.Module):
    """Multi-head self-attention, over all tokens unless a mask says otherwise."""

    def __init__(self, width: int, heads: int, residual_std: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.qkv.initial_std = {"weight": width**-0.5}
        self.output.initial_std = {"weight": residual_std}

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens: (B, N, width); mask: bool, broadcast to (B, heads, N, N), True where a token may
        look. Returns the shape of tokens."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, width))


def _group_mask(groups: Tensor) -> Tensor:
    """Where tokens behind a class token may look, (B, 1, 1 + N, 1 + N) bool; groups: (B, N)."""
    mask = F.pad(groups[:, None, :, None] == groups[:, None, None, :], (1, 0, 1, 0))
    mask[..., 0] = True
    return mask


class Mlp(nn.Module):
    """Two linear layers around the activation."""

    def __init__(
        self, width: int, hidden: int, activation: Activation, residual_std: float
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.activation = quick_gelu if activation == "quick_gelu" else F.gelu
        self.expand = nn.Linear(width, hidden)
        self.reduce = nn.Linear(hidden, width)
        self.expand.initial_std = {"weight": (2 * width) ** -0.5}
        self.reduce.initial_std = {"weight": residual_std}

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (..., width). Returns the same shape."""
        return self.reduce(self.activation(self.expand(tokens)))


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), written through `silu` so that backward keeps one tensor, not two."""
    return F.silu(x * _QUICK_GELU_SLOPE) * (1 / _QUICK_GELU_SLOPE)
