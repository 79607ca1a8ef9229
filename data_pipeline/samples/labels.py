"""Class-label data: from one sample of a shard to an image and a label, and to a batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from data_pipeline.images.mixing import MixingSettings, collate_mixes, draw_mix
from data_pipeline.images.transforms import ImageSettings
from data_pipeline.reading.reader import Sample
from data_pipeline.samples.class_names import ClassNames, check_class_names
from data_pipeline.samples.image_fields import ImageDataSettings, ImageProcessor
from data_pipeline.samples.members import AbsentValue, MemberSource, bad, check_source
from data_pipeline.samples.sample_processor import Item, RngFor, column
from data_pipeline.samples.target import Target

if TYPE_CHECKING:
    import torch

    from data_pipeline.samples.tokenizer import Tokenizer

NO_LABEL = -1
"""Stands where a sample, or a padding row, has no label."""

# Probabilities are often stored as rounded numbers; larger errors are no rounding.
_SUM_TOLERANCE = 0.01


class LabelDataSettings(ImageDataSettings):
    """Images with a class each, in WebDataset shards."""

    missing_targets: ClassVar[str] = "unlabelled"
    type: Literal["labels"] = "labels"
    """Kind of data; follows from the task's objective where it is not given."""
    label_source: str = "cls"
    """Where the class number is: a text member's extension ("cls"), or "json:KEY" for a whole
    number under KEY of the json member (dots descend: "json:annotations.label")."""
    label_form: Literal["class", "probabilities"] = "class"
    """What stands there: the number of a class, or probabilities of classes (soft targets): a list
    of `classes` numbers or a mapping {class: probability}, which add up to 1; a whole number is a
    class that is certain. Needs a label_source of json."""
    classes: int = Field(ge=2)
    """Number of classes; labels run from 0. A label outside of that is a bad sample."""
    class_names: ClassNames = Field(default=[])
    """Names of the classes in the order of their numbers, for objectives that read them; [] = they
    have none."""
    mixing: MixingSettings | None = None
    """Mixup and CutMix of neighbours, images and labels; null: none. Needs an even micro-batch."""
    unlabelled: Literal["without_loss", "fault", "expected"] = "without_loss"
    """Samples that have no label: `without_loss` keeps them in the batch, where they count for
    nothing; `fault` treats them as bad samples, which are replaced, counted and limited; `expected`
    is `without_loss` where it is meant that few samples, or none, have one."""

    smaller_views: tuple[int, ...] = ()
    """Further sizes of each image in training, in pixels, descending and below `image.size`: each
    is cut and augmented with draws of its own, else as `image` says (ResFormer; its own: 160 and
    128 beside 224)."""

    def views(self, train: bool) -> dict[str, tuple[str, ImageSettings]]:
        """As in `ImageDataSettings`; `smaller_view_name` of each of `smaller_views` in training."""
        views = super().views(train)
        for size in self.smaller_views if train else ():
            settings = self.image.model_copy(update={"size": size, "sizes": None})
            views[smaller_view_name(size)] = (f"view of {size} pixels", settings)
        return views

    def processor(self, tokenizer: Tokenizer | None, train: bool) -> LabelProcessor:
        """As of `DataSettings`."""
        return LabelProcessor(self, train)

    def facts(self) -> dict[str, Any]:
        """As of `DataSettings`."""
        return {
            **super().facts(),
            "classes": self.classes,
            "class_names": self.class_names,
            "smaller_views": self.smaller_views,
        }

    @property
    def further_views(self) -> tuple[int, ...]:
        """As of `DataSettings`."""
        return self.smaller_views

    def batch_problems(self, micro_batch: int) -> list[str]:
        """As of `DataSettings`."""
        mixes = self.mixing is not None and micro_batch == 1
        return super().batch_problems(micro_batch) + (
            ["data.mixing mixes neighbours: micro_batch must be even, not 1"] if mixes else []
        )

    _named = model_validator(mode="after")(check_class_names)

    @field_validator("label_source")
    @classmethod
    def _source(cls, value: str) -> str:
        return check_source("label_source", value)

    @model_validator(mode="after")
    def _probabilities_are_json(self) -> Self:
        if self.label_form == "probabilities" and ":" not in self.label_source:
            raise ValueError(
                f"label_form=probabilities needs label_source json:KEY, not {self.label_source!r}"
            )
        return self

    @model_validator(mode="after")
    def _smaller_views_descend(self) -> Self:
        sizes = self.smaller_views
        if not sizes:
            return self
        if list(sizes) != sorted(set(sizes), reverse=True) or sizes[-1] < 1:
            raise ValueError(f"smaller_views: must descend, like [160, 128], not {list(sizes)}")
        if not self.image.fixed_size:
            raise ValueError(
                "smaller_views is not for image.mode keep_aspect, whose images have "
                "no size in common: remove it"
            )
        name = "sizes" if self.image.sizes else "size"
        least = min(self.image.sizes or [self.image.size])
        if sizes[0] >= least:
            raise ValueError(f"smaller_views: {sizes[0]} is not below image.{name}={least}")
        return self


def smaller_view_name(size: int) -> str:
    """Name in a batch of the images of `size` pixels that `smaller_views` asks for."""
    return f"images_{size}"


class LabelSource(MemberSource):
    """Finds the label of a sample; see `LabelDataSettings.label_source`."""

    def __init__(self, source: str, classes: int) -> None:
        super().__init__(source)
        self.classes = classes

    def read(self, sample: Sample) -> int:
        """The label, 0 .. classes - 1.

        Raises:
            AbsentValue: no such member or key, or null under the key.
            BadSample: not a whole number, or out of range.
        """
        return self._class(sample, self._present(sample))

    def read_probabilities(self, sample: Sample) -> np.ndarray:
        """The probability of each class: (classes,) float32 that add up to 1.

        Raises:
            AbsentValue: no such member or key, or null under the key.
            BadSample: none of the forms of `label_form`, or no probabilities.
        """
        found = self._present(sample)
        values = np.zeros(self.classes, dtype=np.float64)
        if isinstance(found, dict):
            for name, value in found.items():
                values[self._class(sample, name)] += self._number(sample, value)
        elif isinstance(found, list):
            if len(found) != self.classes:
                raise bad(
                    sample, f"{self.source}: {len(found)} probabilities for {self.classes} classes"
                )
            values[:] = [self._number(sample, value) for value in found]
        else:
            values[self._class(sample, found)] = 1.0
        total = float(values.sum())
        if abs(total - 1.0) > _SUM_TOLERANCE:
            raise bad(sample, f"{self.source}: probabilities add up to {total:.4g}, not 1")
        return (values / total).astype(np.float32)

    def _present(self, sample: Sample) -> Any:
        found = self.value(sample)
        if found is None:
            raise bad(sample, f"{self.source} is null", AbsentValue)
        return found

    def _number(self, sample: Sample, value: Any) -> float:
        """A probability, which JSON may also write as 0, 1, or (Python's dialect) NaN."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0.0 <= value <= 1.0:
            raise bad(sample, f"{self.source} is not a probability: {str(value)[:40]!r}")
        return float(value)

    def _class(self, sample: Sample, found: Any) -> int:
        if isinstance(found, str):
            # int() alone would also take "1_0" and digits of other scripts.
            is_number = re.fullmatch(r"-?\d{1,18}", found.strip(), re.ASCII)
            found = int(found) if is_number else found
        if not isinstance(found, int) or isinstance(found, bool):
            raise bad(sample, f"{self.source} is not a whole number: {str(found)[:40]!r}")
        if not 0 <= found < self.classes:
            raise bad(
                sample, f"{self.source}: label {found} is not in 0..{self.classes - 1} (classes)"
            )
        return found


class LabelProcessor(ImageProcessor):
    """An image and its label."""

    def __init__(self, settings: LabelDataSettings, train: bool) -> None:
        super().__init__(settings, train)
        self.source = LabelSource(settings.label_source, settings.classes)
        self._soft = settings.label_form == "probabilities"
        self._mixes = train and settings.mixing is not None

    @property
    def extensions(self) -> frozenset[str]:
        """Of the image and the label."""
        return super().extensions | {self.source.extension}

    def targets(self) -> list[Target]:
        """The label."""
        read = self.source.read_probabilities if self._soft else self.source.read
        required = self.settings.unlabelled == "fault"
        source = self.source
        return [Target("label", "label_source", source.source, source.extension, read, required)]

    def read(self, sample: Sample, rng_for: RngFor) -> Item:
        """label: int, NO_LABEL where there is none; of probabilities the class with the largest,
        and target: (classes,) float32, if there is one; in training with `mixing` also mix: Mix.

        Raises:
            BadSample: a label that is none of the classes.
        """
        item = self._label(sample)
        if self._mixes:
            item["mix"] = draw_mix(self.settings.mixing, rng_for("mix"))
        return item

    def stack(self, items: Sequence[Item | None], images: dict[str, torch.Tensor]) -> Item:
        """labels (B,) int64, NO_LABEL where there is none and in padding rows; of probabilities
        also targets (B, classes) float32, zeros in those rows; in training with `mixing` also what
        `collate_mixes` returns."""
        batch: Item = {"labels": column(items, "label", NO_LABEL)}
        if self._soft:
            none = np.zeros(self.settings.classes, dtype=np.float32)
            rows = [none if item is None else item.get("target", none) for item in items]
            batch["targets"] = np.stack(rows)
        return batch | collate_mixes(items) if self._mixes else batch

    def _label(self, sample: Sample) -> Item:
        """The part of an item that is the label."""
        try:
            if not self._soft:
                return {"label": self.source.read(sample)}
            target = self.source.read_probabilities(sample)
            return {"label": int(target.argmax()), "target": target}
        except AbsentValue:
            if self.settings.unlabelled == "fault":
                raise
            return {"label": NO_LABEL}
