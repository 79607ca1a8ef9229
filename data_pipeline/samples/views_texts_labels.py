"""Data with everything that one image may be asked about: another view, a text, a class."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_pipeline.reading.reader import Sample
from data_pipeline.samples.caption_texts import SampleTexts
from data_pipeline.samples.captions import CaptionDataSettings, CaptionProcessor
from data_pipeline.samples.class_names import ClassNames, check_class_names
from data_pipeline.samples.labels import NO_LABEL, LabelSource
from data_pipeline.samples.members import AbsentValue, check_source
from data_pipeline.samples.sample_processor import Item, RngFor, column
from data_pipeline.samples.target import Target
from data_pipeline.samples.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


class M3IDataSettings(CaptionDataSettings):
    """Two views of each image with a text and a class, as far as there are any."""

    missing_targets: ClassVar[str] = "unlabelled"
    type: Literal["m3i"] = "m3i"
    """Kind of data; follows from the task's objective where it is not given."""
    label_source: str | None = None
    """Where the class number is, as in label data ("cls", "json:KEY"); samples without one stay.
    null: no classes are read."""
    classes: int | None = Field(default=None, ge=2)
    """Number of classes, with `label_source`; a label outside of 0 .. classes - 1 is a bad
    sample."""
    class_names: ClassNames = Field(default=[])
    """Names of the classes in the order of their numbers, for objectives that read them; [] = they
    have none."""
    unlabelled: Literal["without_loss", "expected"] = "without_loss"
    """Samples without a text or a class stay, and count for nothing there; `expected`: it is meant
    that few samples, or none, have them."""

    _named = model_validator(mode="after")(check_class_names)

    def processor(self, tokenizer: Tokenizer | None, train: bool) -> M3IProcessor:
        """As of `DataSettings`."""
        return M3IProcessor(self, tokenizer, train)

    def facts(self) -> dict[str, Any]:
        """As of `DataSettings`."""
        return {**super().facts(), "classes": self.classes, "class_names": self.class_names}

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


class M3IProcessor(CaptionProcessor):
    """As `CaptionProcessor`, but that texts may be missing, and with labels. In evaluation the
    second view is drawn like in training.

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
        """As `ImageProcessor.of_place`: even rows without their second view."""
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

    def captions(self, sample: Sample, rng_for: RngFor) -> SampleTexts:
        """As `CaptionProcessor.captions`; no texts if the sample has none."""
        try:
            return super().captions(sample, rng_for)
        except AbsentValue:
            return SampleTexts([])

    def read(self, sample: Sample, rng_for: RngFor) -> Item:
        """As `CaptionProcessor.read`, with label: int, NO_LABEL where there is none.

        Raises:
            BadSample: a text that is none, or a label that is none of the classes.
        """
        return {"label": self._label(sample), **super().read(sample, rng_for)}

    def stack(self, items: Sequence[Item | None], images: dict[str, torch.Tensor]) -> Item:
        """As `CaptionProcessor.stack`, with labels (B,) int64, NO_LABEL where there is none and in
        padding rows; loss_mask is empty where there is no text."""
        return super().stack(items, images) | {"labels": column(items, "label", NO_LABEL)}

    def _label(self, sample: Sample) -> int:
        try:
            return NO_LABEL if self.labels is None else self.labels.read(sample)
        except AbsentValue:
            return NO_LABEL
