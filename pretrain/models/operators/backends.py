"""Which implementation computes a deformable operator.

`torch` runs everywhere, `cpp` on the CPU. An operator takes the name of a backend, or `auto`: the
fastest one that works where its tensors are. The environment variable OMNIPRETRAIN_OPERATORS says
what `auto` means.
"""

import os
from types import ModuleType

import torch

from pretrain.models.operators import cpu_library

VARIABLE = "OMNIPRETRAIN_OPERATORS"
AUTO = "auto"


def choose(requested: str, device: torch.device, backends: dict[str, ModuleType]) -> ModuleType:
    """The implementation to take on `device` among those of an operator, `backends` by name.

    Errors: ValueError for a name that the device does not have, RuntimeError for a backend that
    does not work here.
    """
    source = "backend"
    if requested == AUTO:
        requested, source = os.environ.get(VARIABLE, AUTO), VARIABLE
    # Fastest first; each with what keeps it from working, if anything does.
    obstacles = {"cpp": cpu_library.missing} if device.type == "cpu" else {}
    obstacles["torch"] = lambda: None
    if requested == AUTO:
        return next(backends[name] for name, obstacle in obstacles.items() if obstacle() is None)
    if requested not in obstacles:
        names = ", ".join((AUTO, *obstacles))
        raise ValueError(f"{source}={requested!r}: on {device.type} there are {names}")
    reason = obstacles[requested]()
    if reason is not None:
        raise RuntimeError(f"{source}={requested!r} does not work here: {reason}")
    return backends[requested]
