"""A few numbers of the host as a tensor of the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """The values, (n,) in torch's default type for them, without a wait.

    `torch.tensor(values, device=...)` copies from memory that is not page-locked, and so lets the
    host wait until a GPU has done all that it was given: in the middle of a forward pass the GPU
    then idles until the host has caught up. Asked not to block, the driver takes the few bytes at
    once.
    """
    return torch.tensor(values, device="cpu").to(device, non_blocking=True)
