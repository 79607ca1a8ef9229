"""Settings of losses weighed by their gradients, which need no torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from data_pipeline.settings import Settings


class BalanceSettings(Settings):
    """Loss weights by gradient norms; needs the batch of a rank in one micro-step."""

    every_steps: int = Field(20, ge=1)
    """Steps from one measurement to the next."""
    smoothing: float = Field(0.9, ge=0, lt=1)
    """Share of the old norm that a measurement leaves in place."""
    limits: tuple[float, float] = (0.1, 10.0)
    """Bounds of the factor on a loss weight."""

    @model_validator(mode="after")
    def _check(self) -> BalanceSettings:
        low, high = self.limits
        if not 0 < low <= 1 <= high:
            raise ValueError(f"limits: needs 0 < low <= 1 <= high, got {list(self.limits)}")
        return self
