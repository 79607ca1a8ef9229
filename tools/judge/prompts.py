"""Class names and templates of a zero-shot evaluation, from a file."""

from pathlib import Path

from pydantic import Field, ValidationError, field_validator

from data_pipeline.settings import Settings
from pretrain.recipe.overlay import parse_yaml


class Prompts(Settings):
    """Contents of --prompts: YAML, or JSON, which is YAML too."""

    classes: list[str] = Field(min_length=2)
    """Names in the order of the class numbers."""
    templates: list[str] = Field(default=["a photo of a {}."], min_length=1)
    """Sentences with {} for the name."""

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, value: list[str]) -> list[str]:
        for template in value:
            if template.count("{}") != 1:
                raise ValueError(f"{template!r} needs one {{}}, where the name goes")
        return value

    def texts(self) -> list[list[str]]:
        """The prompts of each class."""
        return [[t.replace("{}", name) for t in self.templates] for name in self.classes]


def read_prompts(path: Path | None) -> Prompts:
    """Raises ValueError: there is no file, or one with something else in it."""
    if path is None:
        raise ValueError(
            "zeroshot needs --prompts FILE: YAML with classes: [daisy, rose] and templates: "
            "['a photo of a {}.']"
        )
    layer = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    try:
        return Prompts.model_validate(layer.data)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise ValueError(f"{path}: {place}: {fault['msg']}") from None
