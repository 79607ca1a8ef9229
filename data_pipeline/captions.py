"""Caption data: from one sample of a shard to image, token and mask arrays, and to a batch."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from data_pipeline.caption_texts import (
    CaptionSources,
    CaptionSourceSettings,
    CaptionTexts,
    CleaningSettings,
)
from data_pipeline.images import ImageDataSettings, ImageFields
from data_pipeline.reader import Sample
from data_pipeline.timing import StageClock
from data_pipeline.tokenizer import Tokenizer

# Texts are padded to a multiple of this, so that few different shapes occur.
TEXT_MULTIPLE = 8
# More characters than a token of any vocabulary stands for.
TOKEN_CHARACTERS = 256


class CaptionDataSettings(ImageDataSettings):
    """Images with one or more captions each, in WebDataset shards."""

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


class CaptionFields(ImageFields):
    """Turns samples into arrays and arrays into a batch; the caption side of a `TaskStream`."""

    def __init__(self, settings: CaptionDataSettings, tokenizer: Tokenizer, train: bool) -> None:
        super().__init__(settings, train)
        self.tokenizer = tokenizer
        self.texts = CaptionTexts(settings.caption_source, settings.cleaning)

    @property
    def extensions(self) -> frozenset[str]:
        """Members that are needed; a reader may leave out the others."""
        return frozenset(self.settings.image_extensions) | self.texts.extensions

    def sample(
        self,
        sample: Sample,
        rng_for: Callable[[str], np.random.Generator],
        out: dict[str, np.ndarray] | None = None,
        clock: StageClock | None = None,
    ) -> dict[str, Any]:
        """Arrays of one sample.

        Args:
            sample: with the members of `extensions`.
            rng_for: purpose -> generator of this sample; not used in evaluation.
            out: this sample's rows of the arrays that `buffers` names.
            clock: books "decode" and "transform" (which includes text).

        Returns:
            what `load_image` does; tokens (K, text_length) int64; lengths (K,) int64, 0 where the
            source has fewer than K captions; captions: list of str, those chosen, in evaluation
            all of them.

        Raises:
            BadSample: no usable image or caption.
        """
        count, length = self.settings.captions_per_image, self.settings.text_length
        captions = self.captions(sample, rng_for)  # first: a sample without one is not decoded
        image = self.load_image(sample, rng_for, out, clock)
        tokens = np.full((count, length), self.tokenizer.pad_id, dtype=np.int64)
        tokens[:, 0], tokens[:, 1] = self.tokenizer.bos_id, self.tokenizer.eos_id
        lengths = np.zeros(count, dtype=np.int64)
        for place, caption in enumerate(captions[:count]):
            caption = self.texts.cut(caption)
            # A whole book as a caption would take seconds to encode, for 40 tokens of it.
            ids = self.tokenizer.encode(caption[: length * TOKEN_CHARACTERS])[: length - 2]
            tokens[place, 1 : 1 + len(ids)] = ids
            tokens[place, 1 + len(ids)] = self.tokenizer.eos_id
            lengths[place] = len(ids) + 2
        if clock is not None:
            clock.lap("transform")
        return {**image, "tokens": tokens, "lengths": lengths, "captions": captions}

    def captions(
        self, sample: Sample, rng_for: Callable[[str], np.random.Generator]
    ) -> list[str]:
        """The texts of a sample: in training those drawn, in evaluation all of its first source.

        Raises BadSample: there is none, or it is not text.
        """
        if self.train:
            return self.texts.draw(sample, self.settings.captions_per_image, rng_for)
        return self.texts.references(sample)

    def collate(
        self,
        items: Sequence[dict[str, Any] | None],
        valid: Sequence[bool],
        buffers: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """Batch of the results of `sample`; None stands for a padding row.

        Returns:
            what `stack_images` does; tokens (B, K, T) int64, rows BOS w.. EOS pad.., T the longest
            text rounded up to 8, at most text_length; loss_mask (B, K, T) bool, True at tokens that
            are predicted (words and EOS); valid (B,) bool; captions: list of B lists of str
            (evaluation only).

        Raises:
            ValueError: images of different size (mode keep_aspect) in one batch.
        """
        shape = (len(items), self.settings.captions_per_image, self.settings.text_length)
        tokens = np.full(shape, self.tokenizer.pad_id, dtype=np.int64)
        tokens[:, :, 0], tokens[:, :, 1] = self.tokenizer.bos_id, self.tokenizer.eos_id
        lengths = np.zeros(shape[:2], dtype=np.int64)
        for row, item in enumerate(items):
            if item is not None:
                tokens[row], lengths[row] = item["tokens"], item["lengths"]
        longest = max(int(lengths.max()), 2)
        width = min(-(-longest // TEXT_MULTIPLE) * TEXT_MULTIPLE, shape[2])
        places = np.arange(width)
        batch: dict[str, Any] = {
            **self.stack_images(items, buffers),
            "tokens": torch.from_numpy(np.ascontiguousarray(tokens[:, :, :width])),
            "loss_mask": torch.from_numpy((places > 0) & (places < lengths[:, :, None])),
            "valid": torch.tensor(list(valid), dtype=torch.bool),
        }
        if not self.train:
            batch["captions"] = [[] if item is None else item["captions"] for item in items]
        return batch
