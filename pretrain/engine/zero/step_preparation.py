"""What the optimizer must know of a step before it: its task, and the share of steps it has."""

from collections.abc import Callable, Mapping

from pretrain.engine.zero.gradient_norm import hand_over_gradient_norm, set_clip_norm
from pretrain.optim.groups import OptimizerSettings
from pretrain.optim.mt_adamw import MTAdamW


class StepPreparation:
    """Prepares each optimizer step for its task: MT-AdamW's scales, or the task's own clipping.

    Args:
        engine: DeepSpeed engine, ZeRO 1, 2 or 3.
        settings: the optimizer's.
        ratios: step -> {task: share of the steps that the sampler gives it at that step}.
    """

    def __init__(
        self,
        engine,
        settings: OptimizerSettings,
        ratios: Callable[[int], Mapping[str, float]],
    ) -> None:
        self.zero = engine.optimizer
        self.settings = settings
        self.ratios = ratios
        inner = self.zero.optimizer
        self.mt_adamw = inner if isinstance(inner, MTAdamW) else None
        if self.mt_adamw is not None:
            hand_over_gradient_norm(self.zero, self._note_norm)

    def before_step(self, step: int, task: str) -> None:
        """Tell the optimizer that step `step` (from 0) runs `task`."""
        if self.mt_adamw is not None:
            self.mt_adamw.begin_step(task, self.ratios(step)[task])
        elif self.settings.task_clip_norms:
            own = self.settings.task_clip_norms
            set_clip_norm(self.zero, own.get(task, self.settings.clip_norm))

    def _note_norm(self, norm) -> None:
        self.mt_adamw.gradient_norm = norm
