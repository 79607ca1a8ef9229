"""Random numbers that belong to an optimizer step, not to a sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.rng import keyed_u64
from pretrain.models.sample_draws import SampleDraws


@dataclass(frozen=True)
class StepDraws:
    """Draws of one step: the same on all ranks, in all micro-steps, when a forward pass is repeated
    and after a resume."""

    seed: int
    """The run's seed."""
    task: str
    step: int
    """Optimizer step, counted from 0."""

    def generator(self, purpose: str) -> torch.Generator:
        """Where numbers of this (seed, step, purpose) come from, anew with every call.

        For what selects modules or parameters: under ZeRO-3 ranks that disagree on it hang. Always
        a generator of the CPU, so that another device draws the same.
        """
        key = keyed_u64(self.seed, "step", self.step, purpose) >> 1
        return torch.Generator().manual_seed(key)

    def of_shared(self, index: Tensor) -> SampleDraws:
        """Draws of rows that belong to no sample (class names), as an encoder takes those of
        samples: keyed by (seed, task, step, "shared", index).

        index: (B,) int64, places in the set, -1 for padding rows.
        """
        seed = keyed_u64(self.seed, self.task, self.step, "shared")
        return SampleDraws(seed, self.task, index)
