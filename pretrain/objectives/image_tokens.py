"""From uint8 images to the tokens of one of the run's encoders, and to one vector per image."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from pretrain.models.pixels import normalise_pixels
from pretrain.models.sample_draws import SampleDraws
from pretrain.objectives.pool import (
    Pool,
)


def find_encoder(encoders: Mapping[str, nn.Module], name: str) -> nn.Module:
    """The encoder of that name; ValueError names those that there are."""
    if name not in encoders:
        raise ValueError(f"encoder {name!r} is not in model.encoders ({', '.join(encoders)})")
    return encoders[name]


def encode_images(
    encoder: nn.Module,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    draws: SampleDraws | None,
) -> Tensor:
    """Tokens (B, N, width) of images (B, 3, H, W) uint8; mean and std in units of the full range.

    draws: as in `encode_pixels`.
    """
    return encode_pixels(encoder, normalise_pixels(images, mean, std, encoder.dtype), draws)


def encode_pixels(encoder: nn.Module, pixels: Tensor, draws: SampleDraws | None) -> Tensor:
    """Tokens (B, N, width) of normalised pixels (B, 3, H, W).

    draws: random numbers of these images (`batch.get("draws")`), for an encoder that takes some in
        training; none: it draws from torch's generator, which knows no samples.
    """
    return encoder(pixels, **_options(encoder, draws))


def image_vectors(
    encoder: nn.Module, pixels: Tensor, pool: Pool, draws: SampleDraws | None
) -> Tensor:
    """One vector per image (B, vector_width): the mean of its tokens, the first one, or what the
    encoder's own head makes of them. Arguments as in `encode_pixels`."""
    if pool == "head":
        return encoder(pixels, pooled=True, **_options(encoder, draws))
    tokens = encode_pixels(encoder, pixels, draws)
    return tokens[:, 0] if pool == "class_token" else tokens.mean(dim=1)


def _options(encoder: nn.Module, draws: SampleDraws | None) -> dict[str, SampleDraws | None]:
    return {"draws": draws} if getattr(encoder, "takes_draws", False) else {}


def vector_width(encoder: nn.Module, pool: Pool) -> int:
    """Channels of `image_vectors`. Raises ValueError: an encoder without the head asked for."""
    if pool != "head":
        return encoder.width
    if not hasattr(encoder, "pooled_width"):
        raise ValueError(
            f"pool=head needs an encoder with a head of its own, which {type(encoder).__name__} "
            "has not: use pool=mean"
        )
    return encoder.pooled_width


def vector_flops(encoder: nn.Module, pool: Pool) -> Callable[[int, int], int]:
    """(height, width) -> FLOPs of `image_vectors` for one image."""
    return partial(encoder.flops, pooled=True) if pool == "head" else encoder.flops
