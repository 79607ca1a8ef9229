"""One rank of the cells of coupled losses and of features that belong to no sample: every stage and
division of a batch in one launch.

Usage: python -m tests.distributed.coupled_worker OUT_DIR   (under the ranks' environment)
Writes cells.json (losses, metrics, whether the replay was exact) and one safetensors file with the
gradients of each cell on rank 0.
"""

import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from data_pipeline.order.step_sampler import deal
from pretrain.engine.launch.distributed import init_distributed, leave, shutdown
from pretrain.engine.zero.zero import accumulate_and_step, set_learning_rate, start_engine
from pretrain.optim.groups import OptimizerSettings
from tests.distributed import shared_model
from tests.distributed.engines import deepspeed_config
from tests.pretrain.objectives.pair_models import build_pair_model, pair_batch, rows_of
from tests.pretrain.objectives.unified import unified_models
from tools.selfcheck.parity_cells import gathered_partitions, note_gradients

GLOBAL_BATCH = 10
STEPS = 3
SEED = 5
SGD = OptimizerSettings(kind="sgd", lr=0.5, weight_decay=0.0, clip_norm=None)
# Ten samples: undivided (a plain step), in twos and fours (uneven), and one by one.
MICRO_BATCHES = (10, 4, 2, 1)


def cells() -> list[tuple[int, int, float]]:
    """(ZeRO stage, micro-batch, dropout)."""
    return [(s, m, 0.0) for s in (1, 2, 3) for m in MICRO_BATCHES] + [
        (s, 2, 0.4) for s in (1, 2, 3)
    ]


def cell_name(stage: int, micro_batch: int, dropout: float) -> str:
    return f"zero{stage}_micro{micro_batch}_dropout{dropout:g}"


def watch_replay(engine, seen: list) -> None:
    """Note every feature that the engine's forward pass gives, in order."""

    def note(_, arguments, out) -> None:
        if arguments[1] == "features":
            seen.append({k: v.detach().clone() for k, v in out.items()})

    engine.module.objectives["contrast"].register_forward_hook(note)


def replayed_exactly(seen: list[dict], micro_steps: int) -> bool:
    """Whether the second half of what was seen is the first, bit for bit."""
    first, second = seen[:micro_steps], seen[micro_steps:]
    return len(seen) == 2 * micro_steps and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(first, second, strict=True)
    )


def run_cell(ranks, stage: int, micro_batch: int, dropout: float, out: Path) -> dict:
    dealt = deal(GLOBAL_BATCH, micro_batch, ranks.rank, ranks.world)
    config = deepspeed_config(stage, "fp32", SGD, len(dealt))
    # Nothing stays gathered: whatever reads a parameter outside of forward would find it empty.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = start_engine(lambda: build_pair_model(dropout), SGD, config, SEED, ranks.device)
    gradients = note_gradients(engine)
    seen: list[dict] = []
    watch_replay(engine, seen)
    result: dict = {"losses": [], "metrics": [], "exact": []}
    saved = {}
    for step in range(STEPS):
        batch = pair_batch(GLOBAL_BATCH, seed=step)
        seen.clear()
        torch.manual_seed(100 * step + ranks.rank)
        set_learning_rate(engine, SGD.lr, 1.0)
        shares = accumulate_and_step(
            engine,
            "contrast",
            [rows_of(batch, rows) for rows in dealt],
            {"pairs": torch.tensor(float(GLOBAL_BATCH))},
        )
        values = torch.stack([shares[name].double() for name in sorted(shares)])
        dist.all_reduce(values)
        metrics = dict(zip(sorted(shares), values.tolist(), strict=True))
        result["losses"].append(metrics["loss"])
        result["metrics"].append(metrics)
        result["exact"].append(replayed_exactly(seen, len(dealt)) if len(dealt) > 1 else None)
        saved |= {f"gradient{step}.{name}": value for name, value in gradients().items()}
    weights = gathered_partitions(engine, lambda p: p.master)
    saved |= {f"end.{name}": value for name, value in weights.items()}
    if ranks.leads:
        save_file(saved, out / f"{cell_name(stage, micro_batch, dropout)}.safetensors")
    engine.destroy()
    gc.collect()
    return result


# ---- features that belong to no sample ------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """A mode of `shared_model` or `unified_models`. `extra`: "", "overlap", "offload" or "scaled",
    fp16's factor."""

    stage: int
    micro_steps: int
    extra: str = ""
    model: str = "shared"

    @property
    def name(self) -> str:
        return f"{self.model}_zero{self.stage}_micro{self.micro_steps}{self.extra}"

    @property
    def tasks(self) -> ModuleType:
        """The model, its tasks, their batches, and plain training."""
        return {"shared": shared_model, "unified": unified_models}[self.model]


SHARED_CELLS = [Shared(stage, steps) for stage in (1, 2, 3) for steps in (1, 3)]
SHARED_CELLS += [Shared(s, 3, extra) for s in (1, 2, 3) for extra in ("overlap", "offload")]
SHARED_CELLS += [Shared(s, 3, "scaled") for s in (2, 3)]
SHARED_CELLS += [Shared(s, n, model="unified") for s in (1, 3) for n in (1, 3)]


def micro_batch_for(samples: int, world: int, micro_steps: int) -> int:
    """Largest micro-batch that gives so many micro-steps."""
    return next(
        size
        for size in range(samples + 1, 0, -1)
        if len(deal(samples, size, 0, world)) == micro_steps
    )


def shared_settings(cell: Shared) -> dict:
    config = deepspeed_config(cell.stage, "fp32", cell.tasks.SGD, cell.micro_steps)
    zero = config["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = 0
    zero["overlap_comm"] = cell.extra == "overlap"
    if cell.extra == "offload":
        config["zero_force_ds_cpu_optimizer"] = False
        zero["offload_optimizer"] = {"device": "cpu"}
        if cell.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return config


def run_shared(ranks, cell: Shared, out: Path) -> None:
    tasks = cell.tasks
    size = micro_batch_for(tasks.SAMPLES, ranks.world, cell.micro_steps)
    dealt = deal(tasks.SAMPLES, size, ranks.rank, ranks.world)
    engine = start_engine(tasks.build, tasks.SGD, shared_settings(cell), tasks.SEED, ranks.device)
    if cell.extra == "scaled":
        engine.optimizer.loss_scaler.cur_scale = 1024.0
    gradients, saved = note_gradients(engine), {}
    for step, task in enumerate(tasks.TASKS):
        set_learning_rate(engine, tasks.SGD.lr, 1.0)
        batch = tasks.whole_batch(step)
        totals = {name: torch.tensor(value) for name, value in tasks.totals_of(step).items()}
        micro_batches = [tasks.rows_of(batch, rows) for rows in dealt]
        loss = accumulate_and_step(engine, task, micro_batches, totals, step)["loss"]
        dist.all_reduce(loss)
        saved[f"loss{step}"] = loss
        saved |= {f"gradient{step}.{name}": value for name, value in gradients().items()}
    weights = gathered_partitions(engine, lambda p: p.master)
    saved |= {f"end.{name}": value for name, value in weights.items()}
    if ranks.leads:
        save_file(saved, out / f"{cell.name}.safetensors")
    engine.destroy()
    gc.collect()


def main() -> None:
    out = Path(sys.argv[1])
    ranks = init_distributed(threads_per_rank=1)
    results = {}
    for cell in cells():
        found = run_cell(ranks, *cell, out)
        exact: list = [None] * ranks.world
        dist.all_gather_object(exact, found["exact"])
        results[cell_name(*cell)] = found | {"exact": exact}
    for shared in SHARED_CELLS:
        run_shared(ranks, shared, out)
    if ranks.leads:
        (out / "cells.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)
