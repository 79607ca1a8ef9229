"""Exponential moving average of the weights: settings, and the decay of each update."""

from pydantic import Field

from data_pipeline.settings import Settings


class EmaSettings(Settings):
    decay: float = Field(default=0.9999, ge=0.0, lt=1.0)
    """Share of the average that an optimizer step leaves in place; the average looks back over
    about 1 / (1 - decay) steps."""

    warmup: bool = True
    """Begin with a smaller decay, at most (1 + t) / (10 + t) at update t (from 0), so that the
    first weights are soon forgotten."""

    evaluate: bool = True
    """Evaluate with the averaged weights instead of those in training."""


def decay_at(update: int, settings: EmaSettings) -> float:
    """Decay of update number `update`, counted from 0: a pure function, so it needs no state."""
    if not settings.warmup:
        return settings.decay
    return min(settings.decay, (1 + update) / (10 + update))
