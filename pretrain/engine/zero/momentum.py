"""Momentum targets under ZeRO: float32 pieces beside the master weights, cast into the module.

What an objective declares (`optim.momentum.MomentumTargets`) is done here, for all objectives of a
model. A rank keeps a target's float32 values for just those elements whose online master weights
it has, so that an update needs no communication and costs 4/N bytes a target parameter on N ranks.
In bf16 an average of the module's own weights would stand still: a step of (1 - m) = 1e-4 of a
difference is lost in 8 bits.

What the forward pass sees follows by a cast. ZeRO-1 and 2 keep whole weights on every rank, so the
pieces are gathered, in buckets; of one target they are never more than what DeepSpeed gathers of
the trained weights in the same step. ZeRO-3 divides target and online parameters alike, so every
rank writes into its own part, and nothing but small parameters, which stay whole, is sent.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.engine.zero.momentum_pairs import (
    buffer_pairs,
    declared_targets,
    moving_targets,
    target_sources,
)
from pretrain.engine.zero.partitions import (
    Fragment,
    Partition,
    fragments_of_all_ranks,
    list_partitions,
)

NO_GROUP = -1
"""Target pieces belong to no group of the optimizer."""


class TargetNetworks:
    """The momentum targets of all objectives, as far as this rank keeps them.

    Give them the online weights with `start` in a new run, or fill `partition` and call `push`.

    Args:
        engine: a DeepSpeed engine (ZeRO 1, 2 or 3) whose module is a `MultiTaskModel`.
        updates: optimizer steps of the run, over which the momentum rises.

    Attributes:
        sources: target parameter -> online parameter, of those that move: on all ranks the same.
        partition: this rank's float32 pieces (numel,), on the device of the master weights, with
            fragments that name target parameters.

    Raises:
        ValueError: see `target_sources` and `list_partitions`.
    """

    def __init__(self, engine, updates: int) -> None:
        self.engine = engine
        self.updates = updates
        model = engine.module
        self._parameters = dict(model.named_parameters())
        moving = moving_targets(model)
        self.sources = {target: online for target, (_, online) in moving.items()}
        self._still = [
            (self._parameters[t], self._parameters[online])
            for t, (_, online) in target_sources(model).items()
            if t not in moving
        ]
        self._targets = declared_targets(model)
        self._divided = engine.zero_optimization_stage() == 3
        self._lay_out({target: task for target, (task, _) in moving.items()})

    def _lay_out(self, tasks: dict[str, str]) -> None:
        """Place the pieces of this rank and, where they are gathered, those of all others."""
        followers: dict[str, list[str]] = {}
        for target, online in self.sources.items():
            followers.setdefault(online, []).append(target)
        partitions = list_partitions(self.engine)
        self._masters = [partition.master for partition in partitions]
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = _followed((f for p in partitions for f in p.fragments), followers)
        if self._divided:
            self._places = {rank: mine}
        else:
            ranks = fragments_of_all_ranks(self.engine)
            self._places = {r: _followed(ranks[r], followers) for r in range(world)}
        self.partition = Partition(
            NO_GROUP,
            torch.zeros(_length(mine), dtype=torch.float32, device=self._masters[0].device),
            mine,
        )
        # task -> [(offset in our tensor, partition, offset in its master, elements)]
        self._moves: dict[str, list[tuple[int, int, int, int]]] = {}
        places = iter(mine)
        for index, partition in enumerate(partitions):
            for source in partition.fragments:
                for target in followers.get(source.parameter, ()):
                    place = next(places)
                    move = (place.offset, index, source.offset, source.numel)
                    self._moves.setdefault(tasks[target], []).append(move)
        longest = max((_length(places) for places in self._places.values()), default=0)
        at_once = getattr(self.engine.optimizer, "allgather_bucket_size", None) or 2**25
        self._longest, self._bucket = longest, max(1, min(longest, int(at_once) // world))

    # ---- between steps -------------------------------------------------------------------------

    @torch.no_grad()
    def start(self) -> None:
        """Make every target a copy of its online module. A collective."""
        for moves in self._moves.values():
            mine, theirs = self._pieces(moves)
            torch._foreach_copy_(mine, theirs)
        self._copy_still()
        self._copy_buffers()
        self.push()

    @torch.no_grad()
    def update(self, update: int) -> None:
        """Follow the online weights after optimizer step number `update` that was applied, counted
        from 0. A collective."""
        for task, moves in self._moves.items():
            weight = 1.0 - self._targets[task].momentum_at(update, self.updates)
            mine, theirs = self._pieces(moves)
            torch._foreach_lerp_(mine, theirs, weight)
        self._copy_buffers()
        self.push()

    def _pieces(self, moves: list[tuple[int, int, int, int]]) -> tuple[list[Tensor], list[Tensor]]:
        """Views of our pieces, and of the master weights that they follow."""
        flat = self.partition.master
        masters = [master.data for master in self._masters]
        return (
            [flat[offset : offset + n] for offset, _, _, n in moves],
            [masters[index][start : start + n] for _, index, start, n in moves],
        )

    def _copy_buffers(self) -> None:
        for target, online in buffer_pairs(self.engine.module):
            target.copy_(online)

    def _copy_still(self) -> None:
        """Targets of frozen parameters, which have no master weights."""
        shut = self._shut([target for target, _ in self._still])
        for target, online in self._still:
            if self._divided:
                target.ds_tensor.copy_(online.ds_tensor)
            else:
                target.copy_(online)
        self._reopen(shut)

    # ---- from the pieces to the module ---------------------------------------------------------

    @torch.no_grad()
    def push(self) -> None:
        """Make the module's targets what `partition` says. A collective."""
        if not self.sources:
            return
        targets = [self._parameters[name] for name in self.sources]
        shut = self._shut(targets)
        dtypes = {parameter.dtype for parameter in targets}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        device = self.engine.device
        if self._divided:  # where the larger ones lie: with offloaded weights not on the device
            device = max(targets, key=lambda p: p.ds_numel).ds_tensor.device
        flat, world = self.partition.master, dist.get_world_size()
        for begin in range(0, self._longest, self._bucket):
            size = min(self._bucket, self._longest - begin)
            piece = torch.zeros(size, dtype=dtype, device=device)
            part = flat[begin : begin + size]
            piece[: part.numel()].copy_(part)
            if self._divided or world == 1:
                self._write(dist.get_rank(), begin, piece)
                continue
            pieces = torch.empty(world * size, dtype=dtype, device=device)
            dist.all_gather_into_tensor(pieces, piece)
            for rank, received in enumerate(pieces.split(size)):
                self._write(rank, begin, received)
        self._reopen(shut)

    def _write(self, rank: int, begin: int, piece: Tensor) -> None:
        """Elements [begin, begin + n) of a rank's pieces (n,) go to where they belong here."""
        into, values = [], []
        for place in self._places[rank]:
            low = max(begin, place.offset)
            high = min(begin + piece.numel(), place.offset + place.numel)
            if low >= high:
                continue
            first = place.start + low - place.offset
            parameter = self._parameters[place.parameter]
            if self._divided:
                whole = parameter.ds_tensor
                first -= rank * parameter.partition_numel()
            else:
                whole = parameter.data.view(-1)
            into.append(whole[first : first + high - low])
            values.append(piece[low - begin : high - begin])
        if into:
            torch._foreach_copy_(into, values)

    def _shut(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Under ZeRO-3, let go of whole copies, which would not show what is written; which."""
        if not self._divided:
            return []
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        whole = [p for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE]
        if whole:
            whole[0].partition(whole)
        return whole

    def _reopen(self, parameters: list[nn.Parameter]) -> None:
        """Make those whole again that were: in one call."""
        if parameters:
            parameters[0].all_gather(parameters)


def _followed(fragments: Iterable[Fragment], followers: Mapping[str, list[str]]) -> list[Fragment]:
    """Pieces of targets for fragments of online parameters, one behind the other."""
    places: list[Fragment] = []
    offset = 0
    for f in fragments:
        for target in followers.get(f.parameter, ()):
            places.append(Fragment(target, f.start, offset, f.numel))
            offset += f.numel
    return places


def _length(places: list[Fragment]) -> int:
    return places[-1].offset + places[-1].numel if places else 0
