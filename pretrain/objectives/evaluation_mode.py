"""What every objective's evaluation needs: eval mode for a while, and values of all ranks."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

Gather = Callable[[Any], list[Any]]
"""One value per rank -> the values of all ranks in rank order, on every rank."""


def alone(value: Any) -> list[Any]:
    """The `Gather` of a single process."""
    return [value]


def mean(total: float, count: float) -> float | None:
    """A mean of an evaluation; None if nothing was counted, which is no 0."""
    return total / count if count else None


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into eval mode, and those that were training back afterwards."""
    training = [module for root in modules for module in root.modules() if module.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
