"""From uint8 images to the tokens of one of the run's encoders, and to one vector per image."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from pretrain.models.encoder import Encoder
from pretrain.models.pixels import normalise_pixels
from pretrain.models.sample_draws import SampleDraws
from pretrain.objectives.pool import (
    Pool,
)


def find_encoder(encoders: Mapping[str, Encoder], name: str) -> Encoder:
    """The encoder of that name; ValueError names those that there are."""
    if name not in encoders:
        raise ValueError(f"encoder {name!r} is not in model.encoders ({', '.join(encoders)})")
    return encoders[name]


def encode_images(
    encoder: Encoder,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    draws: SampleDraws | None,
) -> Tensor:
    """Tokens (B, N, width) of images (B, 3, H, W) uint8; mean and std in units of the full range.

    draws: random numbers of these images (`batch.get("draws")`).
    """
    return encoder(normalise_pixels(images, mean, std, encoder.dtype), draws)


def image_vectors(
    encoder: Encoder, pixels: Tensor, pool: Pool, draws: SampleDraws | None
) -> Tensor:
    """One vector per image (B, vector_width): the mean of its tokens, the first one, or what the
    encoder's own head makes of them.

    pixels: (B, 3, H, W), normalised; draws: as in `Encoder.encode`.
    """
    if pool == "head":
        return encoder.encode(pixels, ("pooled",), draws).pooled
    tokens = encoder(pixels, draws)
    return tokens[:, 0] if pool == "class_token" else tokens.mean(dim=1)


def vector_width(encoder: Encoder, pool: Pool) -> int:
    """Channels of `image_vectors`. Raises ValueError: an encoder without the head asked for."""
    return encoder.pooled_width if pool == "head" else encoder.width


def vector_flops(encoder: Encoder, pool: Pool) -> Callable[[int, int], int]:
    """(height, width) -> FLOPs of `image_vectors` for one image."""
    return partial(encoder.flops, want="pooled" if pool == "head" else "tokens")
