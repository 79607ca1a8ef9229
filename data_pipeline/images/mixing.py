"""Mixup and CutMix: what is drawn for each pair of neighbours; pixels are mixed on the device.

Partners are the positions P and P xor 1, which lie beside each other in one micro-batch, whatever
the number of ranks. Both get the same draw, keyed by the even one, and each is mixed into the
other: x_a' = x_a + s (x_b - x_a), x_b' = x_b + s (x_a - x_b), and labels alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from data_pipeline.settings import Settings

if TYPE_CHECKING:
    import torch

# As in timm, and so in every published recipe that mixes both ways.
_CUTMIX_PROBABILITY = 0.5


class MixingSettings(Settings):
    """Mixup and CutMix of pairs of images and of their labels, in training."""

    mixup_alpha: float = Field(default=0.8, ge=0.0)
    """Mixup: the share of an image is drawn from Beta(alpha, alpha); 0: no mixup."""
    cutmix_alpha: float = Field(default=1.0, ge=0.0)
    """CutMix: so is the share of the area that stays; the rest is a box cut from the partner.
    0: no CutMix."""
    probability: float = Field(default=1.0, gt=0.0, le=1.0)
    """Chance that a pair is mixed at all; where both are on, each is as likely."""

    @model_validator(mode="after")
    def _mixes(self) -> MixingSettings:
        if not self.mixup_alpha and not self.cutmix_alpha:
            raise ValueError(
                "mixup_alpha and cutmix_alpha are both 0, so nothing is mixed: remove the block"
            )
        return self


class Mix(NamedTuple):
    """How a pair is mixed."""

    share: float
    """Mixup: the partner's share of every pixel; 0 for CutMix and for pairs left alone."""
    box: tuple[float, float, float, float]
    """CutMix: (top, left, bottom, right) of what is the partner's, as shares of height and width;
    all 0 otherwise."""


ALONE = Mix(0.0, (0.0, 0.0, 0.0, 0.0))


def draw_mix(settings: MixingSettings, rng: np.random.Generator) -> Mix:
    """The mix of one pair. All numbers are drawn, whichever of them are used."""
    whether, which, y, x = rng.random(4)
    shares = [
        rng.beta(alpha, alpha) if alpha else 0.0
        for alpha in (settings.mixup_alpha, settings.cutmix_alpha)
    ]
    if whether >= settings.probability:
        return ALONE
    both = settings.mixup_alpha and settings.cutmix_alpha
    if not settings.cutmix_alpha or (both and which >= _CUTMIX_PROBABILITY):
        return Mix(1.0 - shares[0], ALONE.box)
    half = 0.5 * (1.0 - shares[1]) ** 0.5
    box = max(y - half, 0.0), max(x - half, 0.0), min(y + half, 1.0), min(x + half, 1.0)
    return Mix(0.0, box)


def collate_mixes(items: Sequence[dict[str, Any] | None]) -> dict[str, torch.Tensor]:
    """The mixes of a micro-batch whose rows 2i and 2i + 1 are partners.

    Returns:
        mix_share (B,) float32 and mix_box (B, 4) float32, see `Mix`; zeros in padding rows.
    """
    import torch

    mixes = [items[row & ~1] for row in range(len(items))]
    known = [ALONE if item is None else item["mix"] for item in mixes]
    return {
        "mix_share": torch.tensor([mix.share for mix in known], dtype=torch.float32),
        "mix_box": torch.tensor([mix.box for mix in known], dtype=torch.float32),
    }
