"""`python -m tools.shards plan`: what a cache of a given size will save, before it is bought."""

import argparse
from collections import OrderedDict
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipeline.cache.blocks import WHOLE_SHARD, Blocks
from data_pipeline.cache.cache import CacheSettings
from data_pipeline.cache.cache_plan import Outcome, Tally, simulate
from data_pipeline.cache.future import NodeReads
from data_pipeline.cache.read_ahead import plannable_bytes
from data_pipeline.order.order import Order
from data_pipeline.order.step_sampler import StepSampler
from data_pipeline.shards.shard_set import ShardSet

_GIB = 2**30
_MOST_READS = 20_000_000


class _Batches:
    """The batch of a run, as a StepSampler wants it."""

    def __init__(self, global_batch: int) -> None:
        self.global_batch, self.micro_batch = global_batch, global_batch + global_batch % 2


def add_command(commands: Any, text: str) -> None:
    """Add `plan` to the sub-commands of tools.shards; `text` says what it does."""
    parser = commands.add_parser("plan", help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("shards", nargs="+", help="folders, tars, globs or {000..123} expressions")
    parser.add_argument(
        "--max-gib",
        type=_positive,
        nargs="+",
        required=True,
        metavar="GIB",
        help="sizes of a node's cache",
    )
    parser.add_argument("--global-batch", type=_natural, default=1024, help="(default %(default)s)")
    parser.add_argument("--nodes", type=_natural, default=1, help="(default %(default)s)")
    parser.add_argument("--epochs", type=_positive, default=3.0, help="(default %(default)s)")
    default = str(CacheSettings.model_fields["block_mib"].default)
    parser.add_argument(
        "--block-mib",
        type=_block_bytes,
        default=default,
        metavar="MIB",
        help=f"as loader.cache.block_mib; null: whole shards (default {default})",
    )
    default = CacheSettings.model_fields["read_ahead_steps"].default
    parser.add_argument("--read-ahead-steps", type=_natural, default=default, help="(default 32)")


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    shards = ShardSet.open(options.shards)
    steps = max(int(len(shards) * options.epochs / options.global_batch), 1)
    shown = min(steps, max(_MOST_READS * options.nodes // options.global_batch, 1))
    order = Order.plan(len(shards), 0, options.global_batch)
    reads = NodeReads(
        StepSampler(
            lambda step: ("all", step),
            {"all": _Batches(options.global_batch)},
            0,
            options.nodes,
            0,
            shown,
        ),
        {"all": order.rows},
        Blocks({"all": shards}, options.block_mib),
        range(1),
    )
    console = Console(width=None if Console().is_terminal else 120)
    total = reads.blocks.total_bytes
    needed = total / len(shards) * shown * options.global_batch / options.nodes
    console.print(
        f"{len(shards):,} samples, {total / _GIB:,.1f} GiB, in {len(reads.blocks):,} blocks; "
        f"{shown:,} steps of {options.global_batch:,} = "
        f"{shown * options.global_batch / len(shards):.2f} epochs; each of {options.nodes} node(s) "
        f"reads samples of {needed / _GIB:,.1f} GiB"
    )
    table = Table("cache", "policy", "hits", "downloaded by a node", "of what it reads")
    for gib in options.max_gib:
        room = plannable_bytes(int(gib * _GIB))
        ahead = simulate(reads, room, 0, shown, read_ahead_steps=options.read_ahead_steps)
        for policy, outcome in (
            ("known future", ahead),
            ("LRU", simulate_lru(reads, gib * _GIB, 0, shown)),
        ):
            table.add_row(f"{gib:g} GiB", policy, *_figures(outcome, needed))
    console.print(table)
    return 0


def simulate_lru(reads: NodeReads, capacity: float, start_step: int, stop_step: int) -> Outcome:
    """A cache that fetches what is missing and evicts what was used the longest time ago."""
    tally = Tally(reads.blocks.sizes(), capacity)
    held: OrderedDict[int, None] = OrderedDict()
    uses = 0
    for _, _, blocks in reads.steps(start_step, stop_step):
        uses += len(blocks)
        for block in blocks.tolist():
            if block in held:
                held.move_to_end(block)
                continue
            while held and not tally.has_room(block):
                tally.evict(held.popitem(last=False)[0])
            if tally.has_room(block):
                held[block] = None
                tally.fetch(block)
            else:
                tally.pass_by(block)
    return tally.outcome(uses)


def _natural(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _block_bytes(text: str) -> float:
    return WHOLE_SHARD if text == "null" else _positive(text) * 2**20


def _figures(outcome: Outcome, needed: float) -> tuple[str, str, str]:
    fetched = outcome.fetched_bytes
    return f"{outcome.hit_rate:.1%}", f"{fetched / _GIB:,.2f} GiB", f"{fetched / needed:.1%}"
