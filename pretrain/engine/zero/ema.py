"""Averaged weights as fp32 partitions beside the master weights: P/N memory, no communication."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from pretrain.engine.zero.partitions import list_partitions, push_masters_to_module
from pretrain.optim.ema import EmaSettings, decay_at


class Ema:
    """The average of this rank's master weights, which it starts from.

    Frozen parameters have no master and are their own average; a tied one is averaged once.

    Attributes:
        tensors: one for each of `list_partitions(engine)`, in its order, shape and device.

    Raises:
        ValueError: DeepSpeed keeps the master weights on disk.
    """

    def __init__(self, engine, settings: EmaSettings) -> None:
        if getattr(engine.optimizer, "swap_optimizer", False):
            raise ValueError(
                "ema needs the master weights in memory: set ema=null, or take DeepSpeed settings "
                "without NVMe offload"
            )
        self.engine = engine
        self.settings = settings
        self._masters = [partition.master for partition in list_partitions(engine)]
        self.tensors: list[Tensor] = [master.detach().clone() for master in self._masters]

    @torch.no_grad()
    def update(self, update: int) -> None:
        """Take the master weights in after optimizer step number `update` that was applied."""
        weight = 1.0 - decay_at(update, self.settings)
        torch._foreach_lerp_(self.tensors, [master.data for master in self._masters], weight)

    @contextlib.contextmanager
    def in_module(self) -> Iterator[None]:
        """Within, the module has the averaged weights. A collective; the masters are untouched.

        Afterwards it has its own again, bit for bit: they are a function of the masters.
        """
        self._exchange()
        try:
            push_masters_to_module(self.engine)
            yield
        finally:
            self._exchange()
            push_masters_to_module(self.engine)

    def _exchange(self) -> None:
        """Let masters and averages change places without copying either."""
        for index, master in enumerate(self._masters):
            master.data, self.tensors[index] = self.tensors[index], master.data
