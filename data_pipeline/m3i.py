"""Data with everything that one image may be asked about: another view, a text, a class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from data_pipeline.caption_texts import SampleTexts
from data_pipeline.captions import CaptionDataSettings, CaptionFields
from data_pipeline.labels import NO_LABEL, LabelSource
from data_pipeline.members import AbsentValue, check_source
from data_pipeline.reader import Sample
from data_pipeline.target import Target
from data_pipeline.timing import StageClock
from data_pipeline.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


class M3IDataSettings(CaptionDataSettings):
    """Two views of each image with a text and a class, as far as there are any."""

    type: Literal["m3i"] = "m3i"
    """Kind of data; follows from the task's objective where it is not given."""
    label_source: str | None = None
    """Where the class number is, as in label data ("cls", "json:KEY"); samples without one stay.
    null: no classes are read."""
    classes: int | None = Field(default=None, ge=2)
    """Number of classes, with `label_source`; a label outside of 0 .. classes - 1 is a bad
    sample."""
    unlabelled: Literal["without_loss", "expected"] = "without_loss"
    """Samples without a text or a class stay, and count for nothing there; `expected`: it is meant
    that few samples, or none, have them."""

    @field_validator("label_source")
    @classmethod
    def _source(cls, value: str | None) -> str | None:
        return value if value is None else check_source("label_source", value)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.label_source is None) != (self.classes is None):
            raise ValueError(
                f"label_source={self.label_source} and classes={self.classes} go together: set "
                "both, or both to null"
            )
        if self.second_view is None:
            raise ValueError("second_view is missing: one half of the images is to predict it")
        sizes = [(view.size, view.sizes) for view in (self.image, self.second_view)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                "image and second_view have different size or sizes, but one is predicted on the "
                "grid of the other: make them equal"
            )
        return self


class M3IFields(CaptionFields):
    """Turns samples into arrays and arrays into a batch; as `CaptionFields`, but that texts may be
    missing, and with labels. In evaluation the second view is drawn like in training.

    Of partners, rows 2i and 2i + 1 of a micro-batch, only the second one is asked for its other
    view, so that this is all that is made: `second_images` of rows 2i are zeros.
    """

    draws_second_view = True

    def __init__(self, settings: M3IDataSettings, tokenizer: Tokenizer, train: bool) -> None:
        super().__init__(settings, tokenizer, train)
        self.labels = (
            None
            if settings.label_source is None
            else LabelSource(settings.label_source, settings.classes)
        )

    def of_place(self, place: int) -> Self:
        """As `ImageFields.of_place`: even rows without their second view."""
        if place % 2:
            return self
        first = copy.copy(self)
        first.made_views = 1
        return first

    @property
    def extensions(self) -> frozenset[str]:
        """Members that are needed; a reader may leave out the others."""
        label = [] if self.labels is None else [self.labels.extension]
        return super().extensions | frozenset(label)

    def targets(self) -> list[Target]:
        """The texts and the label; none of them has to be there."""
        found = [target._replace(required=False) for target in super().targets()]
        if (labels := self.labels) is not None:
            where = ("label", "label_source", labels.source, labels.extension)
            found.append(Target(*where, labels.read, required=False))
        return found

    def captions(
        self, sample: Sample, rng_for: Callable[[str], np.random.Generator]
    ) -> SampleTexts:
        """As `CaptionFields.captions`; no texts if the sample has none."""
        try:
            return super().captions(sample, rng_for)
        except AbsentValue:
            return SampleTexts([])

    def sample(
        self,
        sample: Sample,
        rng_for: Callable[[str], np.random.Generator],
        out: dict[str, np.ndarray] | None = None,
        clock: StageClock | None = None,
    ) -> dict[str, Any]:
        """As `CaptionFields.sample`, with label: int, NO_LABEL where there is none.

        Raises:
            BadSample: no usable image, a text that is none, or a label that is none of the classes.
        """
        label = self._label(sample)  # first: a sample with a bad one is not decoded
        return {**super().sample(sample, rng_for, out, clock), "label": label}

    def collate(
        self,
        items: Sequence[dict[str, Any] | None],
        valid: Sequence[bool],
        buffers: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """As `CaptionFields.collate`, with labels (B,) int64, NO_LABEL where there is none and in
        padding rows; loss_mask is empty where there is no text."""
        import torch

        labels = [NO_LABEL if item is None else item["label"] for item in items]
        batch = super().collate(items, valid, buffers)
        return batch | {"labels": torch.tensor(labels, dtype=torch.int64)}

    def _label(self, sample: Sample) -> int:
        try:
            return NO_LABEL if self.labels is None else self.labels.read(sample)
        except AbsentValue:
            return NO_LABEL
