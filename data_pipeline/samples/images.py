"""The image of a sample, and images as a batch: what all data with pictures has in common."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from data_pipeline.images.decode import DecodeError
from data_pipeline.images.formats import MEMBERS
from data_pipeline.images.transforms import (
    HeldOutImageSettings,
    ImageSettings,
    ImageTransform,
    View,
    make_views,
)
from data_pipeline.images.views import VIEWS, check_views, collate_views, describe_views
from data_pipeline.reading.reader import BadSample, Sample
from data_pipeline.rng import sample_rng
from data_pipeline.samples.members import no_member
from data_pipeline.samples.sample_processor import DataSettings, Item, RngFor, SampleProcessor
from data_pipeline.timing import StageClock

if TYPE_CHECKING:
    import torch


class ImageDataSettings(DataSettings):
    """Images in WebDataset shards; kinds of data add what belongs to the image."""

    image_extensions: list[str] = Field(default=MEMBERS, min_length=1)
    """Members that may hold the image, in order of preference."""
    image: ImageSettings = ImageSettings()
    """Decode and augmentation."""
    second_view: ImageSettings | None = None
    """A second view of each image, with draws of its own, for objectives that compare two; the
    batch then also tells where both were cut. null: none."""
    repeats: int = Field(default=1, ge=1)
    """Repeated augmentation: each image stands so many times in a global batch, with draws of its
    own each time. `global_batch` counts all of them; `epoch` counts images."""

    def views(self, train: bool) -> dict[str, tuple[str, ImageSettings]]:
        """Name in the batch -> purpose of the draws and settings, of each image that is made of
        one; kinds of data may add some."""
        views = {"images": ("image", self.image)}
        if self.second_view is not None:
            views["second_images"] = ("second view", self.second_view)
        return views

    @property
    def copies(self) -> int:
        """As of `DataSettings`."""
        return self.repeats

    def facts(self) -> dict[str, Any]:
        """The statistics of pixels."""
        return {"image_mean": self.image.mean, "image_std": self.image.std}

    def image_settings(self) -> dict[str, ImageSettings]:
        """As of `DataSettings`."""
        second = {} if self.second_view is None else {"second_view": self.second_view}
        return {"image": self.image, **second}

    def batch_problems(self, micro_batch: int) -> list[str]:
        """As of `DataSettings`."""
        if self.image.mode != "keep_aspect" or micro_batch == 1:
            return []
        return [
            "data.image.mode=keep_aspect gives images of different sizes, so micro_batch must "
            f"be 1, not {micro_batch}"
        ]

    def evaluation_problems(
        self, where: str, image: HeldOutImageSettings | None, micro_batch: int
    ) -> list[str]:
        """As of `DataSettings`: sizes that go together."""
        held_out = self.held_out_image(image)
        try:
            ImageSettings.model_validate(held_out.model_dump())
        except ValidationError as error:
            reasons = [detail["ctx"]["error"] for detail in error.errors()]
            return [f"{where}.evaluation.image: {reason}" for reason in reasons]
        if held_out.mode == "keep_aspect" and micro_batch > 1:
            return [
                f"{where}.evaluation.micro_batch={micro_batch} must be 1 with image mode "
                "keep_aspect"
            ]
        return []

    def held_out(
        self, shards: Sequence[str], image: HeldOutImageSettings | None, changes: Mapping[str, Any]
    ) -> Self:
        """As of `DataSettings`."""
        changes = {"image": self.held_out_image(image), **changes}
        return super().held_out(shards, image, changes)

    def held_out_image(self, image: HeldOutImageSettings | None) -> ImageSettings:
        """Preprocessing of held-out images: what is said, else a centre crop of the same size."""
        return (image or HeldOutImageSettings()).beside(self.image)

    @model_validator(mode="after")
    def _views_fit(self) -> Self:
        if self.second_view is not None:
            check_views(self.image, self.second_view)
        if self.repeats > 1 and self.stream is not None:
            raise ValueError(
                f"repeats={self.repeats}: a stream has no order in which images could stand "
                "several times; use shards, or repeats=1"
            )
        return self


class ImageProcessor(SampleProcessor):
    """The image side of a `TaskStream`; kinds of data add what they `read` and `stack`.

    Args:
        settings: which members hold images, and their transforms.
        train: draw augmentations; otherwise nothing is drawn at random, but for a second view if
            `draws_second_view` says so (by seed and position: the same in every evaluation).
    """

    draws_second_view = False
    made_views: int | None = None
    """How many of the `views` are made, the first ones; None: all."""

    def __init__(self, settings: ImageDataSettings, train: bool) -> None:
        super().__init__(settings, train)
        self._views = settings.views(train)
        self._of_sizes: dict[tuple[int, ...], Self] = {}
        self._set_sizes([s.largest_size if train else s.size for _, s in self._views.values()])

    @property
    def extensions(self) -> frozenset[str]:
        """Those that may hold the image."""
        return frozenset(self.settings.image_extensions)

    def of_step(self, seed: int, task: str, step: int) -> Self:
        """This processor at the image sizes of a step: the same on all ranks, after any restart."""
        if not self.train or not any(settings.sizes for _, settings in self._views.values()):
            return self
        draw = sample_rng(seed, task, step, "image size of the step").random()
        # Two views with equal lists thus have equal sizes.
        sizes = tuple(
            settings.sizes[int(draw * len(settings.sizes))] if settings.sizes else settings.size
            for _, settings in self._views.values()
        )
        if sizes not in self._of_sizes:
            self._of_sizes[sizes] = copy.copy(self)
            self._of_sizes[sizes]._set_sizes(sizes)
        return self._of_sizes[sizes]

    def buffers(self, count: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the uint8 batch arrays that `load_image` can write rows of in place; those of
        the largest images if no step was chosen."""
        if not self.settings.image.fixed_size:
            return {}
        sizes = {name: t.settings.size for name, t in self._transforms.items()}
        return {name: (count, size, size, 3) for name, size in sizes.items()}

    def load_image(
        self,
        sample: Sample,
        rng_for: RngFor,
        out: dict[str, np.ndarray] | None,
        clock: StageClock | None,
    ) -> Item:
        """Decode and augment the sample's image.

        Args:
            sample: with one of the members of `image_extensions`.
            rng_for: purpose -> generator of this sample; not used in evaluation.
            out: this sample's rows of the arrays that `buffers` names.
            clock: books "decode" and "transform".

        Returns:
            images (H, W, 3) uint8, the row of `out` if it was given, and other `views` that are
            made; with `second_view` also what `describe_views` returns.

        Raises:
            BadSample: no usable image.
        """
        views = self.load_views(sample, rng_for, out, clock)
        item = {name: view.image for name, view in zip(self._views, views, strict=False)}
        return item if self.settings.second_view is None else item | describe_views(views[:VIEWS])

    def load_views(
        self,
        sample: Sample,
        rng_for: RngFor,
        out: dict[str, np.ndarray] | None,
        clock: StageClock | None,
    ) -> list[View]:
        """As `load_image`, with all that is known of each view."""
        drawn = {"second_images"} if self.draws_second_view else set()
        rngs = [
            rng_for(purpose) if self.train or name in drawn else None
            for name, (purpose, _) in self._views.items()
        ]
        places = [None if out is None else out[name] for name in self._views]
        try:
            data = self._image_bytes(sample)
            transforms = list(self._transforms.values())
            return make_views(data, transforms, rngs, places, clock, self.made_views)
        except DecodeError as error:
            raise BadSample(str(error), sample.shard, sample.key, sample.row) from error

    def stack_images(
        self,
        items: Sequence[Item | None],
        buffers: dict[str, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """The images of a batch, from what `load_image` returned; None stands for a padding row.

        Returns:
            images (B, 3, H, W) uint8, channels_last in memory, zeros in padding rows and where a
            view was not made, and other `views` likewise; with `second_view` also what
            `collate_views` returns.

        Raises:
            ValueError: images of different size (mode keep_aspect) in one batch.
        """
        batch = {name: self._rows(name, items, buffers).permute(0, 3, 1, 2) for name in self._views}
        return batch if self.settings.second_view is None else batch | collate_views(items)

    def _set_sizes(self, sizes: Sequence[int]) -> None:
        self._transforms = {
            name: ImageTransform(settings.model_copy(update={"size": size}))
            for (name, (_, settings)), size in zip(self._views.items(), sizes, strict=True)
        }

    def _rows(
        self,
        name: str,
        items: Sequence[Item | None],
        buffers: dict[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        import torch

        if buffers:
            images = buffers[name]
            for row, item in enumerate(items):
                if item is None or name not in item:
                    images[row].zero_()
            return images
        arrays = [item[name] for item in items if item is not None and name in item]
        sizes = {array.shape for array in arrays}
        if len(sizes) > 1:
            raise ValueError(
                f"images of different size {sorted(sizes)} cannot share a micro-batch: with "
                "image.mode keep_aspect set micro_batch to 1"
            )
        size = self._transforms[name].settings.size
        blank = np.zeros(sizes.pop() if sizes else (size, size, 3), dtype=np.uint8)
        rows = [blank if item is None else item.get(name, blank) for item in items]
        return torch.from_numpy(np.stack(rows))

    def _image_bytes(self, sample: Sample) -> bytes:
        for extension in self.settings.image_extensions:
            if extension in sample.members:
                return sample.members[extension]
        raise no_member(sample, self.settings.image_extensions)
