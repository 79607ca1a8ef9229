"""Train what a recipe describes, on however many processes the launcher starts.

    python -m pretrain.train RECIPE [key.path=value ...]            one process
    torchrun --nproc-per-node 8 -m pretrain.train RECIPE            one node
    deepspeed --num_gpus 8 --module pretrain.train RECIPE           the same by DeepSpeed's launcher
    srun --ntasks-per-node 8 python -m pretrain.train RECIPE        the nodes of a SLURM job
    ... -m pretrain.train --resume RUN_DIR                          go on where the run stopped
    ... -m pretrain.train RECIPE --start-or-resume                  either, whichever is due

Exit code 0: finished, or stopped as asked with a checkpoint (control/status.json says which);
1: failed; 2: the recipe or the arguments are wrong, or the run is in use (said before any process
group starts); 3: another job has taken over the run, and this one has left it alone.
"""

import argparse
import codecs
import locale
import logging
import os
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.engine.control import ControlFolder, StopSignals
from pretrain.engine.launch_environment import LaunchError, translate
from pretrain.engine.ownership import (
    OccupiedError,
    Ownership,
    claim,
    refuse_if_occupied,
)
from pretrain.engine.run_record import (
    RECIPE_FILE,
    RunDirError,
    check_new,
    check_resumable,
    holds_run,
)

if TYPE_CHECKING:
    from pretrain.recipe import Recipe

log = logging.getLogger("omnipretrain.train")

WRONG_USAGE = 2
RANK_0_FIRST_S = 5.0  # ranks start some seconds apart

# What may change on a resume: it decides where and how things are computed, or what comes later.
CHANGEABLE = (
    "loader.*",
    "logging.*",
    "checkpoint.*",
    "failure.*",
    "threads_per_rank",
    "deterministic",
    "deepspeed",
    "evaluation_every_steps",
    "tasks.*.evaluation.*",
    "tasks.*.micro_batch",
    # What ran stays as the ledger has it; these decide what is to come.
    "tasks.*.weight",
    "sampling.*",
)


def main(argv: Sequence[str] | None = None, signals: StopSignals | None = None) -> int:
    """Entry point; returns the exit code.

    signals: those that were heard since this process began; None = listen from now on.
    """
    arguments = parse_arguments(argv)
    from pretrain.recipe import RecipeError  # imports torch, which takes seconds

    try:
        translate(os.environ)
        check_locale()
        recipe, resume = read_recipe(arguments)
        ownership = enter(Path(recipe.run_dir), arguments.take_over)
    except (LaunchError, LocaleError, OccupiedError, RecipeError, RunDirError) as error:
        say(error)
        return WRONG_USAGE
    except OSError as error:
        from pretrain.engine.failures import FAILED, reason_of

        say(reason_of(error))
        return FAILED
    from pretrain.engine.start import train_recipe  # imports DeepSpeed, which takes seconds

    return train_recipe(recipe, resume, signals or StopSignals(), ownership)


def enter(run_dir: Path, take_over: bool) -> Ownership | None:
    """Claim the run directory, on rank 0; the others get None, and see that nobody else is there.

    Raises:
        OccupiedError: another job is at work there.
    """
    if os.environ.get("RANK", "0") == "0":
        ownership = claim(run_dir, os.environ, take_over)
        ControlFolder(run_dir, ownership).begin()
        return ownership
    if not take_over:
        refuse_if_occupied(run_dir, os.environ)
    return None


def say(error: Exception | str) -> None:
    """Print what is wrong; rank 0 first.

    Most launchers end all processes as soon as one of them fails. Were that another one than rank
    0, nobody would have said why; a fault of another rank alone has to be said too.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(error, file=sys.stderr, flush=True)
    else:
        time.sleep(RANK_0_FIRST_S)
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)


class LocaleError(RuntimeError):
    """torch cannot work in this locale; the message says what to set."""


def check_locale() -> None:
    """Raise LocaleError where Python takes text files for ASCII.

    torch (2.13: `torch._inductor`, which DeepSpeed imports) reads its own sources by the locale,
    and would end with a UnicodeDecodeError that names none of this. Python avoids it by itself in
    the C locale, unless PYTHONUTF8=0 forbids it.
    """
    if codecs.lookup(locale.getpreferredencoding(False)).name == "ascii":
        raise LocaleError(
            "the locale's encoding is ASCII and Python's UTF-8 mode is off, so that torch cannot "
            "read its own files: unset PYTHONUTF8, or set LC_ALL=C.UTF-8"
        )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="pretrain.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe", nargs="?", help="a YAML file or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--resume", metavar="RUN_DIR", type=Path, help="continue this run")
    parser.add_argument("--start-or-resume", action="store_true",
                        help="continue the run in the recipe's run_dir, or start it")
    parser.add_argument("--take-over", action="store_true",
                        help="take the run from a job that seems to be at work in it")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    arguments = parser.parse_intermixed_args(argv)
    if arguments.resume is not None and arguments.recipe is not None:
        arguments.overrides.insert(0, arguments.recipe)  # there the first word is an override too
        arguments.recipe = None
    if (arguments.recipe is None) == (arguments.resume is None):
        parser.error("give a recipe, or --resume RUN_DIR")
    if arguments.start_or_resume and arguments.resume is not None:
        parser.error("--start-or-resume wants a recipe; --resume RUN_DIR wants a run")
    return arguments


def read_recipe(arguments: argparse.Namespace) -> "tuple[Recipe, bool]":
    """The recipe of a new run, or of the run to resume with the allowed changes; and which.

    Raises:
        RecipeError, RunDirError: with all that the user needs to know.
    """
    from pretrain.recipe import load_recipe, load_resolved

    if arguments.resume is not None:
        return read_resumed(arguments.resume, arguments.overrides), True
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    run_dir = Path(recipe.run_dir)
    if arguments.start_or_resume and holds_run(run_dir):
        check_same_run(load_resolved(run_dir / RECIPE_FILE), recipe)
        return moved(recipe, run_dir), True
    check_new(run_dir)
    return recipe, False


def read_resumed(run_dir: Path, overrides: Sequence[str]) -> "Recipe":
    """The recipe in a run directory, with what is overridden.

    Raises:
        RecipeError, RunDirError: as `read_recipe`.
    """
    from pretrain.recipe import RecipeError, load_layers, load_resolved, validate

    path = check_resumable(run_dir)
    if not overrides:
        return moved(load_resolved(path), run_dir)
    for override in overrides:
        key = override.split("=", 1)[0]
        if not changeable(key):
            raise RecipeError(
                f"{key} cannot change on a resume: the run would not be the one that its "
                f"checkpoints belong to. Changeable: {', '.join(CHANGEABLE)}. For anything else "
                "start a new run from this one's weights (python -m tools.convert export-weights "
                "writes a file for initial_weights)"
            )
    return moved(validate(load_layers(path, overrides)), run_dir)


def changeable(key: str) -> bool:
    """Whether the field at a dotted path may differ after a resume."""
    return any(fnmatch(key, pattern) for pattern in CHANGEABLE)


def check_same_run(before: "Recipe", now: "Recipe") -> None:
    """Refuse to go on with a run under a recipe that is another one.

    Raises:
        RecipeError: naming every field that differs and may not.
    """
    from pretrain.recipe import RecipeError

    fields = [flat(recipe.model_dump(mode="json", exclude={"run_dir"})) for recipe in (before, now)]
    paths = sorted(fields[0].keys() | fields[1].keys())
    lines = [
        f"{path}: {fields[0].get(path)} in {before.run_dir}, {fields[1].get(path)} now"
        for path in paths
        if fields[0].get(path) != fields[1].get(path) and not changeable(path)
    ]
    if lines:
        raise RecipeError(
            f"{before.run_dir} holds a run of another recipe: start in another run_dir, or "
            "--resume the run as it is. What differs:\n" + "\n".join(lines)
        )


def flat(value: object, path: str = "") -> dict[str, object]:
    """Dotted path -> value of everything in nested mappings."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {
        deeper: leaf
        for key, inner in value.items()
        for deeper, leaf in flat(inner, f"{path}.{key}" if path else str(key)).items()
    }


def moved(recipe: "Recipe", run_dir: Path) -> "Recipe":
    """The recipe with its run directory where it lies now; a run may be moved as a whole."""
    return recipe.model_copy(update={"run_dir": str(run_dir.resolve())})


if __name__ == "__main__":
    code = main(signals=StopSignals())
    if code == WRONG_USAGE:
        sys.exit(code)
    from pretrain.engine.distributed import leave

    leave(code)
