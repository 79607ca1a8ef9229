"""Which checkpoints of a run stay, which go, and which are moved aside. Rank 0's work; no torch.

<run>/checkpoints/
    step_000004000/
    aside_1_after_step_000004000/     what `--from-step 4000` has left: step_000005000/, ...,
                                      and metrics.jsonl, faults/ as they were
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from data_pipeline.files import sync_folder, write_atomically
from pretrain.engine.checkpoint.files import (
    CheckpointError,
    checkpoint_name,
    list_checkpoints,
)

_ASIDE, _UNFINISHED = "aside_{}_after_{}", "going_back_to_{}"
_ASIDE_NAME = re.compile(r"aside_(\d+)_after_step_(\d+)$")


def step_of(folder: Path) -> int:
    """Steps that a checkpoint was written after, by its name."""
    return int(folder.name.removeprefix("step_"))


def steps_there(root: Path) -> str:
    """The steps of all checkpoints under `root`, in words."""
    steps = [str(step_of(folder)) for folder in list_checkpoints(root)]
    return f"there are {', '.join(reversed(steps))}" if steps else "there is none"


def find_checkpoint(root: Path, step: int) -> Path:
    """The checkpoint of one step. Raises CheckpointError, with what there is."""
    folder = root / checkpoint_name(step)
    if not folder.is_dir():
        raise CheckpointError(
            f"{root} holds no checkpoint of step {step} (--from-step): {steps_there(root)}"
        )
    return folder


def last_before(root: Path, step: int) -> int | None:
    """Step of the newest checkpoint before `step`."""
    return next((s for s in map(step_of, list_checkpoints(root)) if s < step), None)


def retire(root: Path, keep_last: int, keep_every_steps: int | None, sound: int) -> None:
    """Remove what retention (`checkpoint.keep_last`, `checkpoint.keep_every_steps`) does not keep.

    Args:
        sound: all steps since this one, up to the newest checkpoint, were skipped. A checkpoint of
            this step may itself be why (its weights are beyond repair); one before it is not, since
            a step was taken from there. The newest of both kinds are kept.
    """
    found = list_checkpoints(root)
    steps = kept_of(map(step_of, found), keep_last, keep_every_steps)
    kept = {folder for folder in found if step_of(folder) in steps}
    if found and sound < step_of(found[0]):
        for last in (sound, sound - 1):
            kept.update([folder for folder in found if step_of(folder) <= last][:1])
    for folder in found:
        if folder not in kept:
            remove(folder)


def kept_of(steps: Iterable[int], keep_last: int, keep_every_steps: int | None) -> set[int]:
    """Of these steps, the newest, and those that are kept for good."""
    steps = sorted(steps, reverse=True)
    always = [step for step in steps if keep_every_steps and step % keep_every_steps == 0]
    return {*steps[:keep_last], *always}


def remove(folder: Path) -> None:
    """Take a checkpoint away in one step (the rename), then free its space."""
    doomed = folder.with_name(f".removing-{folder.name}-{secrets.token_hex(4)}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


class Aside(NamedTuple):
    """What `set_aside` has done."""

    folder: Path
    newest: int | None
    """The newest step in it; None if it holds none."""


def set_aside(root: Path, step: int, records: Iterable[Path]) -> Aside:
    """Move the checkpoints after `step` out of the way; to be done once that one is restored.

    They go, with copies of the run's records so far, into a folder of their own, where nothing
    reads them but who names it. It has another name until all is moved: a start after a crash in
    the middle goes on with it. It is made in any case: it says that the run went back.

    Args:
        records: files and folders of the run which speak of the steps that are left aside.
    """
    later = [folder for folder in list_checkpoints(root) if step_of(folder) > step]
    unfinished = root / _UNFINISHED.format(checkpoint_name(step))
    for other in root.glob(_UNFINISHED.format("step_*")):  # at most one, perhaps to another step
        os.rename(other, unfinished)
    unfinished.mkdir(exist_ok=True)
    for record in records:
        if record.is_dir():
            shutil.copytree(record, unfinished / record.name, dirs_exist_ok=True)
        elif record.exists():
            shutil.copy2(record, unfinished / record.name)
    write_atomically(root / "latest", [f"{checkpoint_name(step)}\n".encode()])
    for folder in later:  # the newest first: a crash leaves no gap
        os.rename(folder, unfinished / folder.name)
    sync_folder(unfinished)
    aside = root / _ASIDE.format(max([0, *_went_back(root)]) + 1, checkpoint_name(step))
    os.rename(unfinished, aside)
    sync_folder(root)
    left = list_checkpoints(aside)
    return Aside(aside, step_of(left[0]) if left else None)


def step_to_go_back_to(
    root: Path, wanted: int | None, environment: Mapping[str, str]
) -> int | None:
    """The step of `--from-step`; None where a launcher or a scheduler repeats a command that has
    gone back already: the checkpoints since then are what it is to go on from."""
    restarts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    back = _went_back(root)
    if (
        back
        and back[max(back)] == wanted
        and any(environment.get(name, "0") not in ("", "0") for name in restarts)
    ):
        return None
    return wanted


def cut_off_return(root: Path) -> int | None:
    """The step that the run was to go back to when something ended it in the middle of that."""
    return next(
        (
            step_of(Path(path.name.removeprefix(_UNFINISHED.format(""))))
            for path in root.glob(_UNFINISHED.format("step_*"))
        ),
        None,
    )


def went_back_from(root: Path, step: int) -> int | None:
    """The newest step that was left aside when the run last went back to `step`; None if it has
    gone back elsewhere since then, or never did."""
    back = _went_back(root)
    for number in sorted(back, reverse=True):
        if back[number] != step:
            return None
        aside = root / _ASIDE.format(number, checkpoint_name(step))
        if left := list_checkpoints(aside):
            return step_of(left[0])
    return None


def _went_back(root: Path) -> dict[int, int]:
    """Number of each folder of `set_aside` -> the step that the run went back to."""
    found = (_ASIDE_NAME.match(path.name) for path in root.glob("aside_*"))
    return {int(match[1]): int(match[2]) for match in found if match}
