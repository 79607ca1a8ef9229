"""Ranks that a batch leaves without samples: they compute padding, step after step."""

from pretrain.recipe.recipe import Recipe


def idle_ranks(recipe: Recipe, world: int) -> list[str]:
    """One line per task whose global batch does not give every rank a sample, with one that does.

    world: number of ranks.
    """
    found = []
    for name, task in recipe.tasks.items():
        pairs = task.global_batch // 2
        idle = world - pairs  # each pair has one rank (`data_pipeline.order.step_sampler.deal`)
        if idle > 0:
            found.append(
                f"tasks.{name}: {idle} of {world} ranks would get padding only, since global_batch="
                f"{task.global_batch} is {pairs} pair{'s' * (pairs > 1)}: set global_batch to a "
                f"multiple of {2 * world}, or take at most {pairs} rank{'s' * (pairs > 1)}"
            )
    return found
