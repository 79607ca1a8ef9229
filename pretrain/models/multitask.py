"""One module with every encoder and objective of a run, so that one engine trains them all."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pretrain.models.frozen import rest_frozen
from pretrain.models.sample_draws import SampleDraws


class MultiTaskModel(nn.Module):
    """Named encoders shared by the objectives of the tasks.

    Args:
        encoders: name -> module that turns images (B, 3, H, W) into tokens (B, N, D), or texts
            (B, T) into features (B, D).
        objectives: task name -> module with `forward(encoders, batch, totals)`; it owns the heads
            that only its task uses.
        seed: of the run, for the random numbers of samples.
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
        self, task: str, batch: Mapping, totals: Mapping[str, torch.Tensor], **options: Any
    ) -> dict[str, torch.Tensor]:
        """Loss and metrics of one micro-batch of `task`, each as its share of the global batch.

        Args:
            batch: what the task's loader gives, tensors on the model's device; objectives find the
                random numbers of its samples under "draws".
            totals: the objective's counts, summed over the global batch.
            options: for the objective; `part="features"` asks one that couples samples for its
                features (`pretrain.engine.cached_features`), `number` and `carried` one with
                several passes for one of them (`pretrain.engine.zero`).

        Returns:
            name -> 0-dim float32 tensor, "loss" with a graph; summed over all micro-steps and ranks
            each is the value for the global batch.
        """
        if "position" in batch:
            batch = {**batch, "draws": SampleDraws(self.seed, task, batch["position"])}
        return self.objectives[task](self.encoders, batch, totals, **options)
