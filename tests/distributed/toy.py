"""The parity matrix's model with a single task, and its batches."""

import torch

from pretrain.models.multitask import MultiTaskModel
from tools.selfcheck.parity_model import SAMPLES, TASKS, Head, Trunk, parity_batch, share_of

__all__ = ["SAMPLES", "ToyEncoder", "ToyObjective", "share_of", "toy_batch", "toy_model"]

ToyEncoder = Trunk


class ToyObjective(Head):
    """The head whose output is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__(tied=True)


def toy_model() -> MultiTaskModel:
    return MultiTaskModel({"image": ToyEncoder()}, {TASKS[0]: ToyObjective()})


def toy_batch(step: int, poison: bool = False) -> dict[str, torch.Tensor]:
    """The global batch of a step: SAMPLES samples, one of them padding; tensors alone."""
    batch = parity_batch(step)
    del batch["late_share"]
    if poison:
        batch["images"][(step + 1) % SAMPLES] = float("nan")
    return batch
