"""The image of a sample, and images as a batch: what all data with pictures has in common."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field

from data_pipeline.decode import DecodeError
from data_pipeline.members import bad
from data_pipeline.reader import BadSample, Sample
from data_pipeline.sources import ShardedData
from data_pipeline.timing import StageClock
from data_pipeline.transforms import ImageSettings, ImageTransform


class ImageDataSettings(ShardedData):
    """Images in WebDataset shards; kinds of data add what belongs to the image."""

    type: str
    """Kind of data; subclasses name theirs."""
    image_extensions: list[str] = Field(default=["jpg", "jpeg", "png", "webp"], min_length=1)
    """Members that may hold the image, in order of preference."""
    image: ImageSettings = ImageSettings()
    """Decode and augmentation."""


class ImageFields:
    """The image side of a `TaskStream`; subclasses add `sample` and `collate`.

    Args:
        settings: which members hold images, and their transform.
        train: draw augmentations; otherwise nothing is drawn at random.
    """

    def __init__(self, settings: ImageDataSettings, train: bool) -> None:
        self.settings, self.train = settings, train
        self.transform = ImageTransform(settings.image)

    def buffers(self, count: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the uint8 batch arrays that `load_image` can write rows of in place."""
        if not self.settings.image.fixed_size:
            return {}
        size = self.settings.image.size
        return {"images": (count, size, size, 3)}

    def load_image(
        self,
        sample: Sample,
        rng_for: Callable[[str], np.random.Generator],
        out: dict[str, np.ndarray] | None,
        clock: StageClock | None,
    ) -> np.ndarray:
        """Decode and augment the sample's image.

        Args:
            sample: with one of the members of `image_extensions`.
            rng_for: purpose -> generator of this sample; not used in evaluation.
            out: this sample's rows of the arrays that `buffers` names.
            clock: books "decode" and "transform".

        Returns:
            (H, W, 3) uint8; the row of `out` if it was given.

        Raises:
            BadSample: no usable image.
        """
        rng = rng_for("image") if self.train else None
        place = None if out is None else out["images"]
        try:
            return self.transform(self._image_bytes(sample), rng, place, clock)
        except DecodeError as error:
            raise BadSample(str(error), sample.shard, sample.key, sample.row) from error

    def stack_images(
        self,
        items: Sequence[dict[str, Any] | None],
        buffers: dict[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        """The items' "images" as (B, 3, H, W) uint8, channels_last in memory; zeros for None.

        Raises:
            ValueError: images of different size (mode keep_aspect) in one batch.
        """
        return self._rows(items, buffers).permute(0, 3, 1, 2)

    def _rows(
        self, items: Sequence[dict[str, Any] | None], buffers: dict[str, torch.Tensor] | None
    ) -> torch.Tensor:
        if buffers:
            images = buffers["images"]
            for row, item in enumerate(items):
                if item is None:
                    images[row].zero_()
            return images
        arrays = [item["images"] for item in items if item is not None]
        sizes = {array.shape for array in arrays}
        if len(sizes) > 1:
            raise ValueError(
                f"images of different size {sorted(sizes)} cannot share a micro-batch: with "
                "image.mode keep_aspect set micro_batch to 1"
            )
        size = self.settings.image.size
        blank = np.zeros(sizes.pop() if sizes else (size, size, 3), dtype=np.uint8)
        rows = [blank if item is None else item["images"] for item in items]
        return torch.from_numpy(np.stack(rows))

    def _image_bytes(self, sample: Sample) -> bytes:
        for extension in self.settings.image_extensions:
            if extension in sample.members:
                return sample.members[extension]
        raise bad(sample, f"has no member {' or '.join(self.settings.image_extensions)}")
