"""One rank of the cells of coupled losses: every stage and division of a batch in one launch.

Usage: python -m tests.distributed.coupled_worker OUT_DIR   (under the ranks' environment)
Writes cells.json (losses, metrics, whether the replay was exact) and one safetensors file with the
gradients of each cell on rank 0.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from data_pipeline.step_sampler import deal
from pretrain.engine.distributed import init_distributed, leave, shutdown
from pretrain.engine.zero import accumulate_and_step, set_learning_rate, start_engine
from pretrain.optim.groups import OptimizerSettings
from tests.distributed.engines import deepspeed_config
from tests.pretrain.objectives.pair_models import build_pair_model, pair_batch, rows_of
from tools.parity_cells import gathered_partitions, note_gradients

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
            engine, "contrast", [rows_of(batch, rows) for rows in dealt],
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


def main() -> None:
    out = Path(sys.argv[1])
    ranks = init_distributed(threads_per_rank=1)
    results = {}
    for cell in cells():
        found = run_cell(ranks, *cell, out)
        exact: list = [None] * ranks.world
        dist.all_gather_object(exact, found["exact"])
        results[cell_name(*cell)] = found | {"exact": exact}
    if ranks.leads:
        (out / "cells.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)
