"""From the maps of InternImage to one vector per image: the two heads of the official models."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.internimage.channels_last import BatchNorm, Conv, layer_norm
from pretrain.models.pooling import masked_mean

CONV_HEAD_RATIO = 1.5


class ConvHead(nn.Sequential):
    """1x1 convolution, batch norm, GELU, and the mean over the map (T to XL)."""

    def __init__(self, channels: int) -> None:
        self.width = round(channels * CONV_HEAD_RATIO)
        super().__init__(
            Conv(channels, self.width, 1, bias=False),
            nn.Sequential(BatchNorm(self.width)),
            nn.GELU(),
        )

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x: (B, H, W, channels); valid: (B,) bool, rows that the batch norm counts.

        Returns (B, width).
        """
        convolution, (norm,), activation = self
        return activation(norm(convolution(x), valid)).mean(dim=(1, 2))

    def flops(self, positions: int) -> int:
        """Multiplications and additions for a map of so many positions."""
        return self[0].flops(positions)


class PixelUp(nn.PixelShuffle):
    """(B, H, W, 4 C) -> (B, 2 H, 2 W, C), numbered as in PyTorch's channels-first operator."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, 4 C)."""
        batch, height, width, channels = x.shape
        x = x.view(batch, height, width, channels // 4, 2, 2)
        return x.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, channels // 4)


class PoolingAttention(nn.Module):
    """Attention of one query, with biases of their own for queries, keys and values."""

    def __init__(self, width: int, heads: int, width_out: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_bias", "k_bias", "v_bias"):
            self.register_parameter(name, nn.Parameter(torch.zeros(width)))
        self.initial_std = {"q_bias": 0.0, "k_bias": 0.0, "v_bias": 0.0}
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width_out)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """query: (B, 1, width); key, value: (B, N, width); mask: (B, N) bool, True at keys that
        count. Returns (B, width_out)."""
        query, key, value = (
            (linear(x) + bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, x, bias in (
                (self.q, query, self.q_bias),
                (self.k, key, self.k_bias),
                (self.v, value, self.v_bias),
            )
        )
        if mask is not None:
            mask = mask[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        return self.proj(mixed.transpose(1, 2).flatten(1))


class AttentionPool(nn.Module):
    """The mean token asks all tokens; each of query, key and value has its own norm."""

    def __init__(self, width: int, heads: int, width_out: int) -> None:
        super().__init__()
        self.width, self.width_out = width, width_out
        self.norm1_q = layer_norm(width)
        self.norm1_k = layer_norm(width)
        self.norm1_v = layer_norm(width)
        self.cross_dcn = PoolingAttention(width, heads, width_out)

    def forward(self, tokens: Tensor, own: Tensor | None = None) -> Tensor:
        """tokens: (B, N, width); own: (B, N) bool, the tokens that count, at least one in each row;
        none: all. Returns (B, width_out)."""
        query = masked_mean(tokens, own)[:, None]
        return self.cross_dcn(self.norm1_q(query), self.norm1_k(tokens), self.norm1_v(tokens), own)

    def flops(self, tokens: int) -> int:
        """Multiplications and additions for an image of so many tokens."""
        linear = 2 * self.width**2 * (2 * tokens + 1) + 2 * self.width * self.width_out
        return linear + 4 * tokens * self.width
