"""Other spatial token mixers for the place of DCNv3, after STM-Evaluation (arXiv 2211.05781).

A mixer maps (B, H, W, C) to the same shape, for any H and W, and tells its `flops(height, width)`.
Mixers of attention count only real positions: where a map is padded to whole windows, nobody looks
at the padding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.internimage.channels_last import Conv, layer_norm


class DepthwiseConv(nn.Module):
    """Depth-wise convolution between two projections."""

    def __init__(self, channels: int, kernel_size: int = 7) -> None:
        super().__init__()
        self.input_proj = nn.Linear(channels, channels)
        self.convolution = Conv(
            channels, channels, kernel_size, 1, kernel_size // 2, groups=channels
        )
        self.output_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, channels). Returns the same shape."""
        return self.output_proj(self.convolution(self.input_proj(x)))

    def flops(self, height: int, width: int) -> int:
        """Multiplications and additions for one map."""
        channels, positions = self.input_proj.in_features, height * width
        return 4 * positions * channels**2 + self.convolution.flops(positions)


class ReducedAttention(nn.Module):
    """Attention of all positions to a map that a strided convolution has made smaller (PVT)."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.output_proj = nn.Linear(channels, channels)
        if reduction > 1:
            self.reduce = Conv(channels, channels, reduction, reduction)
            self.norm = layer_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, channels). Returns the same shape."""
        _, height, width, channels = x.shape
        small = x
        if self.reduction > 1:
            # A last row or column that is not whole is completed with zeros, not dropped.
            missing = (-width % self.reduction, -height % self.reduction)
            small = self.norm(self.reduce(F.pad(x, (0, 0, 0, missing[0], 0, missing[1]))))
        query = self.query(x).flatten(1, 2)
        key, value = self.key_value(small).flatten(1, 2).chunk(2, dim=-1)
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).reshape(-1, height, width, channels)
        return self.output_proj(mixed)

    def flops(self, height: int, width: int) -> int:
        """Multiplications and additions for one map."""
        channels, positions = self.query.in_features, height * width
        keys = -(-height // self.reduction) * -(-width // self.reduction)
        convolution = self.reduce.flops(keys) if self.reduction > 1 else 0
        linear = 4 * positions * channels**2 + 4 * keys * channels**2
        return convolution + linear + 4 * positions * keys * channels


class WindowAttention(nn.Module):
    """Attention within windows and, with a halo, to a margin around each of them.

    `shift` moves the windows up and left by so many positions (Swin, in every other layer); `halo`
    widens what a window sees on all sides (HaloNet). Relative positions have a learned score: a
    bias for each head, or with `query_positions` a vector that is multiplied by the query, one for
    rows and one for columns, shared by the heads.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        window: int = 7,
        halo: int = 0,
        shift: int = 0,
        query_positions: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.window, self.halo, self.shift = heads, window, halo, shift
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.output_proj = nn.Linear(channels, channels)
        head_width = channels // heads
        self.query_positions = query_positions
        # Distances from -(window + halo - 1) to window + halo - 1.
        distances = 2 * (window + halo) - 1
        if query_positions:
            self.rows = nn.Parameter(torch.zeros(distances, head_width))
            self.columns = nn.Parameter(torch.zeros(distances, head_width))
            self.initial_std = {"rows": head_width**-0.5, "columns": head_width**-0.5}
        else:
            self.biases = nn.Parameter(torch.zeros(heads, distances, distances))
            self.initial_std = {"biases": 0.02}

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, channels). Returns the same shape."""
        batch, height, width, channels = x.shape
        windows = self._count(height), self._count(width)
        projected = self.query_key_value(x)
        query = self._cut(projected[..., :channels], windows, 0)
        key, value = self._cut(projected[..., channels:], windows, self.halo).chunk(2, dim=-1)
        query, key, value = (  # (B * windows, heads, positions, head width)
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value)
        )
        padding = self._cut(x.new_ones(1, height, width, 1), windows, self.halo)[..., 0] == 0
        scores = self._positions(query, (batch, windows[0] * windows[1]))
        scores = scores.masked_fill(padding[:, None, None], torch.finfo(scores.dtype).min)
        scores = scores.expand(batch, *scores.shape[1:]).flatten(0, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, scores).transpose(1, 2)
        mixed = mixed.reshape(batch, *windows, self.window, self.window, channels)
        mixed = mixed.transpose(2, 3).reshape(
            batch, windows[0] * self.window, windows[1] * self.window, channels
        )
        mixed = mixed[:, self.shift : self.shift + height, self.shift : self.shift + width]
        return self.output_proj(mixed)

    def _count(self, side: int) -> int:
        """Windows that cover a side of the map; the first one starts `shift` before it."""
        return -(-(side + self.shift) // self.window)

    def _cut(self, x: Tensor, windows: tuple[int, int], halo: int) -> Tensor:
        """(B, H, W, C) -> (B * windows, (window + 2 halo)**2, C), zeros around the map."""
        before = self.shift + halo
        after = [
            count * self.window + halo - self.shift - side
            for count, side in zip(windows, x.shape[1:3], strict=True)
        ]
        side = self.window + 2 * halo
        x = F.pad(x, (0, 0, before, after[1], before, after[0]))
        x = x.unfold(1, side, self.window).unfold(2, side, self.window)
        return x.permute(0, 1, 2, 4, 5, 3).reshape(-1, side * side, x.shape[3])

    def _positions(self, query: Tensor, shape: tuple[int, int]) -> Tensor:
        """Scores of relative positions: (B, windows, heads, window**2, (window + 2 halo)**2), or
        (1, 1, ...) where they are the same for all.

        query: (B * windows, heads, window**2, head width); shape: (B, windows).
        """
        if self.query_positions:
            grid = query.unflatten(2, (self.window, self.window))
            rows = torch.einsum("bhijd,idk->bhijk", grid, self._seen(self.rows, 0))
            columns = torch.einsum("bhijd,jdl->bhijl", grid, self._seen(self.columns, 0))
            scores = rows[..., None] + columns[..., None, :]
            return scores.flatten(4).flatten(2, 3).unflatten(0, shape)
        biases = self._seen(self._seen(self.biases, 1), 2)
        return biases.flatten(3).flatten(1, 2)[None, None]

    def _seen(self, table: Tensor, dim: int) -> Tensor:
        """What each place of a window sees of a table of distances (..., distances, ...): (...,
        window, ..., window + 2 halo). Each place sees a run that begins one before that of the
        place before it. (A table of indices would do, too, but CPUs add up its gradient in no
        fixed order.)"""
        return table.unfold(dim, self.window + 2 * self.halo, 1).flip(dim)

    def flops(self, height: int, width: int) -> int:
        """Multiplications and additions for one map, of whole windows."""
        channels, seen = self.query_key_value.in_features, (self.window + 2 * self.halo) ** 2
        positions = self._count(height) * self._count(width) * self.window**2
        linear = 8 * height * width * channels**2
        attention = 4 * positions * seen * channels
        if self.query_positions:
            attention += 4 * positions * (self.window + 2 * self.halo) * channels
        return linear + attention
