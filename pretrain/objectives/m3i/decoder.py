"""The decoder of dense targets: projector and predictor of SiameseIM (arXiv 2206.01204), one for
targets of the same view and of another one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.vit import Block
from pretrain.objectives.m3i.decoder_settings import (
    DecoderSettings,
)
from pretrain.objectives.m3i.view_positions import grid_code, target_code


class Projector(nn.Module):
    """From dense features of an encoder to tokens of the decoder's width, looking at each other."""

    def __init__(self, encoder_width: int, settings: DecoderSettings) -> None:
        super().__init__()
        self.linear = nn.Linear(encoder_width, settings.width)
        self.linear.initial_std = {"weight": encoder_width**-0.5}
        self.blocks = _blocks(settings, settings.projector_layers)

    def forward(self, tokens: Tensor, present: Tensor | None = None) -> Tensor:
        """tokens: (B, N, encoder_width); present: (B, N) bool, none: all. Returns (B, N, width)."""
        tokens = self.linear(tokens)
        mask = None if present is None else present[:, None, None]
        for block in self.blocks:
            tokens = block(tokens, mask)
        return tokens

    def flops(self, tokens: int) -> int:
        """Multiplications and additions for so many tokens of an image."""
        linear = 2 * tokens * self.linear.in_features * self.linear.out_features
        return linear + _block_flops(self.blocks, self.linear.out_features, tokens)


class Predictor(nn.Module):
    """From the tokens of one view to what the target branch makes of every cell of another."""

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        self.width = settings.width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, settings.width))
        self.initial_std = {"mask_token": 0.02}
        self.positions = nn.Linear(2 * settings.width, settings.width)
        self.positions.initial_std = {"weight": (2 * settings.width) ** -0.5}
        self.blocks = _blocks(settings, settings.predictor_layers)
        self.output = nn.Linear(settings.width, settings.width)
        self.output.initial_std = {"weight": settings.width**-0.5}

    def forward(
        self,
        tokens: Tensor,
        places: Tensor,
        present: Tensor | None,
        grid: tuple[int, int],
        positions: Tensor,
        scales: Tensor,
    ) -> Tensor:
        """Predict the targets of all cells.

        tokens: (B, n, width); places: (B, n) int64, their cells in `grid`; present: (B, n) bool,
            none: all are there; positions, scales: of the target cells, see `relative_positions`.

        Returns (B, rows * columns, width).
        """
        dtype = tokens.dtype
        code = grid_code(grid, self.width, tokens.device).to(dtype)
        asked = self.positions(target_code(positions, scales, self.width).to(dtype))
        joined = torch.cat([tokens + code[places], self.mask_token + asked], dim=1)
        mask = None
        if present is not None:
            mask = F.pad(present, (0, asked.shape[1]), value=True)[:, None, None]
        for block in self.blocks:
            joined = block(joined, mask)
        return self.output(joined[:, tokens.shape[1] :])

    def flops(self, tokens: int, targets: int) -> int:
        """Multiplications and additions for `tokens` seen and `targets` predicted of an image."""
        ends = 2 * targets * (2 * self.width + self.width) * self.width
        return ends + _block_flops(self.blocks, self.width, tokens + targets)


def _blocks(settings: DecoderSettings, layers: int) -> nn.ModuleList:
    hidden = round(settings.width * settings.mlp_ratio)
    return nn.ModuleList(
        Block(settings.width, settings.heads, hidden, "gelu", layers) for _ in range(layers)
    )


def _block_flops(blocks: nn.ModuleList, width: int, tokens: int) -> int:
    if not len(blocks):
        return 0
    linear = 2 * tokens * (4 * width * width + 2 * width * blocks[0].mlp.hidden)
    return len(blocks) * (linear + 4 * tokens * tokens * width)
