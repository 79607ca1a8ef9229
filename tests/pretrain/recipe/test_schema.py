"""Errors and reference of a schema that has what ours will have: unions by `type`, nested maps."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from data_pipeline.settings import Settings
from pretrain.recipe.overlay import parse_yaml
from pretrain.recipe.schema import error_lines, reference, type_name


class Square(Settings):
    type: Literal["square"] = "square"
    """Which shape."""

    side: int = 3
    """Side in pixels."""


class Circle(Settings):
    type: Literal["circle"] = "circle"
    """Which shape."""

    radius: float
    """Radius in pixels."""


Shape = Annotated[Square | Circle, Field(discriminator="type")]


class Root(Settings):
    mode: Literal["fast", "slow"] = "fast"
    """How."""

    shapes: dict[str, Shape] = Field(default_factory=dict)
    """Name -> shape."""

    one: Shape | None = None
    """A shape, or none."""

    points: tuple[tuple[float, float], ...] = ()
    """Points."""

    names: list[Literal["a", "b"]] = Field(default=["a"], min_length=1)
    """Names."""

    @model_validator(mode="after")
    def _check(self):
        if len(self.shapes) == 3:
            raise ValueError("mode=x: three shapes\nshapes.s: really")
        return self


def faults(text: str) -> list[str]:
    layer = parse_yaml(text, "f")
    with pytest.raises(ValidationError) as caught:
        Root.model_validate(layer.data)
    return error_lines(caught.value, Root, layer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mod: fast", ["f:1: mod: unknown key; did you mean 'mode'?"]),
        ("mode: fats", ["f:1: mode: 'fats' is not one of fast, slow; did you mean 'fast'?"]),
        ("mode: 7", ["f:1: mode: 7 is not one of fast, slow"]),
        (
            "shapes:\n  s:\n    type: squar",
            [
                "f:3: shapes.s.type: 'squar' is not one of square, circle; did you mean 'square'?",
            ],
        ),
        ("shapes:\n  s: {side: 3}", ["f:2: shapes.s.type: required, but not given"]),
        (
            "shapes:\n  s:\n    type: square\n    sied: 2",
            ["f:4: shapes.s.sied: unknown key; did you mean 'side'?"],
        ),
        (
            "shapes:\n  s: {type: circle, radius: wide}",
            [
                "f:2: shapes.s.radius: input should be a valid number, unable to parse string as a "
                "number, not 'wide'"
            ],
        ),
        ("one: {type: circle}", ["f:1: one.radius: required, but not given"]),
        ("one: {type: circle, rad: 1}", None),
        (
            "one: {type: square, mode: fast}",
            ["f:1: one.mode: unknown key; that key belongs to mode"],
        ),
        (
            "one: {type: square, zzz: 1}",
            ["f:1: one.zzz: unknown key; known here: type, side"],
        ),
        ("points: [[1, 2], [3]]", ["f:1: points[1][1]: required, but not given"]),
        ("names: [a, c]", ["f:1: names[1]: 'c' is not one of a, b"]),
        ("names: []", ["f:1: names: list should have at least 1 item, not 0"]),
        ("shapes: 3", ["f:1: shapes: input should be a valid block, not 3"]),
        (
            'shapes: {"a.b": {type: square, side: big}}',
            [
                'f:1: shapes."a.b".side: input should be a valid integer, unable to parse string '
                "as an integer, not 'big'"
            ],
        ),
        (
            "mode: slow\nshapes:\n  s: &s {type: square}\n  t: *s\n  u: *s",
            ["f:1: mode=x: three shapes", "f:3: shapes.s: really"],
        ),
    ],
)
def test_one_line_per_fault(text, expected):
    found = faults(text)
    if expected is None:
        assert found == [
            "f:1: one.radius: required, but not given",
            "f:1: one.rad: unknown key; did you mean 'radius'?",
        ]
    else:
        assert found == expected


def test_reference_lists_every_alternative():
    lines = [(f.path, f.type, f.default, f.doc) for f in reference(Root)]
    assert lines == [
        ("mode", "fast | slow", "fast", "How."),
        ("shapes", "name -> block (square) | block (circle)", "{}", "Name -> shape."),
        ("shapes.<name>.type", "square", "square", "Which shape."),
        ("shapes.<name>.side", "int", "3", "Side in pixels."),
        ("shapes.<name>.type", "circle", "circle", "Which shape."),
        ("shapes.<name>.radius", "float", "required", "Radius in pixels."),
        ("one", "block (square) | block (circle) | null", "null", "A shape, or none."),
        ("one.type", "square", "square", "Which shape."),
        ("one.side", "int", "3", "Side in pixels."),
        ("one.type", "circle", "circle", "Which shape."),
        ("one.radius", "float", "required", "Radius in pixels."),
        ("points", "list of list of 2 float", "[]", "Points."),
        ("names", "list of a | b", "[a]", "Names."),
    ]


def test_type_names():
    assert type_name(str | None) == "text | null"
    assert type_name(bool) == "true | false"
    assert type_name(tuple[int, int, int]) == "list of 3 int"
