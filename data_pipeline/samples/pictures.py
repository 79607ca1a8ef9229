"""Images alone, for objectives that need neither labels nor texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from data_pipeline.samples.images import ImageDataSettings, ImageProcessor

if TYPE_CHECKING:
    from data_pipeline.samples.tokenizer import Tokenizer


class PictureDataSettings(ImageDataSettings):
    """Images with nothing beside them, in WebDataset shards."""

    type: Literal["images"] = "images"
    """Kind of data; follows from the task's objective where it is not given."""

    def processor(self, tokenizer: Tokenizer | None, train: bool) -> ImageProcessor:
        """The image is all of it."""
        return ImageProcessor(self, train)
