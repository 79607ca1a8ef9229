"""Images alone, for objectives that need neither labels nor texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_pipeline.images import ImageDataSettings, ImageFields
from data_pipeline.reader import Sample
from data_pipeline.timing import StageClock

if TYPE_CHECKING:
    import torch


class PictureDataSettings(ImageDataSettings):
    """Images with nothing beside them, in WebDataset shards."""

    type: Literal["images"] = "images"
    """Kind of data; follows from the task's objective where it is not given."""


class PictureFields(ImageFields):
    """Turns samples into arrays and arrays into a batch; the image is all of it."""

    @property
    def extensions(self) -> frozenset[str]:
        """Members that are needed; a reader may leave out the others."""
        return frozenset(self.settings.image_extensions)

    def sample(
        self,
        sample: Sample,
        rng_for: Callable[[str], np.random.Generator],
        out: dict[str, np.ndarray] | None = None,
        clock: StageClock | None = None,
    ) -> dict[str, Any]:
        """As `ImageFields.load_image`."""
        return self.load_image(sample, rng_for, out, clock)

    def collate(
        self,
        items: Sequence[dict[str, Any] | None],
        valid: Sequence[bool],
        buffers: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """As `ImageFields.stack_images`, and valid (B,) bool."""
        import torch

        batch = self.stack_images(items, buffers)
        return {**batch, "valid": torch.tensor(list(valid), dtype=torch.bool)}
