"""One rank of the momentum cells: targets under every ZeRO stage, saved, restored and continued.

Usage: python -m tests.distributed.momentum_worker write|read DIR
`write` trains STEPS steps in every cell, with a checkpoint after HALF, restores it into another
engine and repeats the rest; `read` does the same in one process, and goes on from every
checkpoint of the fp32 cells of world 2 at every stage.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pretrain.engine.checkpoint.checkpoint import Checkpoints, CheckpointSettings
from pretrain.engine.launch.distributed import init_distributed, leave, shutdown
from pretrain.engine.zero.ema import Ema
from pretrain.engine.zero.momentum import TargetNetworks
from pretrain.engine.zero.partitions import gathered, list_partitions
from pretrain.engine.zero.zero import accumulate_and_step, set_learning_rate, start_engine
from pretrain.optim.ema import EmaSettings
from pretrain.optim.momentum import MomentumTargets
from tests.distributed.engines import ADAMW, SEED, deepspeed_config
from tests.distributed.momentum_model import (
    SGD,
    STEPS,
    TARGETS,
    TASKS,
    batch_of,
    following_model,
)
from tests.distributed.toy import share_of

HALF = 3
assert TASKS[HALF] == "follow", "the first step after a restore sees the targets"
CELLS = (
    "zero1-fp32",
    "zero2-fp32",
    "zero3-fp32",
    "zero2-bf16",
    "zero3-bf16",
    "zero2-fp32-offload",
    "zero3-fp32-offload",
)
WHOLE_STAGES = ("zero1-fp32", "zero2-fp32", "zero3-fp32")
STILL = 0.9999
"""A momentum at which an average in bf16 stands still."""
UPDATES, APART = 1000, 0.01
"""Updates of a target, and how far its online weights are when they begin."""


class Run:
    """An engine with its targets, and what came of it."""

    def __init__(
        self, ranks, cell: str, seed: int = SEED, declared: MomentumTargets = TARGETS
    ) -> None:
        stage, precision, *offload = cell.split("-")
        self.settings = SGD if precision == "fp32" else ADAMW
        config = deepspeed_config(int(stage[-1]), precision, self.settings)
        # Pieces travel in several buckets, which cut parameters; large parameters are divided.
        config["zero_optimization"] |= {"allgather_bucket_size": 128, "sub_group_size": 150}
        if offload:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            config["zero_force_ds_cpu_optimizer"] = False
            if stage == "zero3":
                config["zero_optimization"]["offload_param"] = {"device": "cpu"}
        self.ranks, self.cell, self.updates = ranks, cell, 0
        self.engine = start_engine(
            lambda: following_model(declared), self.settings, config, seed, ranks.device
        )
        self.targets = TargetNetworks(self.engine, STEPS)
        self.ema = Ema(self.engine, EmaSettings(decay=0.5))  # of what is trained, beside targets

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            batch = batch_of(step)
            set_learning_rate(self.engine, self.settings.lr, 1.0)
            loss = accumulate_and_step(
                self.engine,
                TASKS[step],
                share_of(batch, self.ranks.rank, self.ranks.world, 1),
                {"images": batch["valid"].sum().float()},
            )["loss"].double()
            if self.engine.was_step_applied():
                self.targets.update(self.updates)
                self.ema.update(self.updates)
                self.updates += 1
            dist.all_reduce(loss)
            losses.append(loss.item())
        return losses

    def masters(self) -> dict[str, torch.Tensor]:
        """Whole flat float32 values of trained parameters and targets, on every rank."""
        pieces = [
            (f.parameter, f.start, p.master[f.offset : f.offset + f.numel].detach().clone())
            for p in [*list_partitions(self.engine), self.targets.partition]
            for f in p.fragments
        ]
        everyone: list = [None] * self.ranks.world
        dist.all_gather_object(everyone, pieces)
        merged: dict[str, list] = {}
        for name, start, values in (piece for rank in everyone for piece in rank):
            merged.setdefault(name, []).append((start, values))
        return {
            name: torch.cat([v for _, v in sorted(parts, key=lambda p: p[0])])
            for name, parts in merged.items()
        }

    def module(self) -> dict[str, torch.Tensor]:
        """What the forward pass uses: parameters, whole and flat, and buffers."""
        out = {}
        for name, parameter in self.engine.module.named_parameters():
            with gathered([parameter]):
                out[name] = parameter.detach().flatten().clone()
        return out | {n: b.clone() for n, b in self.engine.module.named_buffers()}

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"{kind}.{name}": value
            for kind, tensors in (("master", self.masters()), ("module", self.module()))
            for name, value in tensors.items()
        }

    def close(self) -> None:
        self.engine.destroy()
        gc.collect()


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def straight_cell(ranks, folder: Path, cell: str) -> dict:
    name = f"world{ranks.world}-{cell}"
    store = Checkpoints(folder / name, CheckpointSettings(keep_last=1))
    run = Run(ranks, cell)
    run.targets.start()
    started = run.module()
    losses = run.train(0, HALF)
    updates = run.updates
    store.save(run.engine, HALF, {}, run.ema.tensors, run.targets)
    losses += run.train(HALF, STEPS)
    ended = run.state()
    pieces = torch.tensor(run.targets.partition.master.numel())
    dist.all_reduce(pieces)
    run.close()
    again = Run(ranks, cell, seed=SEED + 1)  # so all of it must come back
    store.restore(again.engine, store.newest(), again.ema.tensors, again.targets)
    again.updates = updates
    resumed = again.train(HALF, STEPS)
    result = {
        "losses": losses,
        "resumed": resumed,
        "updates": again.updates,
        "same": same(again.state(), ended),
        "pieces": pieces.item(),
    }
    again.close()
    if ranks.leads:
        save_file(ended, folder / f"{name}.safetensors")
        save_file(started, folder / f"{name}-started.safetensors")
    return result


def read_cell(ranks, folder: Path, source: str, cell: str) -> list[float]:
    store = Checkpoints(folder / f"world2-{source}", CheckpointSettings())
    run = Run(ranks, cell, seed=SEED + 1)
    store.restore(run.engine, store.newest(), run.ema.tensors, run.targets)
    run.updates = HALF - 1
    losses = run.train(HALF, STEPS)
    ended = run.state()
    run.close()
    if ranks.leads:
        save_file(ended, folder / f"{source}-to-{cell}.safetensors")
    return losses


def still_cell(ranks, folder: Path, cell: str) -> None:
    """UPDATES updates towards weights that stay where they are."""
    run = Run(ranks, cell, declared=replace(TARGETS, start=STILL, end=STILL))
    run.targets.start()
    before = run.masters()
    for partition in list_partitions(run.engine):
        partition.master.data.add_(APART)
    for update in range(UPDATES):
        run.targets.update(update)
    after = run.state() | {f"before.{name}": value for name, value in before.items()}
    run.close()
    if ranks.leads:
        save_file(after, folder / f"still-{cell}.safetensors")


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    ranks = init_distributed(threads_per_rank=1)
    cells = CELLS if mode == "write" else WHOLE_STAGES
    results: dict = {cell: straight_cell(ranks, folder, cell) for cell in cells}
    if mode == "read":
        for cell in ("zero2-bf16", "zero3-bf16"):
            still_cell(ranks, folder, cell)
        results |= {
            f"{source}-to-{cell}": read_cell(ranks, folder, source, cell)
            for source in WHOLE_STAGES
            for cell in WHOLE_STAGES
        }
    if ranks.leads:
        (folder / f"{mode}.json").write_text(json.dumps(results))
    dist.barrier()
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)
