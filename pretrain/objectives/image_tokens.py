"""From uint8 images to the tokens of one of the run's encoders, and to one vector per image."""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from pretrain.models.pixels import normalise_pixels

Pool = Literal["mean", "class_token"]


def find_encoder(encoders: Mapping[str, nn.Module], name: str) -> nn.Module:
    """The encoder of that name; ValueError names those that there are."""
    if name not in encoders:
        raise ValueError(f"encoder {name!r} is not in model.encoders ({', '.join(encoders)})")
    return encoders[name]


def encode_images(
    encoder: nn.Module, images: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Tokens (B, N, width) of images (B, 3, H, W) uint8; mean and std in units of the full range.
    """
    return encoder(normalise_pixels(images, mean, std, encoder.dtype))


def pool_tokens(tokens: Tensor, pool: Pool) -> Tensor:
    """tokens: (B, N, width). Returns (B, width): the first token, or the mean of all."""
    return tokens[:, 0] if pool == "class_token" else tokens.mean(dim=1)
