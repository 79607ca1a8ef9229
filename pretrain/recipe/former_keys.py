"""Keys that recipes no longer have: what to write instead, and older runs that hold them.

A run directory holds every key of its time, and a resume has to read it. So a former key is left
out without a word where it says what is done in any case, and is an error where it says more.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from data_pipeline.images.transforms import HeldOutImageSettings, ImageSettings
from pretrain.recipe.overlay import KeyPath, Layer, RecipeError


class FormerKey(NamedTuple):
    """A key that was one."""

    path: str
    """With `*` for a name that the user chooses."""
    value: Any
    """What is done now; what the key may still say."""
    advice: str


FORMER_KEYS = (
    FormerKey(
        "tasks.*.data.mixing.cutmix_probability",
        0.5,
        "CutMix and mixup are as likely; for one alone set mixup_alpha=0 or cutmix_alpha=0",
    ),
    FormerKey(
        "logging.plain_progress_seconds",
        15.0,
        "a line every 15 s; numbers of every step are in metrics.jsonl (logging.every_steps=1)",
    ),
)


def without_former(layer: Layer) -> Layer:
    """The layer without keys that are none any more.

    Raises:
        RecipeError: one of them asks for what is not done.
    """
    data, faults = layer.data, []
    for path, fault in [*_former(data), *_of_held_out_images(data)]:
        if fault:
            key = ".".join(path)
            faults.append(f"{layer.source(path)}: {key}: is no setting any more: {fault}")
        data = _without(data, path)
    if faults:
        raise RecipeError("\n".join(faults))
    return Layer(data, layer.written)


def _former(data: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    for key in FORMER_KEYS:
        for path, value in _found(data, tuple(key.path.split("."))):
            yield path, "" if value == key.value else key.advice


def _of_held_out_images(data: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Of held-out images only what differs from training can be said; once it was everything."""
    for path, image in _found(data, ("tasks", "*", "evaluation", "image")):
        if not isinstance(image, dict):
            continue
        training = next((i for _, i in _found(data, (*path[:2], "data", "image"))), None) or {}
        plain = ImageSettings().model_dump(mode="json")
        for name in image.keys() & (plain.keys() - HeldOutImageSettings.model_fields.keys()):
            same = image[name] in (plain[name], training.get(name, plain[name]))
            advice = f"{'.'.join(path[:2])}.data.image.{name} holds, and draws are for training"
            yield (*path, name), "" if same else f"{advice}: remove it"


def _found(data: Any, pattern: KeyPath, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """All places of a path with `*`, and what stands there."""
    if not pattern:
        yield path, data
    elif isinstance(data, dict):
        for name in list(data) if pattern[0] == "*" else [pattern[0]]:
            if name in data:
                yield from _found(data[name], pattern[1:], (*path, name))


def _without(data: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    rest = {name: value for name, value in data.items() if name != path[0]}
    return rest if len(path) == 1 else {**data, path[0]: _without(data[path[0]], path[1:])}
