"""The `sampling` block of a recipe, and the stages that it plans."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from data_pipeline.settings import Settings
from pretrain.sampler.stages import Stage


class StageSettings(Settings):
    from_step: int = Field(ge=0)
    """First step of the stage; it lasts until the next one begins."""

    weights: dict[str, float]
    """Task -> weight, in place of `tasks.<name>.weight`; every task is named, 0 = off."""

    @model_validator(mode="after")
    def _someone_runs(self) -> Self:
        for name, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weights.{name}={weight} must be 0 or more, and finite")
        if not any(self.weights.values()):
            raise ValueError("weights: at least one task must have a weight above 0")
        return self


class SamplingSettings(Settings):
    """Which tasks run at which step, from the weights of the tasks."""

    mode: Literal["block", "iid", "mixed"] = "block"
    """block: one task per step, exact shares in every cycle of steps; iid: one task per step,
    drawn independently; mixed: every step runs all tasks, and weights are those of their losses."""

    alpha: float | None = Field(default=None, ge=0.0, le=2.0)
    """Multiply weights by (samples of the task's data) ** alpha; null = weights as they are."""

    stages: list[StageSettings] = Field(default=[])
    """Other weights from given steps on."""

    check_every_steps: int = Field(default=100, ge=1)
    """So often, and at the first step after a start, ranks compare what they run and load."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        starts = [stage.from_step for stage in self.stages]
        if starts != sorted(set(starts)):
            raise ValueError(f"stages: from_step must increase from stage to stage, not {starts}")
        return self


def plan_stages(
    settings: SamplingSettings, weights: Mapping[str, float], sizes: Mapping[str, int] | None = None
) -> list[Stage]:
    """Stages with their final weights, the first from step 0 on.

    Args:
        settings: the recipe's `sampling`.
        weights: task -> `tasks.<name>.weight`, in force before the first stage.
        sizes: task -> samples of its data; needed if `alpha` is set.

    Raises:
        ValueError: `alpha` is set and a size is missing.
    """
    factors = dict.fromkeys(weights, 1.0)
    if settings.alpha is not None:
        if missing := sorted(set(weights) - set(sizes or {})):
            raise ValueError(f"sampling.alpha needs the samples of {', '.join(missing)}")
        factors = {name: sizes[name] ** settings.alpha for name in weights}
    wanted = [(stage.from_step, stage.weights) for stage in settings.stages]
    if not wanted or wanted[0][0] > 0:
        wanted.insert(0, (0, weights))
    return [
        Stage(
            start,
            settings.mode,
            {
                # Powers may differ in the last digit between machines; that must not matter.
                name: float(f"{chosen[name] * factors[name]:.9g}")
                if settings.alpha
                else chosen[name]
                for name in sorted(chosen)
                if chosen[name] > 0
            },
        )
        for start, chosen in wanted
    ]


def problems(settings: SamplingSettings, tasks: list[str], steps: int, optimizer: str) -> list[str]:
    """Combinations of `sampling` with the rest of a recipe that cannot work, a line each."""
    found = []
    for number, stage in enumerate(settings.stages):
        where = f"sampling.stages[{number}]"
        if set(stage.weights) != set(tasks):
            found.append(
                f"{where}.weights must name every task ({', '.join(tasks)}), with 0 for one that "
                f"is off, not {', '.join(stage.weights) or 'none'}"
            )
        if stage.from_step >= steps:
            found.append(
                f"{where}.from_step={stage.from_step} never comes: steps={steps}; remove the stage "
                "or raise steps"
            )
    if settings.stages and settings.stages[0].from_step == 0:
        for name in tasks:
            if not any(stage.weights.get(name, 1.0) for stage in settings.stages):
                found.append(
                    f"sampling.stages: {name} is off in every stage, so its parameters would only "
                    f"decay: remove the task, or give it a weight"
                )
    if settings.mode == "mixed" and optimizer == "mt_adamw":
        found.append(
            "sampling.mode=mixed cannot go with optimizer.kind=mt_adamw, which normalises the "
            "gradient of one task: use sampling.mode=block or iid, or optimizer.kind=adamw"
        )
    return found


def offload_clashes(settings: SamplingSettings, engine: Mapping[str, Any]) -> list[str]:
    """Why mixed steps cannot run with the DeepSpeed JSON `engine`; empty if they can.

    With offloading, DeepSpeed keeps of a window of micro-steps only the gradients of parameters
    that the last one used: measured at 0.19.8 under ZeRO 2 and 3, and clearing stale partitions
    does not cure it. The heads of the other tasks would train on nothing, silently. ZeRO 1 was
    exact where it was tried; it is refused as well, because that was with every head in use.
    """
    zero = engine.get("zero_optimization", {})
    if settings.mode != "mixed":
        return []
    return [
        f"zero_optimization.{key}: DeepSpeed loses gradients of mixed steps with it (of parameters "
        "that the last micro-step does not use): remove it, or use sampling.mode=block or iid"
        for key in ("offload_optimizer", "offload_param")
        if (zero.get(key) or {}).get("device", "none") != "none"
    ]
