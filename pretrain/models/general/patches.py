"""Patches of images as tokens, with nothing behind them: what Uni-Perceiver v1 reads."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from pretrain.models.encoder import Encoded, Encoder, Output
from pretrain.models.sample_draws import SampleDraws


class Patches(Encoder):
    """A linear layer on each patch, its position, and a norm.

    Arguments are the fields of `PatchesSettings`.
    """

    def __init__(self, image_size: int = 224, patch_size: int = 16, width: int = 768) -> None:
        super().__init__()
        self.width, self.patch_size = width, patch_size
        self.side = image_size // patch_size
        self.patches = nn.Conv2d(3, width, patch_size, patch_size)
        self.positions = nn.Parameter(torch.zeros(self.side**2, width))
        self.norm = nn.LayerNorm(width)
        self.initial_std = {"positions": 0.02}

    def forward(self, images: Tensor, draws: SampleDraws | None = None) -> Tensor:
        """images: (B, 3, H, W) in `dtype`. Returns (B, H//p * W//p, width); nothing is drawn.

        Raises ValueError: images of another size.
        """
        patches = self.patches(images)
        if patches.shape[2:] != (self.side, self.side):
            size = self.side * self.patch_size
            raise ValueError(
                f"images of {images.shape[2]} x {images.shape[3]} pixels do not fit the "
                f"{size} x {size} of type=patches: set image_size of the encoder, or image.size"
            )
        return self.norm(patches.flatten(2).transpose(1, 2) + self.positions)

    def encode(
        self, images: Tensor, want: Collection[Output], draws: SampleDraws | None = None, **_
    ) -> Encoded:
        """As `Encoder.encode`."""
        self.unwanted(want, ("tokens",))
        return Encoded(tokens=self(images, draws))

    def flops(self, height: int, width: int, want: Output = "tokens") -> int:
        """As `Encoder.flops`."""
        rows, columns = height // self.patch_size, width // self.patch_size
        return 2 * rows * columns * 3 * self.patch_size**2 * self.width

    def layer_names(self) -> list[tuple[str, ...]]:
        """As `Encoder.layer_names`."""
        return [("patches", "positions", "norm")]
