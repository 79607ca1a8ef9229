"""Patterns over parameter names, as the settings of the optimizer have them. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def aliases(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Every distinct parameter with all the names under which the model holds it."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(found.values())


def matches(names: Sequence[str], pattern: str) -> bool:
    """Whether one of a parameter's names matches; `*` also matches dots."""
    return any(fnmatchcase(name, pattern) for name in names)


def require_matches(
    setting: str, patterns: Sequence[str], names: Sequence[str], frozen: Sequence[str] = ()
) -> None:
    """Raise ValueError for a pattern that matches none of the names of trained parameters.

    frozen: names that `optimizer.frozen` has taken away, to say so.
    """
    for pattern in patterns:
        if matches(names, pattern):
            continue
        if matches(frozen, pattern):
            raise ValueError(
                f"optimizer.{setting}: pattern {pattern!r} matches frozen parameters only "
                f"(optimizer.frozen), where it does nothing: remove it"
            )
        near = get_close_matches(pattern.replace("*", ""), names, n=1, cutoff=0.0)
        example = f"; the nearest name is {near[0]}" if near else ""
        raise ValueError(
            f"optimizer.{setting}: pattern {pattern!r} matches no trained parameter{example}"
        )
