"""Which order a task reads its data sets in."""

from collections.abc import Sequence

from data_pipeline.order.mixed_order import MixedOrder
from data_pipeline.order.order import RowOrder
from data_pipeline.order.repeats import RepeatedOrder
from data_pipeline.order.sources import Source
from data_pipeline.rng import keyed_u64


def plan_order(
    sources: Sequence[Source], global_batch: int, seed: int, name: str, repeats: int = 1
) -> RowOrder:
    """The order of a task's samples; rows count through the sources one behind the other.

    Args:
        sources: from `open_sources`; the concatenation of their shards is what rows refer to.
        global_batch: samples per step.
        seed, name: of the run and the task; two tasks on the same shards see different orders.
        repeats: how often each sample stands in a step; see `RepeatedOrder`.
    """
    if repeats > 1:
        once = plan_order(sources, global_batch // repeats, seed, name)
        return RepeatedOrder(once, global_batch, repeats)
    if len(sources) == 1:
        return sources[0].plan(keyed_u64(seed, "order", name) >> 1, global_batch)
    orders = {
        source.name: source.plan(keyed_u64(seed, "order", name, source.name) >> 1, global_batch)
        for source in sources
    }
    weights = [source.weight for source in sources]
    return MixedOrder(orders, weights, keyed_u64(seed, "sources", name) >> 1)
