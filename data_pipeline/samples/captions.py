"""Caption data: from one sample of a shard to image, token and mask arrays, and to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from data_pipeline.reading.reader import Sample
from data_pipeline.samples.caption_texts import (
    CaptionSources,
    CaptionSourceSettings,
    CaptionTexts,
    CleaningSettings,
    SampleTexts,
)
from data_pipeline.samples.images import ImageDataSettings, ImageProcessor
from data_pipeline.samples.labels import NO_LABEL
from data_pipeline.samples.sample_processor import Item, RngFor, column
from data_pipeline.samples.target import Target
from data_pipeline.samples.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

# Texts are padded to a multiple of this, so that few different shapes occur.
TEXT_MULTIPLE = 8
# More characters than a token of any vocabulary stands for.
TOKEN_CHARACTERS = 256


class CaptionDataSettings(ImageDataSettings):
    """Images with one or more captions each, in WebDataset shards."""

    reads_text: ClassVar[bool] = True
    type: Literal["captions"] = "captions"
    """Kind of data; follows from the task's objective where it is not given."""
    caption_source: CaptionSources = Field(default="txt", validate_default=True)
    """Where captions are: a text member's extension ("txt"), or "json:KEY" for a string or a list
    of strings under KEY of the json member (dots descend: "json:annotations.captions"). Or a list
    of such sources with weights and templates, of which one is drawn by seed for each sample."""
    cleaning: CleaningSettings = CleaningSettings()
    """What is done to each caption before it becomes tokens."""
    captions_per_image: int = Field(default=1, ge=1)
    """Captions of its source that share one image in a step, drawn by seed; missing ones carry no
    loss."""
    text_length: int = Field(default=40, ge=3)
    """Longest caption in tokens, BOS and EOS included; longer ones lose their end."""
    frames: int | None = Field(default=None, ge=1)
    """Samples are clips: so many of their frames (members f000.jpg, f001.jpg, ...) take the place
    of the image, one of each of as many equal parts of the clip: drawn by seed, in evaluation its
    middle. All have the same crop, flip and colours. null: images."""

    def processor(self, tokenizer: Tokenizer | None, train: bool) -> CaptionProcessor:
        """As of `DataSettings`; of clips their own."""
        if self.frames is None:
            return CaptionProcessor(self, tokenizer, train)
        from data_pipeline.samples.clips import ClipProcessor

        return ClipProcessor(self, tokenizer, train)

    @field_validator("caption_source")
    @classmethod
    def _different(cls, value: list[CaptionSourceSettings]) -> list[CaptionSourceSettings]:
        names = [source.source for source in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"caption_source: {name!r} is named twice")
        return value

    @model_validator(mode="after")
    def _clips_fit(self) -> Self:
        if self.frames is not None and not self.image.fixed_size:
            raise ValueError(
                f"frames={self.frames}: clips need one size: image.mode {self.image.mode!r} gives "
                "several, choose another mode"
            )
        if self.frames is not None and self.second_view is not None:
            raise ValueError(f"frames={self.frames}: clips have no second_view; remove one")
        return self


class CaptionProcessor(ImageProcessor):
    """An image and its captions."""

    def __init__(self, settings: CaptionDataSettings, tokenizer: Tokenizer, train: bool) -> None:
        super().__init__(settings, train)
        self.tokenizer = tokenizer
        self.texts = CaptionTexts(settings.caption_source, settings.cleaning)

    @property
    def extensions(self) -> frozenset[str]:
        """Of the image and the texts."""
        return super().extensions | self.texts.extensions

    def targets(self) -> list[Target]:
        """A text of each source; a sample needs one of them."""
        return [
            Target("text", "caption_source", name, source.extension, source.read, required=True)
            for name, source in self.texts.sources.items()
        ]

    def read(self, sample: Sample, rng_for: RngFor) -> Item:
        """captions: list of str, at most K, in evaluation all of them; prompt_class: int, see
        `SampleTexts`."""
        texts, prompt_class = self.captions(sample, rng_for)
        return {"captions": texts, "prompt_class": prompt_class}

    def captions(self, sample: Sample, rng_for: RngFor) -> SampleTexts:
        """The texts of a sample: in training those drawn, in evaluation all of its first source.

        Raises BadSample: there is none, or it is not text.
        """
        if self.train:
            return self.texts.draw(sample, self.settings.captions_per_image, rng_for)
        return self.texts.references(sample)

    def stack(self, items: Sequence[Item | None], images: dict[str, torch.Tensor]) -> Item:
        """tokens (B, K, T) int64, rows BOS w.. EOS pad.., T the longest text rounded up to 8, at
        most text_length; loss_mask (B, K, T) bool, True at tokens that are predicted (words and
        EOS); prompt_class (B,) int64, equal where texts were made from the name of the same class,
        NO_LABEL where they are no such prompts; captions: list of B lists of str (evaluation only).
        """
        tokens, lengths = self._encode(items)
        places = np.arange(tokens.shape[2])
        batch: Item = {
            "tokens": tokens,
            "loss_mask": (places > 0) & (places < lengths[:, :, None]),
            "prompt_class": column(items, "prompt_class", NO_LABEL),
        }
        if not self.train:
            batch["captions"] = [[] if item is None else item["captions"] for item in items]
        return batch

    def _encode(self, items: Sequence[Item | None]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (B, K, T) int64 and lengths (B, K) int64, 0 where there is no caption.

        All texts of a batch in one go: between two images the tokenizer's tables would leave the
        processor's caches, and each text take more than twice as long.
        """
        tokenizer, longest = self.tokenizer, self.settings.text_length
        shape = (len(items), self.settings.captions_per_image)
        lengths = np.zeros(shape, dtype=np.int64)
        rows: list[tuple[int, int, list[int]]] = []
        for row, item in enumerate(items):
            for place, caption in enumerate([] if item is None else item["captions"][: shape[1]]):
                # A whole book as a caption would take seconds to encode, for 40 tokens of it.
                text = self.texts.cut(caption)[: longest * TOKEN_CHARACTERS]
                ids = tokenizer.encode(text)[: longest - 2]
                rows.append((row, place, ids))
                lengths[row, place] = len(ids) + 2
        width = -(-max(int(lengths.max()), 2) // TEXT_MULTIPLE) * TEXT_MULTIPLE
        tokens = np.full((*shape, min(width, longest)), tokenizer.pad_id, dtype=np.int64)
        tokens[:, :, 0], tokens[:, :, 1] = tokenizer.bos_id, tokenizer.eos_id
        for row, place, ids in rows:
            tokens[row, place, 1 : len(ids) + 2] = [*ids, tokenizer.eos_id]
        return tokens, lengths
