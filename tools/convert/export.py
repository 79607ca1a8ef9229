"""`tools.convert export`: any format that a run can be, or the list of them."""

import argparse

from rich.console import Console

from pretrain.recipe.recipe import Recipe
from tools.convert.formats.listing import FORMATS, choice_of
from tools.support.trained import recipe_of


def command(options: argparse.Namespace, console: Console) -> int:
    """Run the command; see `tools.convert.arguments`."""
    recipe = recipe_of(options.run_dir)
    if options.list:
        _list(recipe, options, console)
        return 0
    if options.out is None:
        raise ValueError(f"--to {options.to} needs --out")
    choice = choice_of(recipe, options)
    suffix = {"onnx": ".onnx", "torch": ".pt2"}.get(options.to)
    if suffix and options.out.suffix != suffix:
        raise ValueError(f"--to {options.to}: --out {options.out} must end in {suffix}")
    if not choice.words:
        from tools.convert.export_vit import command as write

        return write(options, console)
    from tools.convert.__main__ import main

    return main(
        [
            *choice.words,
            "--run",
            str(options.run_dir),
            "--out",
            str(options.out),
            "--weights",
            options.weights,
        ]
    )


def _list(recipe: Recipe, options: argparse.Namespace, console: Console) -> None:
    """One line for each format."""
    for one in FORMATS:
        try:
            one.choose(recipe, options)
            line = f"{one.name}: {one.what}; {one.loads}"
        except ValueError as error:
            line = f"{one.name}: not of this run: {error}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
