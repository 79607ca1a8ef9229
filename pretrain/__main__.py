"""Look at a recipe before it runs.

python -m pretrain recipes                          the shipped recipes
python -m pretrain show RECIPE [key.path=value ...] the complete recipe, and who set what
python -m pretrain show --fields                    every field: type, default, meaning
python -m pretrain check RECIPE [...] [--world N]   everything that can be checked without a run
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.console import parse_in_any_order, write_utf8
from pretrain.recipe.overlay import KeyPath, Layer, RecipeError, to_flow_yaml

if TYPE_CHECKING:  # the schema of recipes takes a second to import, which --help does without
    from pretrain.recipe.recipe import Recipe

SHIPPED = Path(__file__).parent / "recipes"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 sound, 1 a check failed, 2 not a recipe."""
    write_utf8()
    arguments = _parse(argv)
    try:
        return arguments.action(arguments)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(required=True, metavar="{recipes,show,check}")
    listing = actions.add_parser("recipes", help="list the shipped recipes")
    listing.set_defaults(action=_list_recipes)
    show = actions.add_parser("show", help="print a recipe with all its fields")
    show.add_argument("recipe", nargs="?", help="a YAML file or the name of a shipped recipe")
    show.add_argument("overrides", nargs="*", metavar="key.path=value")
    show.add_argument("--fields", action="store_true", help="print the reference of all fields")
    show.set_defaults(action=_show, parser=show)
    check = actions.add_parser("check", help="check a recipe, its data and its engine settings")
    check.add_argument("recipe", help="a YAML file or the name of a shipped recipe")
    check.add_argument("overrides", nargs="*", metavar="key.path=value")
    check.add_argument("--world", type=int, default=1, metavar="N", help="ranks (default 1)")
    check.add_argument(
        "--ranks-per-node", type=int, default=8, metavar="N", help="ranks of a node (default 8)"
    )
    check.set_defaults(action=_check, parser=check)
    return parse_in_any_order(parser, argv)


def _list_recipes(_: argparse.Namespace) -> int:
    paths = sorted(SHIPPED.glob("*.yaml"))
    width = max(len(path.stem) for path in paths)
    for path in paths:
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        print(f"{path.stem:{width}}  {first.removeprefix('#').strip()}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    if arguments.fields:
        if arguments.recipe is not None:
            arguments.parser.error("--fields describes the schema and takes no recipe")
        print(_reference())
        return 0
    if arguments.recipe is None:
        arguments.parser.error("give a recipe, or --fields")
    from pretrain.recipe.load import load_layers, validate

    layer = load_layers(arguments.recipe, arguments.overrides)
    print(annotated_yaml(validate(layer), layer))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    for name in ("world", "ranks_per_node"):
        if getattr(arguments, name) < 1:
            option = f"--{name.replace('_', '-')}"
            arguments.parser.error(f"{option} must be at least 1, not {getattr(arguments, name)}")
    from pretrain.recipe.load import load_layers, validate

    recipe = validate(load_layers(arguments.recipe, arguments.overrides))
    from pretrain.check import report  # imports DeepSpeed, which takes seconds

    findings = report(recipe, arguments.world, arguments.ranks_per_node)
    for finding in findings:
        verdict = "FAULT" if not finding.ok else "warn " if finding.warns else "ok   "
        print(f"{verdict} {finding.text}")
    return 0 if all(finding.ok for finding in findings) else 1


def annotated_yaml(recipe: Recipe, layer: Layer) -> str:
    """The recipe as YAML that can be loaded again; a comment names the source of each set value."""
    lines: list[tuple[str, str]] = []
    _collect(recipe.model_dump(mode="json"), (), layer, lines)
    width = min(60, max(len(text) for text, _ in lines))
    return "\n".join(f"{text:{width}}  # {source}" if source else text for text, source in lines)


def _collect(
    data: dict[str, Any], path: KeyPath, layer: Layer, lines: list[tuple[str, str]]
) -> None:
    for key, value in data.items():
        here = (*path, key)
        text = f"{'  ' * len(path)}{to_flow_yaml(key)}:"
        if isinstance(value, dict) and value:
            lines.append((text, ""))
            _collect(value, here, layer, lines)
        else:
            lines.append((f"{text} {to_flow_yaml(value)}", _source_of(here, layer)))


def _source_of(path: KeyPath, layer: Layer) -> str:
    source = layer.written.get(path, "")
    return os.path.relpath(source) if os.path.isabs(source) else source


def _reference() -> str:
    from pretrain.recipe.recipe import Recipe
    from pretrain.recipe.schema import reference

    blocks = []
    for field in reference(Recipe):
        default = f" = {field.default}" if field.default else ""
        blocks.append(f"{field.path}: {field.type}{default}\n    {field.doc}")
    return "\n".join(blocks)


if __name__ == "__main__":
    sys.exit(main())
