"""Which implementation computes a deformable operator.

`torch` runs everywhere, `cpp` on the CPU, `triton` on GPUs (and, for tests, in Triton's interpreter
on the CPU). An operator takes the name of a backend, or `auto`: the fastest one that works where
its tensors are. The environment variable OMNIPRETRAIN_OPERATORS says what `auto` means.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from types import ModuleType

import torch

from pretrain.models.operators import cpu_library

VARIABLE = "OMNIPRETRAIN_OPERATORS"
AUTO = "auto"

_log = logging.getLogger("omnipretrain.operators")


def choose(requested: str, device: torch.device, backends: Mapping[str, str]) -> ModuleType:
    """The implementation to take on `device`; `backends` maps names to modules of this folder.

    Errors: ValueError for a name that the device does not have, RuntimeError for a backend that
    does not work here.
    """
    source = "backend"
    if requested == AUTO:
        requested, source = os.environ.get(VARIABLE, AUTO), VARIABLE
    # Fastest first; each with what keeps it from working, if anything does.
    obstacles = _obstacles(device.type)
    if requested == AUTO:
        return _module(next(backends[name] for name, found in obstacles.items() if found() is None))
    if requested not in obstacles:
        names = ", ".join((AUTO, *obstacles))
        raise ValueError(f"{source}={requested!r}: on {device.type} there are {names}")
    reason = obstacles[requested]()
    if reason is not None:
        raise RuntimeError(f"{source}={requested!r} does not work here: {reason}")
    return _module(backends[requested])


def _obstacles(device: str) -> dict[str, Callable[[], str | None]]:
    torch_works = {"torch": lambda: None}
    if device == "cpu":
        return {"cpp": cpu_library.missing, **torch_works, "triton": _interpreter_missing}
    if device == "cuda":
        return {"triton": _triton_missing, **torch_works}
    return torch_works


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"pretrain.models.operators.{name}")


@functools.cache
def _triton_missing() -> str | None:
    """None, or why there is no Triton; said once in the log, since it costs a lot of speed."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        _log.warning(
            "no Triton kernels, plain PyTorch computes the operators, many times slower: %s. "
            "Install it with `pip install triton`",
            error,
        )
        return str(error)
    return None


def _interpreter_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton's interpreter is off (TRITON_INTERPRET=1 switches it on; it is for tests)"
    return None
