"""What this rank owns under ZeRO: flat fp32 partitions, and the parameter of each element.

DeepSpeed keeps the fp32 master weights of a parameter group as one flat tensor per rank (stage 1
and 2) or as one flat tensor per sub-group and rank (stage 3), cut anywhere in a parameter. This
file gives both the same shape: a list of `Partition`s with named `Fragment`s. Everything that is
element-wise and outlives a step (checkpoints, averages of the weights) works on that list.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class Fragment:
    """`numel` elements of a parameter from `start` (row-major), at `offset` in the partition."""

    parameter: str
    start: int
    offset: int
    numel: int


@dataclass
class Partition:
    """One flat fp32 tensor of this rank.

    `master` (numel,) float32; the part of it that no fragment names is alignment padding: zero
    (`clear_padding`), as is its gradient.
    `group` is the index of the optimizer's parameter group.
    """

    group: int
    master: torch.Tensor
    fragments: list[Fragment] = field(default_factory=list)


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Map id(parameter) to its first name; a tied parameter has one name and one owner."""
    named = list(model.named_parameters(remove_duplicate=False))
    return {id(parameter): name for name, parameter in reversed(named)}


def list_partitions(engine) -> list[Partition]:
    """Partitions of this rank, in DeepSpeed's order, for ZeRO stage 1, 2 or 3.

    Args:
        engine: the engine that `deepspeed.initialize` returned.

    Raises:
        ValueError: the engine's optimizer is not a ZeRO optimizer of stage 1, 2 or 3.
    """
    zero = engine.optimizer
    names = parameter_names(engine.module)
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(_stage3(zero, names))
    if hasattr(zero, "single_partition_of_fp32_groups") and hasattr(zero, "partition_size"):
        return list(_stage12(zero, names))
    raise ValueError(
        f"{type(zero).__name__} keeps no fp32 partitions that this project can read; use ZeRO "
        "stage 1, 2 or 3 (ds_configs/README.md)"
    )


def fragments_of_all_ranks(engine) -> list[list[Fragment]]:
    """Fragments of every rank under ZeRO-1 or 2, in the order of its `list_partitions`."""
    zero = engine.optimizer
    names = parameter_names(engine.module)
    groups = [_cut(zero, group, names) for group in range(len(zero.partition_size))]
    return [[f for group in groups for f in group[rank]] for rank in range(len(groups[0]))]


def _stage12(zero, names: dict[int, str]) -> Iterator[Partition]:
    for group, master in enumerate(zero.single_partition_of_fp32_groups):
        rank = torch.distributed.get_rank(group=zero.real_dp_process_group[group])
        yield Partition(group, master, _cut(zero, group, names)[rank])


def _cut(zero, group: int, names: dict[int, str]) -> list[list[Fragment]]:
    """A group's parameters, one behind the other, cut into equal parts: fragments of each rank."""
    size = zero.partition_size[group]
    world = torch.distributed.get_world_size(group=zero.real_dp_process_group[group])
    ranks: list[list[Fragment]] = [[] for _ in range(world)]
    tensors = zero.round_robin_bit16_groups[group]
    offsets = zero.round_robin_bit16_offsets[group]
    for parameter, flat_start in zip(tensors, offsets, strict=True):
        position, end = flat_start, flat_start + parameter.numel()
        while position < end:
            rank = position // size
            stop = min(end, (rank + 1) * size)
            ranks[rank].append(
                Fragment(
                    names[id(parameter)],
                    position - flat_start,
                    position - rank * size,
                    stop - position,
                )
            )
            position = stop
    return ranks


def _stage3(zero, names: dict[int, str]) -> Iterator[Partition]:
    for sub_group, (parameters, master) in enumerate(
        zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
    ):
        rank = torch.distributed.get_rank(group=zero.sub_group_process_groups[sub_group])
        partition = Partition(zero.sub_group_to_group_id[sub_group], master)
        offset = 0
        for parameter in parameters:
            share = parameter.partition_numel()  # of every rank alike; the last ones hold padding
            start = rank * share
            numel = min(share, parameter.ds_numel - start)
            if numel > 0:
                partition.fragments.append(Fragment(names[id(parameter)], start, offset, numel))
            offset += share
        yield partition


@torch.no_grad()
def clear_padding(engine) -> None:
    """Zero the alignment padding of the masters, where ZeRO-3 leaves what was in the memory: equal
    runs have equal files."""
    for partition in list_partitions(engine):
        end = 0
        for f in sorted(partition.fragments, key=lambda f: f.offset):
            partition.master[end : f.offset].zero_()
            end = f.offset + f.numel
        partition.master[end:].zero_()


@torch.no_grad()
def push_masters_to_module(engine) -> None:
    """Make the module's weights those of the fp32 partitions, on every rank. A collective."""
    zero = engine.optimizer
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    # Small parameters stay gathered between steps, and others after a forward pass without a
    # backward one: what they show is out of date, and DeepSpeed gathers only what is partitioned.
    zero._partition_all_parameters()
    for sub_group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(sub_group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def gathered(parameters: list[nn.Parameter], writable: bool = False):
    """Context in which ZeRO-3 parameters are whole; does nothing for ordinary ones. A collective.

    With `writable`, what rank 0 writes is kept and sent to all ranks.
    """
    import contextlib

    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if writable else None)
