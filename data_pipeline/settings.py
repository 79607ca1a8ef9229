"""Base class of every settings model in the project.

A component declares its settings in its own file, next to the code they configure, and takes plain
arguments itself; `pretrain.recipe.recipe` only assembles the settings into one schema.
"""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Immutable, typed, and strict: an unknown key is an error, never ignored.

    The docstring under a field is its documentation (`python -m pretrain show --fields`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
