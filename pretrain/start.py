"""One run on this rank, from its first collective to its exit code."""

import contextlib
import faulthandler
import os
import sys
from functools import partial
from pathlib import Path

import torch.distributed as dist

from data_pipeline.samples.tokenizer import Tokenizer
from pretrain.engine.control.control import ControlFolder, StopSignals
from pretrain.engine.control.failures import end_failed, reason_of
from pretrain.engine.control.ownership import Ownership
from pretrain.engine.control.watchdog import Limits, Watchdog, meeting_place
from pretrain.engine.launch.distributed import Ranks, init_distributed, shutdown
from pretrain.engine.launch.launchers import Launchers
from pretrain.engine.report.start_notes import StartNotes
from pretrain.engine.run_record import RunDirError
from pretrain.recipe.recipe import Recipe
from pretrain.trainer import Trainer


class RunHangs(RuntimeError):
    """A phase of the run has taken longer than it may."""


def train_recipe(
    recipe: Recipe,
    resume: bool,
    signals: StopSignals,
    ownership: Ownership | None,
    from_step: int | None = None,
    notes: StartNotes | None = None,
    launchers: Launchers | None = None,
) -> int:
    """Run a recipe on this process and its peers; returns the exit code (0, 1 or 3).

    ownership: rank 0's claim on the run directory; the others learn of it from rank 0.
    from_step: the checkpoint of this step is restored, not the newest one.
    notes: of the start, until the first step; None = nothing is said.
    launchers: those that were there when this process began; None = those that are there now.
    """
    notes = notes or StartNotes()
    # Where every thread stands, if C++ ends this process: NCCL's watchdog does after a time-out.
    faulthandler.enable()
    rank = int(os.environ.get("RANK", "0"))
    run_dir = Path(recipe.run_dir)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    limits = Limits(
        *(
            60 * minutes
            for minutes in (
                recipe.failure.start_minutes,
                recipe.failure.step_minutes,
                recipe.failure.save_minutes,
            )
        )
    )
    control = ControlFolder(run_dir, ownership) if ownership is not None else None
    watchdog = Watchdog(
        run_dir,
        rank,
        world,
        limits,
        expired=lambda reason: end_failed(run_dir, rank, RunHangs(reason), ownership),
        alive=partial(look_around, control, launchers or Launchers(), signals),
        store=meeting_place if world > 1 else None,
    )
    ranks = None
    try:
        notes.enter(f"meeting {world - 1} other process(es)" if world > 1 else "preparing torch")
        ranks = init_distributed(
            recipe.threads_per_rank,
            recipe.deterministic,
            trace_dir=run_dir / "logs",
            timeout=limits.of_collectives,
        )
        ownership = prepare_run_dir(recipe, ranks, resume, ownership)
        Trainer(recipe, ranks, signals, ownership, watchdog, from_step, notes).run()
        ownership.require()
    except Exception as error:
        # Peers wait in a collective for this rank: leave the reason on disk, then leave at once,
        # so that the launcher ends them.
        code = end_failed(run_dir, rank, error, ownership, ranks.places if ranks else ())
        sys.stdout.flush()
        os._exit(code)
    if ranks.leads:
        ownership.leave()
    watchdog.stop()
    shutdown()
    return 0


def look_around(
    control: ControlFolder | None, launchers: Launchers, signals: StopSignals
) -> str | None:
    """What the watchdog's thread does every few seconds, also in phases without steps.

    The heartbeat, on rank 0; and a run whose launcher is gone is asked to stop, as by a signal.

    Returns:
        Why this process is to leave, if its launcher is gone.
    """
    if control is not None:
        with contextlib.suppress(OSError):  # the next step will say it
            control.beat()
    gone = launchers.gone()
    if gone is not None and signals.received is None:
        signals.received = gone
    return gone


def prepare_run_dir(
    recipe: Recipe, ranks: Ranks, resume: bool, ownership: Ownership | None
) -> Ownership:
    """Rank 0 lays a new run directory out; the others wait until it is there, or fail alike.

    What an earlier start left is not touched: see `Trainer._settle`.
    """
    said: list = [None, None]
    if ranks.leads:
        try:
            run_dir = Path(recipe.run_dir)
            (run_dir / "logs").mkdir(parents=True, exist_ok=True)
            ownership.require()
            if not resume and recipe.tokenizer is not None:
                Tokenizer.load(recipe.tokenizer.path).save(run_dir / "tokenizer")
            said[1] = ownership.token
        except Exception as error:
            said[0] = reason_of(error)
    dist.broadcast_object_list(said, src=0)
    if said[0]:
        raise RunDirError(said[0])
    return ownership or Ownership(Path(recipe.run_dir), said[1])
