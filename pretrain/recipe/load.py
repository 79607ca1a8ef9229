"""From files and overrides to a recipe: merged, checked, its paths absolute."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pretrain.recipe.checks import problems
from pretrain.recipe.former_keys import without_former
from pretrain.recipe.overlay import (
    Layer,
    RecipeError,
    expand_variables,
    find_recipe,
    map_strings,
    merge,
    parse_override,
    parse_yaml,
    read_recipe_layers,
)
from pretrain.recipe.recipe import DATA_TYPES, Recipe
from pretrain.recipe.schema import allows_none, choose_class, entries_of, error_lines, located

SHIPPED = Path(__file__).parent.parent / "recipes"

_PATHS = (
    "run_dir",
    "initial_weights",
    "tokenizer.path",
    "tasks.*.data.shards",
    "tasks.*.data.sources.*.shards",
    "tasks.*.data.stream.shards",
    "tasks.*.evaluation.shards",
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load, overlay and validate a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe.
        overrides: `key.path=value` texts, applied in order; values are YAML.

    Raises:
        RecipeError: with one line per fault.
    """
    return validate(load_layers(path, overrides))


def load_layers(path: str | Path, overrides: Sequence[str] = ()) -> Layer:
    """A recipe as plain data: merged, variables expanded, paths absolute; not yet validated."""
    file = find_recipe(str(path), Path(), SHIPPED)
    layer = read_recipe_layers(file, SHIPPED)
    for override in overrides:
        layer = merge(layer, parse_override(override))
    layer = expand_variables(layer)
    data = _without_removed(_with_types(layer.data), Recipe)
    if "run_dir" not in data and isinstance(data.get("name"), str):
        data["run_dir"] = os.path.join("runs", data["name"])
    return Layer(_absolute_paths(data), layer.written)


def load_resolved(path: str | Path) -> Recipe:
    """Load what `Recipe.dump` wrote: complete, nothing below it, nothing to expand."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    return validate(parse_yaml(text, str(path)))


def validate(layer: Layer) -> Recipe:
    """Plain data -> recipe. Types are strict: `true` is no number and `"10"` is text."""
    layer = without_former(layer)
    try:
        recipe = Recipe.model_validate_json(json.dumps(_with_types(layer.data)), strict=True)
    except ValidationError as error:
        raise RecipeError("\n".join(error_lines(error, Recipe, layer))) from None
    if found := problems(recipe):
        raise RecipeError("\n".join(located(found, layer)))
    return recipe


def _with_types(data: dict[str, Any]) -> dict[str, Any]:
    """Fill in each `type` that goes without saying: a task's data have that which its objective
    reads, and an encoder is a vision transformer."""
    model, tasks = data.get("model"), data.get("tasks")
    data = dict(data)
    if isinstance(model, dict) and isinstance(encoders := model.get("encoders"), dict):
        filled = {name: _with_type(block, "vit") for name, block in encoders.items()}
        data["model"] = {**model, "encoders": filled}
    if isinstance(tasks, dict):
        data["tasks"] = {name: _task_with_type(task) for name, task in tasks.items()}
    return data


def _task_with_type(task: Any) -> Any:
    if not isinstance(task, dict) or "data" not in task:
        return task
    objective = task.get("objective")
    kind = objective.get("type") if isinstance(objective, dict) else None
    reads = DATA_TYPES.get(str(kind), "captions")
    return {**task, "data": _with_type(task["data"], reads)}


def _with_type(block: Any, kind: str) -> Any:
    return {"type": kind, **block} if isinstance(block, dict) else block


def _without_removed(data: Any, annotation: Any) -> Any:
    """Drop entries that an overlay set to null from mappings whose names are free."""
    if not isinstance(data, dict):
        return data
    if (values := entries_of(annotation)) is not None:
        return {
            key: _without_removed(value, values)
            for key, value in data.items()
            if value is not None or allows_none(values)
        }
    model = choose_class(annotation, data)
    fields = model.model_fields if model is not None else {}
    return {
        key: _without_removed(value, fields[key].annotation) if key in fields else value
        for key, value in data.items()
    }


def _absolute_paths(data: dict[str, Any]) -> dict[str, Any]:
    data = map_strings(data, _PATHS, _absolute)
    engine = data.get("deepspeed")
    if isinstance(engine, str) and (engine.endswith(".json") or os.sep in engine):
        data["deepspeed"] = _absolute(engine)
    return data


def _absolute(path: str) -> str:
    """Absolute form of a local path or pattern; addresses such as s3://... stay as they are."""
    if not path or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path):
        return path
    return os.path.abspath(os.path.expanduser(path))
