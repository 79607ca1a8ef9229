"""Train what a recipe describes, on however many processes the launcher starts.

    python -m pretrain.train RECIPE [key.path=value ...]            one process
    torchrun --nproc-per-node 8 -m pretrain.train RECIPE            one node
    deepspeed --num_gpus 8 --module pretrain.train RECIPE           the same by DeepSpeed's launcher
    srun --ntasks-per-node 8 python -m pretrain.train RECIPE        the nodes of a SLURM job
    ... -m pretrain.train --resume RUN_DIR                          go on where the run stopped
    ... -m pretrain.train --resume RUN_DIR --from-step 4000         go back to that checkpoint first
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
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pretrain.engine.checkpoint.files import CheckpointError, newest_whole
from pretrain.engine.checkpoint.retention import (
    cut_off_return,
    find_checkpoint,
    step_of,
    step_to_go_back_to,
)
from pretrain.engine.control.control import ControlFolder, StopSignals
from pretrain.engine.control.ownership import (
    OccupiedError,
    Ownership,
    claim,
    claimed_by_this_launch,
    refuse_if_occupied,
)
from pretrain.engine.launch.launch_environment import LaunchError, require_world, translate
from pretrain.engine.launch.launchers import Launchers, age_of_start
from pretrain.engine.report.start_notes import StartNotes
from pretrain.engine.run_record import (
    RECIPE_FILE,
    RunDirError,
    check_new,
    check_resumable,
    holds_run,
)

if TYPE_CHECKING:
    from pretrain.recipe.recipe import Recipe

log = logging.getLogger("omnipretrain.train")

WRONG_USAGE = 2
RANK_0_FIRST_S = 5.0  # ranks start some seconds apart


def main(argv: Sequence[str] | None = None, signals: StopSignals | None = None) -> int:
    """Entry point; returns the exit code.

    signals: those that were heard since this process began; None = listen from now on.
    """
    launchers = Launchers()  # before the imports, in which one may go
    try:
        translate(os.environ)
        arguments = parse_arguments(argv)
        require_world(os.environ, arguments.expect_world)
        check_locale()
    except (LaunchError, LocaleError, UsageError) as error:
        say(error)
        return WRONG_USAGE
    from pretrain.recipe.overlay import RecipeError  # takes a second, in which signals count

    try:
        recipe, resume = read_recipe(arguments)
        ownership = enter(Path(recipe.run_dir), arguments.take_over)
    except (OccupiedError, RecipeError, RunDirError, UsageError) as error:
        say(error)
        return WRONG_USAGE
    except OSError as error:
        from pretrain.engine.control.failures import FAILED, reason_of

        say(reason_of(error))
        return FAILED
    with StartNotes(recipe.name, speaks=ownership is not None) as notes:
        from pretrain.start import train_recipe  # imports DeepSpeed, which takes seconds

        code = train_recipe(
            recipe,
            resume,
            signals or StopSignals(),
            ownership,
            arguments.from_step,
            notes,
            launchers,
        )
    if code == 0 and ownership is not None:
        from pretrain.exports import export_finished

        export_finished(recipe)
    return code


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
    """Print what is wrong, once: rank 0 does, and first.

    Most launchers end all processes as soon as one of them fails. Were that another one than rank
    0, nobody would have said why. All ranks have the same arguments, and those of a node the same
    files and variables, so that of other nodes one rank has to say what may be wrong there alone.
    """
    rank, of_node = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if rank == "0":
        print(error, file=sys.stderr, flush=True)
        return
    time.sleep(RANK_0_FIRST_S)
    if isinstance(error, LaunchError) or (of_node == "0" and not isinstance(error, UsageError)):
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)


class UsageError(ValueError):
    """Words of the command line that mean nothing; the message begins with the usage."""


class _Parser(argparse.ArgumentParser):
    """Leaves it to `say` to tell what is wrong, since argparse would on every rank."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.format_usage()}{self.prog}: error: {message}")


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
    parser = _Parser(prog="pretrain.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe", nargs="?", help="a YAML file or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--resume", metavar="RUN_DIR", type=Path, help="continue this run")
    parser.add_argument(
        "--start-or-resume",
        action="store_true",
        help="continue the run in the recipe's run_dir, or start it",
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="take the run from a job that seems to be at work in it",
    )
    parser.add_argument(
        "--from-step",
        metavar="N",
        type=int,
        help="with --resume: go on from the checkpoint of this step; those after "
        "it are moved aside",
    )
    parser.add_argument(
        "--expect-world",
        metavar="N",
        type=int,
        help="end if the launcher has started another number of processes",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    arguments = parser.parse_intermixed_args(argv)
    if arguments.resume is not None and arguments.recipe is not None:
        arguments.overrides.insert(0, arguments.recipe)  # there the first word is an override too
        arguments.recipe = None
    if (arguments.recipe is None) == (arguments.resume is None):
        parser.error("give a recipe, or --resume RUN_DIR")
    if arguments.start_or_resume and arguments.resume is not None:
        parser.error("--start-or-resume wants a recipe; --resume RUN_DIR wants a run")
    if arguments.from_step is not None and arguments.resume is None:
        parser.error("--from-step N goes with --resume RUN_DIR")
    return arguments


def read_recipe(arguments: argparse.Namespace) -> "tuple[Recipe, bool]":
    """The recipe of a new run, or of the run to resume with the allowed changes; and which.

    Raises:
        RecipeError, RunDirError: with all that the user needs to know.
    """
    from pretrain.recipe.load import load_recipe, load_resolved

    if arguments.resume is not None:
        root = arguments.resume / "checkpoints"
        arguments.from_step = step_to_go_back_to(root, arguments.from_step, os.environ)
        return read_resumed(arguments.resume, arguments.overrides, arguments.from_step), True
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    run_dir = Path(recipe.run_dir)
    # A launcher that starts its ranks anew repeats the words of the first start.
    goes_on = arguments.start_or_resume or claimed_by_this_launch(
        run_dir, os.environ, age_of_start()
    )
    if not (goes_on and holds_run(run_dir)):
        check_new(run_dir)
        return recipe, False
    recipe = moved(recipe, run_dir)
    check_same_run(run_dir, moved(load_resolved(run_dir / RECIPE_FILE), run_dir), recipe, None)
    return recipe, True


def read_resumed(run_dir: Path, overrides: Sequence[str], from_step: int | None) -> "Recipe":
    """The recipe in a run directory, with overrides, if the run may go on with it.

    Raises:
        RecipeError, RunDirError: as `read_recipe`.
    """
    from pretrain.recipe.load import load_layers, load_resolved, validate

    path = check_resumable(run_dir)
    written = moved(load_resolved(path), run_dir)
    recipe = written
    if overrides:
        recipe = moved(validate(load_layers(path, overrides)), run_dir)
    check_same_run(run_dir, written, recipe, from_step)
    return recipe


def check_same_run(
    run_dir: Path, written: "Recipe", recipe: "Recipe", from_step: int | None
) -> None:
    """Refuse a recipe that the run may not go on with.

    Args:
        written: the recipe in the run directory.
        recipe: the one to go on with; it obeys the one in the checkpoint, if there is one.
        from_step: of the checkpoint; None = the newest.

    Raises:
        RecipeError, RunDirError: as `read_recipe`.
    """
    from pretrain.resume_rules import check_changes, recipe_of

    root = run_dir / "checkpoints"
    if from_step is None and (step := cut_off_return(root)) is not None:
        raise RunDirError(
            f"{run_dir} was on its way back to step {step}, and was cut off while the checkpoints "
            f"after that were moved: end it with --resume {run_dir} --from-step {step} (or of an "
            "earlier checkpoint)"
        )
    try:
        folder = newest_whole(root) if from_step is None else find_checkpoint(root, from_step)
    except CheckpointError as error:
        if from_step is not None:
            raise RunDirError(str(error)) from None
        folder = None  # there is none, or the trainer will say what is wrong with it
    before = recipe_of(folder) if folder is not None else None
    if before is None:
        check_changes(written, recipe, str(run_dir / RECIPE_FILE))
    else:
        check_changes(before, recipe, str(folder.relative_to(run_dir)), step_of(folder))


def moved(recipe: "Recipe", run_dir: Path) -> "Recipe":
    """The recipe with its run directory where it lies now; a run may be moved as a whole."""
    return recipe.model_copy(update={"run_dir": str(run_dir.resolve())})


if __name__ == "__main__":
    code = main(signals=StopSignals())
    if code == WRONG_USAGE:
        sys.exit(code)
    from pretrain.engine.launch.distributed import leave

    leave(code)
