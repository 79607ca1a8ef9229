"""What is logged of a step."""

from dataclasses import dataclass


@dataclass
class StepReport:
    """One task's part of a step as it is logged: `metrics` are global values of the task (its loss
    without its weight; None where nothing was counted) and of the step, `seconds` this rank's times
    for the whole step."""

    task: str
    metrics: dict[str, float | None]
    seconds: dict[str, float]
