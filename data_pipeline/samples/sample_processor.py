"""A kind of data: its settings, and what makes a batch of its samples.

README.md, beside this file, says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from data_pipeline.order.sources import ShardedData
from data_pipeline.reading.reader import Sample
from data_pipeline.samples.target import Target
from data_pipeline.timing import StageClock

if TYPE_CHECKING:
    import torch

    from data_pipeline.images.transforms import HeldOutImageSettings, ImageSettings
    from data_pipeline.samples.tokenizer import Tokenizer

RngFor = Callable[[str], np.random.Generator]
"""purpose -> generator of one sample."""

Item = dict[str, Any]
"""What is known of one sample, by name."""


class DataSettings(ShardedData):
    """Base of the settings of every kind of data; subclasses name their `type`."""

    missing_targets: ClassVar[str | None] = None
    """The field that says what becomes of samples without a target ("expected": it is meant that
    few, or none, have one); None: there is no such field."""
    type: str
    """Kind of data; subclasses name theirs."""

    def processor(self, tokenizer: Tokenizer | None, train: bool) -> SampleProcessor:
        """What turns samples into batches.

        tokenizer: of the run, if anything reads text; train: draw augmentations.
        """
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What objectives are told of the data when they are built, by name: `BuildContext` of
        `pretrain.models` has these names."""
        return {}

    def image_settings(self) -> dict[str, ImageSettings]:
        """Field -> settings, of each image that is made of a sample."""
        return {}

    @property
    def further_views(self) -> tuple[int, ...]:
        """Sizes of further views of each image, under `smaller_views`."""
        return ()

    @property
    def copies(self) -> int:
        """How often each sample stands in a step."""
        return 1

    @property
    def targets_may_miss(self) -> bool:
        """Whether it is meant that few samples, or none, have a target."""
        key = self.missing_targets
        return key is not None and getattr(self, key) == "expected"

    def batch_problems(self, micro_batch: int) -> list[str]:
        """Why samples cannot be in micro-batches of that size: lines with key paths of a task."""
        return []

    def evaluation_problems(
        self, where: str, image: HeldOutImageSettings | None, micro_batch: int
    ) -> list[str]:
        """The same for held-out samples; where: key path of the task; image: what it says of its
        `evaluation.image`."""
        if image is None:
            return []
        return [f"{where}.evaluation.image: data of type {self.type} have no images"]

    def held_out(
        self, shards: Sequence[str], image: HeldOutImageSettings | None, changes: Mapping[str, Any]
    ) -> Self:
        """These settings for an evaluation.

        Args:
            shards: of the held-out samples.
            image: their preprocessing; None: the one that follows from these settings.
            changes: further fields -> values.
        """
        update = {"shards": list(shards), "sources": None, "stream": None, **changes}
        return self.model_copy(update=update)


class SampleProcessor:
    """Turns samples into arrays and arrays into a batch.

    A kind of data says which members it needs (`extensions`), what it reads of a sample (`read`)
    and how that stands in a batch (`stack`); images are the part of `images.ImageProcessor`.

    Args:
        settings: of this kind of data.
        train: draw augmentations; otherwise nothing is drawn at random.
    """

    def __init__(self, settings: DataSettings, train: bool) -> None:
        self.settings, self.train = settings, train

    @property
    def extensions(self) -> frozenset[str]:
        """Members of a sample that are needed; a reader may leave out the others."""
        raise NotImplementedError

    def targets(self) -> list[Target]:
        """What samples hold that an objective may learn from, where it may be missing."""
        return []

    def read(self, sample: Sample, rng_for: RngFor) -> Item:
        """What the sample holds beside its image. It comes first: a sample in which that is bad is
        not decoded.

        rng_for: purpose -> generator of this sample; for draws in training.

        Raises:
            BadSample: it is not there, or not what it should be.
        """
        return {}

    def load_image(
        self,
        sample: Sample,
        rng_for: RngFor,
        out: dict[str, np.ndarray] | None,
        clock: StageClock | None,
    ) -> Item:
        """The image of a sample, for kinds of data that have one; arguments as of `sample`."""
        return {}

    def finish(self, sample: Sample, item: Item) -> Item:
        """The item, once what was read is beside the image that it belongs to."""
        return item

    def stack_images(
        self, items: Sequence[Item | None], buffers: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """The images of a batch, for kinds of data that have some."""
        return {}

    def stack(self, items: Sequence[Item | None], images: dict[str, torch.Tensor]) -> Item:
        """What `read` and `finish` made, for a batch: arrays (B, ...), or lists.

        items: None stands for a padding row; images: what `stack_images` returned.
        """
        return {}

    def of_step(self, seed: int, task: str, step: int) -> Self:
        """This processor with what is chosen once for all samples of a step, on all ranks."""
        return self

    def of_place(self, place: int) -> Self:
        """This processor for the row with number `place` of a micro-batch."""
        return self

    def buffers(self, count: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the uint8 arrays of a batch of `count` that `sample` writes in place, a row
        each; the largest of any step, if steps differ."""
        return {}

    def sample(
        self,
        sample: Sample,
        rng_for: RngFor,
        out: dict[str, np.ndarray] | None = None,
        clock: StageClock | None = None,
    ) -> Item:
        """What is known of one sample.

        Args:
            sample: with the members of `extensions`.
            rng_for: purpose -> generator of this sample.
            out: this sample's rows of the arrays that `buffers` names.
            clock: books "decode" and "transform".

        Raises:
            BadSample: it cannot be used.
        """
        item = self.read(sample, rng_for)
        item = self.finish(sample, {**self.load_image(sample, rng_for, out, clock), **item})
        if clock is not None:
            clock.lap("transform")
        return item

    def collate(
        self,
        items: Sequence[Item | None],
        valid: Sequence[bool],
        buffers: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """Batch of the results of `sample`; None stands for a padding row.

        Returns:
            what `stack_images` and `stack` do, arrays as tensors, and valid (B,) bool.

        Raises:
            ValueError: images of different size (mode keep_aspect) in one batch.
        """
        import torch

        images = self.stack_images(items, buffers)
        found = {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in self.stack(items, images).items()
        }
        return {**images, **found, "valid": torch.tensor(list(valid), dtype=torch.bool)}


def column(items: Sequence[Item | None], name: str, missing: int) -> np.ndarray:
    """(B,) int64: a number of each item, `missing` in padding rows."""
    return np.array([missing if item is None else item[name] for item in items], dtype=np.int64)
