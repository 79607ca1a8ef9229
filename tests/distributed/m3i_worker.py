"""One rank of the M3I cells: every ZeRO stage and division of a batch in one launch.

Usage: python -m tests.distributed.m3i_worker OUT_DIR CELL...   (under the ranks' environment)
Writes cells.json (metrics of each step) and one safetensors file per cell with gradients of the
first step and the float32 weights at the end.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from data_pipeline.order.step_sampler import deal
from pretrain.engine.launch.distributed import init_distributed, leave, shutdown
from pretrain.engine.zero.momentum import TargetNetworks
from pretrain.engine.zero.zero import accumulate_and_step, set_learning_rate, start_engine
from pretrain.optim.groups import OptimizerSettings
from tests.distributed.engines import SEED, deepspeed_config
from tests.pretrain.objectives.m3i.m3i_models import build_m3i, m3i_batch, m3i_rows
from tools.selfcheck.parity_cells import gathered_partitions, note_gradients

GLOBAL_BATCH = 12
STEPS = 3
SGD = OptimizerSettings(kind="sgd", lr=0.05, weight_decay=0.0, clip_norm=None)
MOMENTUM = {"momentum_start": 0.5, "momentum_end": 0.9}
SIZES = {"vit": (16, 16), "internimage": (32, 96)}
# Encoder, ZeRO stage, micro-batch, balance. On two ranks: undivided (6 rows each), in fours and
# twos (with padding), and in twos.
CELLS = [
    ("vit", 1, 12, False),
    ("vit", 1, 4, False),
    ("vit", 2, 12, False),
    ("vit", 2, 2, False),
    ("vit", 3, 12, False),
    ("vit", 3, 4, False),
    ("vit", 3, 2, False),
    ("vit", 2, 12, True),
    ("internimage", 3, 12, False),
    ("internimage", 3, 4, False),
]
FAST = [
    ("vit", 1, 4, False),
    ("vit", 2, 12, True),
    ("vit", 3, 2, False),
    ("internimage", 3, 4, False),
]


def cell_name(kind: str, stage: int, micro_batch: int, balance: bool) -> str:
    return f"{kind}_zero{stage}_micro{micro_batch}" + "_balance" * balance


def build(kind: str, balance: bool):
    changes = {"balance": {"every_steps": 2}} if balance else {}
    return build_m3i(kind, **MOMENTUM, **changes)


def batch_of(kind: str, step: int) -> dict:
    return m3i_batch(GLOBAL_BATCH, seed=step, size=SIZES[kind], start=GLOBAL_BATCH * step)


def run_cell(ranks, kind: str, stage: int, micro_batch: int, balance: bool, out: Path) -> list:
    dealt = deal(GLOBAL_BATCH, micro_batch, ranks.rank, ranks.world)
    config = deepspeed_config(stage, "fp32", SGD, len(dealt))
    # Nothing stays gathered: whatever reads a parameter outside of forward would find it empty.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = start_engine(lambda: build(kind, balance), SGD, config, SEED, ranks.device)
    targets = TargetNetworks(engine, STEPS)
    targets.start()
    gradients = note_gradients(engine)
    found, saved = [], {}
    objective, asked = engine.module.objectives["m3i"], []
    objective.target.register_forward_pre_hook(lambda *_: asked.append(1))
    for step in range(STEPS):
        batch = batch_of(kind, step)
        set_learning_rate(engine, SGD.lr, 1.0)
        totals = {name: torch.tensor(float(n)) for name, n in objective.counts(batch).items()}
        shares = accumulate_and_step(
            engine, "m3i", [m3i_rows(batch, rows) for rows in dealt], totals
        )
        targets.update(step)
        names = sorted(shares)
        values = torch.stack([shares[name].double() for name in names])
        dist.all_reduce(values)
        found.append(dict(zip(names, values.tolist(), strict=True)))
        if not step:
            saved |= {f"gradient.{name}": value for name, value in gradients().items()}
    assert len(asked) == STEPS * len(dealt), "a second pass needs no targets again"
    weights = gathered_partitions(engine, lambda p: p.master)
    saved |= {f"end.{name}": value for name, value in weights.items()}
    if ranks.leads:
        save_file(saved, out / f"{cell_name(kind, stage, micro_batch, balance)}.safetensors")
    engine.destroy()
    gc.collect()
    return found


def main() -> None:
    out = Path(sys.argv[1])
    ranks = init_distributed(threads_per_rank=1)
    results = {
        cell_name(*cell): run_cell(ranks, *cell, out)
        for cell in CELLS
        if cell_name(*cell) in sys.argv[2:]
    }
    if ranks.leads:
        (out / "cells.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)
