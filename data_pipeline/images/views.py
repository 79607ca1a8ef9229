"""Two views of one image: what a batch says of where they were cut and what was done to them.

A point (x, y) of the upright image is seen in view v with crop (x0, y0, x1, y1) of W x H pixels at
u = (x - x0) W / (x1 - x0), or W minus that if the view is flipped, and v = (y - y0) H / (y1 - y0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.images.transforms import ImageSettings, View

if TYPE_CHECKING:
    import torch

VIEWS = 2

# What stands in padding rows, and for a view that was not made: harmless where a loss divides by
# it, or takes its logarithm.
_BLANK = {
    "crops": np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (VIEWS, 1)),
    "flips": np.zeros(VIEWS, dtype=bool),
    "colours": np.tile(np.float32([1, 1, 1, 0, 0, 0, 0]), (VIEWS, 1)),
    "image_sizes": np.ones(2, dtype=np.int64),
}


def check_views(first: ImageSettings, second: ImageSettings) -> None:
    """Raise ValueError for settings that cannot be two views of one image."""
    for name, settings in (("image", first), ("second_view", second)):
        if not settings.fixed_size:
            raise ValueError(
                f"{name}.mode {settings.mode} gives images of different sizes, which cannot be one "
                "of two views: choose another mode, or remove second_view"
            )
        if settings.rand_augment is not None and settings.rand_augment.geometry:
            raise ValueError(
                f"{name}.rand_augment moves pixels, so that the crops of two views would not tell "
                "where they are: set its geometry to false"
            )
    if (first.mean, first.std) != (second.mean, second.std):
        raise ValueError(
            "second_view.mean and .std differ from those of image, by which the device normalises "
            "both views: make them equal"
        )


def describe_views(views: Sequence[View]) -> dict[str, np.ndarray]:
    """What `collate_views` needs of both views of one image, or of the first if it is alone."""
    made = {
        "crops": np.array([view.geometry.crop for view in views]),
        "flips": np.array([view.geometry.flip for view in views]),
        "colours": np.array([view.colours for view in views], dtype=np.float32),
    }
    described = {
        name: np.concatenate([known, _BLANK[name][len(views) :]]) for name, known in made.items()
    }
    return described | {"image_sizes": np.array(views[0].source)}


def collate_views(items: Sequence[dict[str, Any] | None]) -> dict[str, torch.Tensor]:
    """Geometry and colours of a batch of two views each; None stands for a padding row.

    Returns:
        crops (B, 2, 4) float64: x0, y0, x1, y1 of each view in pixels of the upright image;
        flips (B, 2) bool: mirrored left to right, after cropping; colours (B, 2, 7) float32: the
        fields of `colours.Colours`; image_sizes (B, 2) int64: height and width of the upright
        image. Padding rows: the whole of an image of 1 x 1; the same crop for a view that was not
        made.
    """
    import torch

    return {
        name: torch.from_numpy(np.stack([blank if item is None else item[name] for item in items]))
        for name, blank in _BLANK.items()
    }
