"""One rank of the elastic cells: MT-AdamW and moving averages through checkpoints of any world.

Usage: python -m tests.distributed.elastic_worker write|read DIR [SOURCE_WORLD ...]
`write` trains ALL steps at every ZeRO stage, with a checkpoint after HALF of them, restores it and
repeats the rest; `read` restores what other worlds wrote into every stage and goes on.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pretrain.engine.checkpoint import files as checkpoint_files
from pretrain.engine.checkpoint.checkpoint import CheckpointError, Checkpoints, CheckpointSettings
from pretrain.engine.launch.distributed import init_distributed, leave, shutdown
from pretrain.engine.zero.ema import Ema
from pretrain.engine.zero.partitions import list_partitions
from pretrain.engine.zero.zero import start_engine
from pretrain.optim.ema import EmaSettings
from tests.distributed.balance_worker import module_weights
from tests.distributed.engines import SEED, deepspeed_config
from tests.distributed.two_tasks import MT_ADAMW, balance_for, take_step, two_task_model
from tools.selfcheck.parity_cells import gathered_partitions

HALF, ALL = 3, 7
STAGES = (1, 2, 3)
EMA = EmaSettings(decay=0.9)
# Two blocks of groups, so that their order and rates have to come back, too.
FROZEN = ("encoders.image.inner.bias", "objectives.shapes.output.bias")
SETTINGS = MT_ADAMW.model_copy(
    update={
        "lr_multipliers": {"objectives.*": 2.0, "*norm*": 0.5},
        "frozen": FROZEN,
    }
)


class Run:
    """An engine with its average, balance and losses."""

    def __init__(self, ranks, stage: int, precision: str, seed: int = SEED) -> None:
        config = deepspeed_config(stage, precision, SETTINGS)
        config["zero_optimization"]["sub_group_size"] = 150
        self.ranks = ranks
        self.engine = start_engine(two_task_model, SETTINGS, config, seed, ranks.device)
        self.balance = balance_for(self.engine, SETTINGS)
        self.ema = Ema(self.engine, EMA)

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            loss = take_step(self.engine, self.balance, SETTINGS, self.ranks, step).double()
            self.ema.update(step)
            dist.all_reduce(loss)
            losses.append(loss.item())
        return losses

    def tensors(self) -> dict[str, torch.Tensor]:
        """Whole weights, averages and moments by name, on every rank."""
        partitions = list_partitions(self.engine)
        averages = {id(p.master): t for p, t in zip(partitions, self.ema.tensors, strict=True)}
        inner = self.engine.optimizer.optimizer
        picks = {
            "master": lambda p: p.master,
            "ema": lambda p: averages[id(p.master)],
            "exp_avg": lambda p: inner.state[p.master]["exp_avg"],
            "exp_avg_sq": lambda p: inner.second_moment(p.master),
        }
        return {
            f"{state}.{name}": values
            for state, pick in picks.items()
            for name, values in gathered_partitions(self.engine, pick).items()
        }

    def groups(self) -> list:
        inner = self.engine.optimizer
        return [
            [g["name"], g["lr"], g["lr_multiplier"], g["weight_decay"]] for g in inner.param_groups
        ]

    def close(self) -> None:
        self.engine.destroy()
        gc.collect()


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def write_cell(ranks, folder: Path, stage: int, precision: str) -> dict:
    name = cell_name(ranks.world, stage, precision)
    store = Checkpoints(folder / name, CheckpointSettings(keep_last=1))
    run = Run(ranks, stage, precision)
    run.train(0, HALF)
    store.save(run.engine, HALF, {}, run.ema.tensors)
    straight = run.train(HALF, ALL)
    ended, module, groups = run.tensors(), module_weights(run.engine), run.groups()
    run.close()
    again = Run(ranks, stage, precision, seed=SEED + 1)  # so all of it must come back
    store.restore(again.engine, store.newest(), again.ema.tensors)
    resumed = again.train(HALF, ALL)
    result = {
        "straight": straight,
        "resumed": resumed,
        "groups": groups,
        "same_tensors": same(again.tensors(), ended),
        "same_groups": again.groups() == groups,
        "same_module": same(module_weights(again.engine), module),
    }
    if ranks.leads:
        save_file(ended, folder / f"{name}.safetensors")
    again.close()
    return result


def read_cell(ranks, folder: Path, source: str, stage: int) -> dict:
    store = Checkpoints(folder / source, CheckpointSettings())
    run = Run(ranks, stage, "fp32", seed=SEED + 1)
    restored = store.restore(run.engine, store.newest(), run.ema.tensors)
    result = {"resumed": run.train(restored.step, ALL), "groups": run.groups()}
    ended = run.tensors()
    if ranks.leads:
        save_file(ended, folder / f"{read_name(source, ranks.world, stage)}.safetensors")
    run.close()
    return result


def memory_cell(ranks, folder: Path) -> dict:
    """What a restore holds beside the tensors that it fills: the largest piece it takes in hand."""
    pieces: list[int] = []
    open_file = checkpoint_files.FragmentReader._file

    class Watched:
        def __init__(self, file) -> None:
            self.file = file

        def get_slice(self, name: str):
            return WatchedSlice(self.file.get_slice(name))

    class WatchedSlice:
        def __init__(self, inner) -> None:
            self.inner = inner

        def __getitem__(self, key):
            piece = self.inner[key]
            pieces.append(piece.numel())
            return piece

    checkpoint_files.READ_AT_ONCE = 40
    checkpoint_files.FragmentReader._file = lambda self, rank: Watched(open_file(self, rank))
    store = Checkpoints(folder / cell_name(ranks.world, 2, "fp32"), CheckpointSettings())
    run = Run(ranks, 3, "fp32", seed=SEED + 1)
    placed = {id(p.master): p.master.data_ptr() for p in list_partitions(run.engine)}
    averages = [t.data_ptr() for t in run.ema.tensors]
    store.restore(run.engine, store.newest(), run.ema.tensors)
    partitions = list_partitions(run.engine)
    wanted = sum(f.numel for p in partitions for f in p.fragments)
    result = {
        "largest": max(pieces),
        "read": sum(pieces),
        "wanted": wanted,
        "in_place": all(placed[id(p.master)] == p.master.data_ptr() for p in partitions)
        and averages == [t.data_ptr() for t in run.ema.tensors],
    }
    run.close()
    return result


def refusal_cell(ranks, folder: Path) -> dict:
    """An average is asked of a checkpoint that has none; one that is not wanted is passed over."""
    root = folder / "without_average"
    run = Run(ranks, 2, "fp32")
    run.train(0, 1)
    store = Checkpoints(root, CheckpointSettings())
    store.save(run.engine, 1, {})
    result = {"refused": "no error"}
    try:
        store.restore(run.engine, store.newest(), run.ema.tensors)
    except CheckpointError as error:
        result["refused"] = str(error)
    kept = Checkpoints(folder / cell_name(ranks.world, 2, "fp32"), CheckpointSettings())
    kept.restore(run.engine, kept.newest())
    state = run.engine.optimizer.optimizer.state
    result["states"] = sorted({name for values in state.values() for name in values})
    run.close()
    return result


def cell_name(world: int, stage: int, precision: str) -> str:
    return f"world{world}_zero{stage}_{precision}"


def read_name(source: str, world: int, stage: int) -> str:
    return f"{source}-to-world{world}_zero{stage}"


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    ranks = init_distributed(threads_per_rank=1)
    if mode == "write":
        cells = (
            [(s, p) for s in STAGES for p in ("fp32", "bf16")]
            if ranks.world == 2
            else [(s, "fp32") for s in STAGES]
        )
        results = {cell_name(ranks.world, s, p): write_cell(ranks, folder, s, p) for s, p in cells}
        if ranks.world == 2:
            results["memory"] = memory_cell(ranks, folder)
            results["refusal"] = refusal_cell(ranks, folder)
    else:
        sources = [cell_name(int(w), s, "fp32") for w in sys.argv[3:] for s in STAGES]
        results = {
            read_name(source, ranks.world, stage): read_cell(ranks, folder, source, stage)
            for source in sources
            for stage in STAGES
        }
    if ranks.leads:
        (folder / f"{mode}_world{ranks.world}.json").write_text(json.dumps(results))
    dist.barrier()
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)
