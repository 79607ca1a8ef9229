"""Which implementation computes a deformable operator.

`torch` runs everywhere. An operator takes the name of a backend, or `auto`: the fastest that the
device of its tensors has. The environment variable OMNIPRETRAIN_OPERATORS says what `auto` means.
"""

import os
from collections.abc import Callable, Mapping

import torch

VARIABLE = "OMNIPRETRAIN_OPERATORS"
AUTO = "auto"


def choose(requested: str, device: torch.device, usable: Mapping[str, Callable[[], bool]]) -> str:
    """Name of the backend to take on `device`.

    `usable` has the backends of this device, fastest first, each with a test whether it works here.

    Errors: ValueError for a backend that the device does not have, RuntimeError for one that does
    not work here.
    """
    source = "backend"
    if requested == AUTO:
        requested, source = os.environ.get(VARIABLE, AUTO), VARIABLE
    if requested == AUTO:
        return next(name for name, works in usable.items() if works())
    if requested not in usable:
        names = ", ".join((AUTO, *usable))
        raise ValueError(f"{source}={requested!r}: on {device.type} there are {names}")
    if not usable[requested]():
        raise RuntimeError(f"{source}={requested!r} does not work on this machine; the log says "
                           f"why. {AUTO!r} takes the next best one")
    return requested
