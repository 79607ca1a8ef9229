"""What the cache of a node will do in a run, for `python -m pretrain check`: by simulation."""

from collections.abc import Iterator

from data_pipeline.cache.blocks import Blocks
from data_pipeline.cache.cache_plan import simulate
from data_pipeline.cache.future import NodeReads
from data_pipeline.cache.read_ahead import plannable_bytes
from data_pipeline.order.sources import concatenated, open_sources
from data_pipeline.order.step_sampler import StepSampler
from pretrain.build import build_schedule, plan_task_order
from pretrain.recipe.recipe import Recipe

# A simulation of so many samples on a node takes about ten seconds.
_MOST_READS = 2_000_000


def cache_lines(recipe: Recipe, world: int, ranks_per_node: int) -> Iterator[str]:
    """Lines of the report on `loader.cache`.

    Raises:
        ValueError: the cache does not even hold what one step reads.
    """
    cache = recipe.loader.cache
    shards, rows = {}, {}
    for name, task in recipe.tasks.items():
        if task.data.stream is None:
            sources = open_sources(task.data, recipe.loader.remote)
            shards[name] = concatenated(sources)
            rows[name] = plan_task_order(task, sources, recipe.seed, name).rows
    if not shards:
        yield "cache: loader.cache has no effect, as all data are streams"
        return
    largest = max(task.global_batch for task in recipe.tasks.values())
    ranks = range(min(ranks_per_node, world))
    steps = min(recipe.steps, max(_MOST_READS * world // (largest * len(ranks)), 1))
    blocks = Blocks(shards, cache.block_bytes)
    sampler = StepSampler(build_schedule(recipe), recipe.tasks, 0, world, 0, steps)
    reads = NodeReads(sampler, rows, blocks, ranks)
    room = plannable_bytes(cache.max_bytes)
    outcome = simulate(reads, room, 0, steps, read_ahead_steps=cache.read_ahead_steps)
    yield (
        f"cache: {cache.max_gib:g} GiB of {_gib(blocks.total_bytes)} on each node of "
        f"{len(ranks)} rank(s), in blocks of {blocks.total_bytes / len(blocks) / 2**20:.2f} MiB"
    )
    yield (
        f"cache: in the first {steps} steps {outcome.hit_rate:.1%} hits and "
        f"{_gib(outcome.fetched_bytes)} downloaded by a node"
    )
    if outcome.passed_by:
        raise ValueError(
            f"{outcome.passed_by} blocks found no room at the step that reads them: "
            f"loader.cache.max_gib ({cache.max_gib:g}) holds less than one step reads; make it "
            "larger, or loader.cache.block_mib smaller"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
