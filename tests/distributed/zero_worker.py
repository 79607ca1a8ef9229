"""One rank of the ZeRO cells: every stage, precision and accumulation in a single launch.

Usage: python -m tests.distributed.zero_worker OUT_DIR   (under the ranks' environment)
Writes cells.json (losses, norms) and one safetensors file per cell on rank 0.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pretrain.engine.distributed import init_distributed, shutdown
from pretrain.engine.partitions import list_partitions
from pretrain.engine.zero import accumulate_and_step, set_learning_rate, start_engine
from pretrain.optim.groups import OptimizerSettings
from tests.distributed.toy import share_of, toy_batch, toy_model

STEPS = 20
SEED = 5
SGD = OptimizerSettings(kind="sgd", lr=0.5, weight_decay=0.0, clip_norm=None)
ADAMW = OptimizerSettings(kind="adamw", lr=1e-2, weight_decay=0.05, clip_norm=0.5,
                          lr_multipliers={"objectives.*": 2.0})
OPTIMIZERS = {"sgd": SGD, "adamw": ADAMW}


def cells() -> list[tuple[int, str, str, int]]:
    """(ZeRO stage, precision, optimizer, micro-steps)."""
    fp32 = [(s, "fp32", o, m) for s in (1, 2, 3) for o in ("sgd", "adamw") for m in (1, 2)]
    return fp32 + [(s, "bf16", "adamw", 1) for s in (1, 2, 3)]


def cell_name(stage: int, precision: str, optimizer: str, micro_steps: int) -> str:
    return f"zero{stage}_{precision}_{optimizer}_micro{micro_steps}"


def deepspeed_config(
    stage: int, precision: str, settings: OptimizerSettings, micro_steps: int = 1
) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": settings.clip_norm or 0.0,
        "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20},
    }


def gathered_partitions(engine, pick) -> dict[str, torch.Tensor]:
    """Whole flat tensors by parameter name from every rank's partitions, on every rank."""
    pieces = [
        (f.parameter, f.start, pick(p)[f.offset : f.offset + f.numel].detach().clone())
        for p in list_partitions(engine) for f in p.fragments
    ]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, pieces)
    merged: dict[str, list] = {}
    for name, start, values in (piece for rank in everyone for piece in rank):
        merged.setdefault(name, []).append((start, values))
    return {name: torch.cat([v for _, v in sorted(parts, key=lambda p: p[0])])
            for name, parts in merged.items()}


def run_cell(ranks, stage: int, precision: str, optimizer: str, micro_steps: int, out: Path):
    settings = OPTIMIZERS[optimizer]
    config = deepspeed_config(stage, precision, settings, micro_steps)
    engine = start_engine(toy_model, settings, config, SEED, ranks.device)
    gradients: dict[int, torch.Tensor] = {}

    def note_gradients(inner, *_):
        for group in inner.param_groups:
            for flat in group["params"]:
                gradients[id(flat)] = flat.grad.clone()

    engine.optimizer.optimizer.register_step_pre_hook(note_gradients)
    saved = {f"start.{n}": t for n, t in gathered_partitions(engine, lambda p: p.master).items()}
    losses, norms = [], []
    for step in range(STEPS):
        batch = toy_batch(step)
        micro = share_of(batch, ranks.rank, ranks.world, micro_steps)
        total = torch.tensor(float(batch["valid"].sum()))
        set_learning_rate(engine, settings.lr, 1.0)
        shares = accumulate_and_step(engine, "words", micro, {"images": total})
        loss = shares["loss"].double()
        dist.all_reduce(loss)
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
        grads = gathered_partitions(engine, lambda p: gradients[id(p.master)])
        saved |= {f"gradient{step}.{n}": t for n, t in grads.items()}
    saved |= {f"end.{n}": t for n, t in gathered_partitions(engine, lambda p: p.master).items()}
    if ranks.leads:
        save_file(saved, out / f"{cell_name(stage, precision, optimizer, micro_steps)}.safetensors")
    engine.destroy()
    gc.collect()
    return {"losses": losses, "norms": norms}


def main() -> None:
    out = Path(sys.argv[1])
    ranks = init_distributed(threads_per_rank=1)
    results = {cell_name(*cell): run_cell(ranks, *cell, out) for cell in cells()}
    if ranks.leads:
        (out / "cells.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
