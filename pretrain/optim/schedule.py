"""Learning-rate schedules: pure functions of the step, so that a resume needs no state."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from data_pipeline.settings import Settings


class ScheduleSettings(Settings):
    kind: Literal["cosine", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """Shape after the warm-up: `cosine` falls to `final_ratio` at the end of the run, `constant`
    stays at the peak, `inverse_sqrt` falls as 1/sqrt(step), never below `final_ratio`; `wsd`
    (warm-up, stable, decay) stays at the peak and falls to `final_ratio` in its last `decay_steps`,
    so that a run can be made longer from any checkpoint of its stable phase."""

    warmup_steps: int = Field(default=500, ge=0)
    """Linear warm-up: step 0 runs at peak/(warmup_steps + 1), step `warmup_steps` is the first at
    the peak. 0 = start at the peak."""

    final_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Lowest learning rate after the warm-up, as a share of the peak."""

    decay_steps: int | None = Field(default=None, ge=1)
    """With kind=wsd: so many steps at the end of the run fall in a straight line to `final_ratio`;
    null = a tenth of `steps`."""

    @model_validator(mode="after")
    def _fields_have_an_effect(self) -> Self:
        if self.kind != "wsd" and self.decay_steps is not None:
            raise ValueError(
                f"decay_steps={self.decay_steps} belongs to kind=wsd, not kind={self.kind}: "
                "set decay_steps=null"
            )
        if self.kind == "constant" and self.final_ratio not in (0.0, 1.0):
            raise ValueError(
                f"final_ratio={self.final_ratio} has no effect with kind=constant: "
                "remove it, or choose kind=cosine or kind=inverse_sqrt"
            )
        return self

    def decay_length(self, total_steps: int) -> int:
        """Steps of the decay of kind `wsd` in a run of `total_steps`."""
        return self.decay_steps or max(1, total_steps // 10)


def problems(settings: ScheduleSettings, steps: int) -> list[str]:
    """One line for phases that do not fit into a run of `steps`."""
    warmup, decay = settings.warmup_steps, settings.decay_length(steps)
    if warmup >= steps:
        return [
            f"schedule.warmup_steps={warmup} must be smaller than steps={steps}: lower warmup_steps"
        ]
    if settings.kind == "wsd" and warmup + decay > steps:
        return [
            f"schedule.warmup_steps={warmup} and the {decay} steps of the decay "
            f"(schedule.decay_steps) do not fit into steps={steps}: lower one of them"
        ]
    return []


def lr_factor(step: int, settings: ScheduleSettings, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (counted from 0) as a share of the peak, in [0, 1].

    `total_steps` is the length of the run; `cosine` and `wsd` would reach `final_ratio` exactly at
    `step == total_steps`, so that the last real step still learns; later steps keep that value.
    Raises ValueError for a negative step or a warm-up that does not fit into the run.
    """
    warmup = settings.warmup_steps
    if step < 0:
        raise ValueError(f"step must be 0 or more, not {step}")
    if warmup >= total_steps:
        raise ValueError(f"warmup_steps={warmup} must be smaller than the {total_steps} steps")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.kind == "constant":
        return 1.0
    if settings.kind == "inverse_sqrt":
        return max(settings.final_ratio, math.sqrt((warmup + 1) / (step + 1)))
    if settings.kind == "wsd":
        decay = settings.decay_length(total_steps)
        left = min(1.0, max(0, total_steps - step) / decay)
        return settings.final_ratio + (1.0 - settings.final_ratio) * left
    progress = min(1.0, (step - warmup) / (total_steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.final_ratio + (1.0 - settings.final_ratio) * cosine
