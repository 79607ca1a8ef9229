"""The ways to one vector per image."""

from __future__ import annotations

from typing import Literal

Pool = Literal["mean", "class_token", "head"]
