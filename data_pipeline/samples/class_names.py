"""Names of classes beside their numbers, in the settings of data that have classes."""

from typing import Annotated, Any

from pydantic import AfterValidator


def _all_named(names: list[str]) -> list[str]:
    for number, name in enumerate(names):
        if not name.strip():
            raise ValueError(f"class_names: class {number} has an empty name")
    return names


ClassNames = Annotated[list[str], AfterValidator(_all_named)]
"""Names in the order of the numbers of classes; [] = there are none."""


def check_class_names(settings: Any) -> Any:
    """The settings. Raises ValueError: more names than classes, or fewer."""
    names = settings.class_names
    if names and len(names) != settings.classes:
        raise ValueError(
            f"class_names: {len(names)} names for classes={settings.classes}: name each of "
            "them, or none"
        )
    return settings
