"""Caption data: from one sample of a shard to image, token and mask arrays."""

from pydantic import Field, field_validator

from data_pipeline.settings import Settings
from data_pipeline.transforms import ImageSettings


class CaptionDataSettings(Settings):
    """Images with one or more captions each, in WebDataset shards."""

    shards: list[str] = Field(min_length=1)
    """Folders with a manifest, tar files, globs or brace patterns."""
    image_extensions: list[str] = Field(default=["jpg", "jpeg", "png", "webp"], min_length=1)
    """Members that may hold the image, in order of preference."""
    caption_source: str = "txt"
    """Where captions are: a text member's extension ("txt"), or "json:KEY" for a string or a list
    of strings under KEY of the json member (dots descend: "json:annotations.captions")."""
    captions_per_image: int = Field(default=1, ge=1)
    """Captions that share one image in a step, drawn by seed; missing ones carry no loss."""
    text_length: int = Field(default=40, ge=3)
    """Longest caption in tokens, BOS and EOS included; longer ones lose their end."""
    image: ImageSettings = ImageSettings()
    """Decode and augmentation."""

    @field_validator("caption_source")
    @classmethod
    def _source(cls, value: str) -> str:
        extension, separator, key = value.partition(":")
        if not extension or (separator and not all(key.split("."))):
            raise ValueError(f"caption_source {value!r}: write an extension, or json:KEY")
        return value
