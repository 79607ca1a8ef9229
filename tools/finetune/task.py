"""What the loop learns: a model, its data, its loss, and how it is judged."""

from collections.abc import Mapping
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from data_pipeline.loader.loader import TaskStream


class Task(Protocol):
    """What is learned."""

    model: nn.Module
    stream: TaskStream

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups with `lr` and `weight_decay`."""

    def count(self, batch: Mapping[str, Any]) -> int:
        """How many answers a batch has."""

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Loss summed over these answers; 0-dim float32."""

    def probe_batch(self) -> dict[str, Tensor]:
        """A batch of blank images, to see which parameters the loss reaches."""

    def evaluate(self, accelerator: Accelerator) -> dict[str, float]:
        """Metrics of the held-out data, the same on every process."""
