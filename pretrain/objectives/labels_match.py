"""Between which texts a class makes a match."""

from __future__ import annotations

from typing import Literal

LabelsMatch = Literal["prompts", "always", "never"]
"""Between which texts a class makes a match: those that were made from class names, all, none."""
