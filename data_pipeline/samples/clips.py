"""Clips: some frames of a sample in place of one image, all of them seen in the same way.

The frames of a sample are its members f000.jpg, f001.jpg, ..., as `make_shards frames` packs them.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.images.decode import DecodeError
from data_pipeline.images.transforms import make_views
from data_pipeline.reading.reader import BadSample, Sample
from data_pipeline.samples.captions import CaptionDataSettings, CaptionProcessor
from data_pipeline.samples.members import bad
from data_pipeline.samples.sample_processor import Item, RngFor
from data_pipeline.samples.tokenizer import Tokenizer
from data_pipeline.timing import StageClock

MOST_FRAMES = 1000
"""Of a sample: their numbers have three digits."""

_FRAME = re.compile(r"f\d{3}\.\w+")


class ClipProcessor(CaptionProcessor):
    """As `CaptionProcessor`, with `frames` frames of each sample where it has an image."""

    def __init__(self, settings: CaptionDataSettings, tokenizer: Tokenizer, train: bool) -> None:
        super().__init__(settings, tokenizer, train)
        self.frames = settings.frames
        self._extensions = self.texts.extensions | {
            f"f{number:03d}.{extension}"
            for number in range(MOST_FRAMES)
            for extension in settings.image_extensions
        }

    @property
    def extensions(self) -> frozenset[str]:
        """Members that are needed: all frames, since which ones is drawn when they are counted."""
        return self._extensions

    def buffers(self, count: int) -> dict[str, tuple[int, ...]]:
        """As `ImageProcessor.buffers`; all frames of a batch."""
        (shape,) = super().buffers(count).values()
        return {"images": (shape[0], self.frames, *shape[1:])}

    def load_image(
        self,
        sample: Sample,
        rng_for: RngFor,
        out: dict[str, np.ndarray] | None,
        clock: StageClock | None,
    ) -> Item:
        """Decode and augment frames of the sample: one crop, one flip, the same colours for all.

        Arguments as `ImageProcessor.load_image`.

        Returns:
            images (F, H, W, 3) uint8, in the order of time; a frame of a clip that has fewer stands
            there several times.

        Raises:
            BadSample: no frames, frames of different size, or one that cannot be decoded.
        """
        names = sorted(name for name in sample.members if _FRAME.fullmatch(name))
        if not names:
            raise bad(sample, "has no frames (members f000.jpg, f001.jpg, ...)")
        places = choose_frames(len(names), self.frames, rng_for("frames") if self.train else None)
        transform = self._transforms["images"]
        size = transform.settings.size
        clip = np.empty((self.frames, size, size, 3), np.uint8) if out is None else out["images"]
        sizes = set()
        for row, place in zip(clip, places.tolist(), strict=True):
            # A generator anew: every frame meets the same draws.
            rng = rng_for("image") if self.train else None
            try:
                (view,) = make_views(sample.members[names[place]], [transform], [rng], [row], clock)
            except DecodeError as error:
                raise bad(sample, f"frame {names[place]}: {error}", BadSample) from error
            sizes.add(view.source)
        if len(sizes) > 1:
            raise bad(sample, f"has frames of different size: {sorted(sizes)} (height, width)")
        return {"images": clip}

    def stack_images(
        self,
        items: Sequence[Item | None],
        buffers: dict[str, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """The clips of a batch: images (B, F, 3, H, W) uint8, zeros in padding rows."""
        size = self._transforms["images"].settings.size
        shape = (len(items), self.frames, size, size, 3)
        clips = buffers["images"] if buffers else torch.empty(shape, dtype=torch.uint8)
        for row, item in enumerate(items):
            if item is None:
                clips[row].zero_()
            elif not buffers:
                clips[row] = torch.from_numpy(item["images"])
        return {"images": clips.permute(0, 1, 4, 2, 3)}


def choose_frames(there: int, wanted: int, rng: np.random.Generator | None) -> np.ndarray:
    """Which of the frames 0 .. `there` - 1 stand for a clip: one of each of `wanted` equal parts.

    rng: draws the one of each part; none: the middle of each.

    Returns: (wanted,) int64, in order; all different unless `there` < `wanted`.
    """
    parts = np.arange(wanted)
    if rng is None:
        return (2 * parts + 1) * there // (2 * wanted)
    first, behind = parts * there // wanted, (parts + 1) * there // wanted
    within = rng.random(wanted) * np.maximum(behind - first, 1)
    return first + within.astype(np.int64)
