"""One module with every encoder and objective of a run, so that one engine trains them all."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pretrain.models.frozen import rest_frozen
from pretrain.models.sample_draws import SampleDraws
from pretrain.models.step_draws import StepDraws


class MultiTaskModel(nn.Module):
    """Named encoders shared by the objectives of the tasks.

    Args:
        encoders: name -> module that turns images (B, 3, H, W) into tokens (B, N, D), or texts
            (B, T) into features (B, D).
        objectives: task name -> `pretrain.objectives.objective.Objective`; it owns the heads that
            only its task uses.
        seed: of the run, for random numbers.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        objectives: Mapping[str, nn.Module],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.seed = seed
        self.encoders = nn.ModuleDict(encoders)
        self.objectives = nn.ModuleDict(objectives)

    def train(self, mode: bool = True) -> "MultiTaskModel":
        """As torch's, but what `optimizer.frozen` keeps as it is stays in evaluation mode."""
        super().train(mode)
        rest_frozen(self)
        return self

    def forward(
        self, task: str, part: str, *arguments: Any, step: int = 0
    ) -> dict[str, torch.Tensor]:
        """One part of a task's objective: what its method of that name returns.

        `model(task, "undivided", batch, totals)` is the loss and the metrics of a whole batch.

        Args:
            arguments: of that method behind the modules. The first, a batch with tensors on the
                model's device, is given the random numbers of its samples and of the step; "shared"
                has none, and is given those of the step.
            step: optimizer step, counted from 0.
        """
        draws = StepDraws(self.seed, task, step)
        if part == "shared":
            return self.objectives[task](self.encoders, part, draws)
        batch, *others = arguments
        batch = {**batch, "step_draws": draws}
        if "position" in batch:
            batch["draws"] = SampleDraws(self.seed, task, batch["position"])
        return self.objectives[task](self.encoders, part, batch, *others)
