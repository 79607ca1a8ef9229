"""A look at the data before the first step: shards that changed, samples without what they teach.

Each finding ends the run on all ranks alike, before anything is trained on. `pretrain check` looks
at the same.
"""

import logging
from collections.abc import Mapping

import torch.distributed as dist

from data_pipeline.loader.stream import TaskStream
from data_pipeline.loader.weak_stream import WeakStream
from data_pipeline.samples.tokenizer import Tokenizer
from data_pipeline.shards.presence import changed_shards, listed
from data_pipeline.storage.storage import TransientReadError
from pretrain.build import build_evaluation_loader
from pretrain.check_targets import Findings, look_for_targets
from pretrain.engine.launch.distributed import Ranks
from pretrain.recipe.recipe import Recipe

log = logging.getLogger("omnipretrain.train")


class DataFault(RuntimeError):
    """The data are not what the recipe or their indices say; the message names what differs."""


def look_at_data(
    recipe: Recipe,
    ranks: Ranks,
    streams: Mapping[str, TaskStream | WeakStream],
    tokenizer: Tokenizer | None,
) -> None:
    """Look at the shards of each node and, on rank 0, at samples; log warnings. A collective.

    streams: task -> its training data.

    Raises:
        DataFault: on every rank.
    """
    held_out = held_out_streams(recipe, tokenizer) if ranks.local_rank == 0 else {}
    mine = changed_data(streams, held_out) if ranks.local_rank == 0 else None
    answers: list = [None] * ranks.world
    dist.all_gather_object(answers, mine)
    if errors := list(dict.fromkeys(answer for answer in answers if answer)):
        raise DataFault("; ".join(errors))
    found = [Findings()]
    if ranks.leads:
        found = [look_at_samples(recipe, streams, held_out)]
    dist.broadcast_object_list(found, src=0)
    for warning in found[0].warnings:
        log.warning("%s", warning)
    if found[0].faults:
        raise DataFault("\n".join(found[0].faults))


def held_out_streams(recipe: Recipe, tokenizer: Tokenizer | None) -> dict[str, TaskStream]:
    """Held-out data of the tasks that have some."""
    return {
        name: build_evaluation_loader(recipe, name, tokenizer).stream
        for name, task in recipe.tasks.items()
        if task.evaluation is not None
    }


def changed_data(*groups: Mapping[str, TaskStream | WeakStream]) -> str | None:
    """What is wrong with shards that this node sees, if anything is."""
    shards = {
        shard.path: shard
        for group in groups
        for stream in group.values()
        if isinstance(stream, TaskStream)
        for shard in stream.reader.shards.shards
    }
    changed = changed_shards(shards.values())
    if not changed:
        return None
    return (
        f"{len(changed)} of {len(shards)} shards are not what they were when they were indexed: "
        f"{listed(changed)}. Restore them; to go on without them, pack or list the data anew and "
        "start a new run from this one's weights"
    )


def look_at_samples(
    recipe: Recipe,
    streams: Mapping[str, TaskStream | WeakStream],
    held_out: Mapping[str, TaskStream],
) -> Findings:
    """What `look_for_targets` finds in all tasks; storage that fails now is left to the loader."""
    total = Findings()
    for group in (streams, held_out):
        for name, stream in group.items():
            try:
                found = look_for_targets(recipe, name, stream, held_out=group is held_out)
            except TransientReadError as error:
                total.warnings.append(f"tasks.{name}: no look at its samples: {error}")
                continue
            total.faults += found.faults
            total.warnings += found.warnings
    return total
