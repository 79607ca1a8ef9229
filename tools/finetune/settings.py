"""What `key=value` on the command line may say."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from data_pipeline.settings import Settings
from pretrain.recipe.overlay import merge, parse_override


class FinetuneSettings(Settings):
    """How a model is fine-tuned."""

    epochs: int = Field(default=20, ge=1)
    """Passes over the data; the learning rate falls to 0 by a cosine within them."""
    batch: int = Field(default=64, ge=2)
    """Samples per optimizer step over all processes; even. More than the data have become fewer,
    which is said."""
    micro_batch: int | None = Field(default=None, ge=2)
    """Most samples per forward pass of a process, even; null: its share of the batch."""
    lr: float = Field(default=5e-4, gt=0.0)
    """Peak learning rate of AdamW."""
    head_lr: float = Field(default=1.0, gt=0.0)
    """Factor on `lr` for the new classification head."""
    layer_decay: float = Field(default=0.75, gt=0.0, le=1.0)
    """Factor on the learning rate from each layer to the one before it; 1: none."""
    weight_decay: float = Field(default=0.05, ge=0.0)
    """Of matrices; vectors never decay."""
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps in which the learning rate rises from 0."""
    clip_norm: float = Field(default=1.0, gt=0.0)
    """Gradient norm above which gradients are scaled down."""
    label_smoothing: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the target spread evenly over all classes, or words of the vocabulary."""
    mixup: float = Field(default=0.0, ge=0.0)
    """Alpha of mixup, `classify` only; 0: none. 0.8 is usual for long trainings."""
    cutmix: float = Field(default=0.0, ge=0.0)
    """Alpha of CutMix, likewise; 1.0 is usual."""
    ema: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Decay of the moving average of the weights, which is then what is evaluated and written; 0:
    none. 0.9998 for tens of thousands of steps, 0.99 for hundreds."""
    holdout: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the data that is kept for evaluation where there is no --test."""
    evaluate_epochs: int = Field(default=1, ge=1)
    """Evaluate after so many epochs, and after the last."""
    save_steps: int = Field(default=100, ge=1)
    """Write a checkpoint after so many steps."""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """Of the forward pass; auto: bf16 on GPUs, float32 elsewhere."""
    seed: int = Field(default=0, ge=0)
    """Of the new head, the order of the data, augmentation, and the choice of --per-class."""
    workers: int = Field(default=2, ge=0)
    """Processes that read images, for each process; 0: none."""
    image: dict[str, Any] = Field(default_factory=dict)
    """Changes of how images are prepared in training, as `data.image` of a recipe:
    image.flip_probability=0.5, image.rand_augment={...}. By default random crops of at least half
    of the image, without flips."""


def read_settings(words: Sequence[str], **defaults: Any) -> FinetuneSettings:
    """The settings that `key=value` words give; defaults: of the kind of task.

    Raises ValueError with the key: unknown, or a value that it cannot have.
    """
    data: dict[str, Any] = {}
    for word in words:
        layer = parse_override(word)
        if layer.data.keys() - FinetuneSettings.model_fields.keys():
            (name,) = layer.data
            raise ValueError(f"{name}: no such setting; there are {_names()}")
        base = parse_override("image={}")
        base = type(base)(data, base.written)
        data = merge(base, layer).data
    try:
        found = FinetuneSettings.model_validate({**defaults, **data})
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
    for name in ("batch", "micro_batch"):
        if (getattr(found, name) or 2) % 2:
            raise ValueError(f"{name}={getattr(found, name)}: must be even: neighbours are mixed")
    return found


def _names() -> str:
    return ", ".join(FinetuneSettings.model_fields)
