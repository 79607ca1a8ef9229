"""What can be said of patterns over parameter names before there is a model."""

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.recipe.recipe import Recipe


def check_patterns(recipe: "Recipe") -> list[str]:
    """Patterns that begin with a part of the model that the recipe does not have.

    The rest is told when the model is built (`models.parameter_names.require_matches`).
    """
    parts = {f"encoders.{name}" for name in recipe.model.encoders}
    parts |= {f"objectives.{name}" for name in recipe.tasks}
    found = []
    for field in ("frozen", "no_decay", "lr_multipliers"):
        for pattern in getattr(recipe.optimizer, field):
            start = re.match(r"((?:encoders|objectives)\.[^.*?\[\]]+)\.", pattern)
            if start is None or start[1] in parts:
                continue
            near = get_close_matches(start[1], sorted(parts), n=1, cutoff=0.0)
            found.append(
                f"optimizer.{field}: pattern {pattern!r} matches no parameter: there is no "
                f"{start[1]}; did you mean {near[0]!r}?"
            )
    return found
