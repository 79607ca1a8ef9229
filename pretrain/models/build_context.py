"""What settings are told when they build a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pretrain.models.encoder import Encoder


class Words(Protocol):
    """What a module needs to know of a tokenizer."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True)
class BuildContext:
    """Plain things, so that a notebook can make one; what is not there is None or empty."""

    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    """Name -> module of `model.encoders`: for one of them those above it, for objectives all."""
    vocabulary: Words | None = None
    """The tokenizer of the run."""
    image_mean: Sequence[float] = ()
    """Of the task's images, per channel, in units of the full range; so is `image_std`."""
    image_std: Sequence[float] = ()
    classes: int | None = None
    """Classes of the task's data."""
    class_names: Sequence[str] = ()
    """Their names, in the order of their numbers, if the data have them."""
    smaller_views: Sequence[int] = ()
    """Sizes in pixels of further views of each image."""
    new_encoder: Callable[[str], Encoder] | None = None
    """Name -> one more encoder like that of images, without drop path: for a target."""
