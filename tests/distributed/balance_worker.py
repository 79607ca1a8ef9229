"""One rank of the cells of MT-AdamW, per-task clipping and moving averages, at every ZeRO stage.

Usage: python -m tests.distributed.balance_worker OUT_DIR PART...   (under the ranks' environment)
Writes cells.json (norms, update sizes) and one safetensors file per cell on rank 0.
"""

import gc
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from pretrain.engine.launch.distributed import init_distributed, leave, shutdown
from pretrain.engine.zero.balance import TaskBalance
from pretrain.engine.zero.ema import Ema
from pretrain.engine.zero.partitions import gathered, list_partitions
from pretrain.engine.zero.update_size import mean_square_share
from pretrain.engine.zero.zero import accumulate_and_step, set_learning_rate, start_engine
from pretrain.optim.ema import EmaSettings
from pretrain.optim.groups import OptimizerSettings
from tests.distributed.engines import SEED, deepspeed_config
from tests.distributed.toy import toy_batch
from tests.distributed.two_tasks import (
    CLIPPED,
    MT_ADAMW,
    RATIOS,
    balance_for,
    take_step,
    two_task_model,
)
from tests.pretrain.optim.test_mt_adamw import GOLDENS, read_golden
from tools.selfcheck.parity_cells import gathered_partitions

STEPS = 20
STAGES = (1, 2, 3)
EMA = EmaSettings(decay=0.9)
OPTIMIZERS = {"mt_adamw": MT_ADAMW, "clipped": CLIPPED}
ZERO_GOLDENS = [path for path in GOLDENS if "missing_skip" not in path.stem]  # ZeRO knows no None


class Piece(nn.Module):
    """Parameters whose gradient is what the batch says."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))
        self.initial_std = dict.fromkeys(shapes)

    def forward(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((p * gradients[name]).sum() for name, p in self.named_parameters())


class GoldenModel(nn.Module):
    """The parameters of the goldens under a loss that is linear in them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Piece(weight=(4, 3), bias=(4,))
        self.decoder = Piece(weight=(2, 4), bias=(2,))
        self.norm = Piece(weight=(4,))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.initial_std = {"logit_scale": None}
        # The engine asks how many passes they make.
        self.objectives = defaultdict(lambda: SimpleNamespace(passes=lambda batch: 1))

    def forward(
        self, task: str, part: str, batch: dict, totals: dict, step: int
    ) -> dict[str, torch.Tensor]:
        loss = (self.logit_scale * batch["logit_scale"]).sum()
        for name, piece in self.named_children():
            mine = {
                k.removeprefix(f"{name}."): v for k, v in batch.items() if k.startswith(f"{name}.")
            }
            loss = loss + piece(mine)
        return {"loss": loss}


def golden_cell(ranks, path: Path, stage: int, out: Path) -> dict:
    hyper, golden = read_golden(path)
    start = out / f"start_{ranks.rank}.safetensors"
    save_file({n: golden[f"init.{n}"].float() for n in hyper["groups"]}, start)
    settings = OptimizerSettings(
        kind="mt_adamw",
        betas=(hyper["beta1"], hyper["beta2"]),
        eps=hyper["eps"],
        clip_norm=None,
        weight_decay=hyper["weight_decay"],
        lr_multipliers={"encoder.*": 0.2},
        omega={str(k): w for k, w in enumerate(golden["omega"].tolist())},
    )
    engine = start_engine(
        GoldenModel,
        settings,
        deepspeed_config(stage, "fp32", settings),
        SEED,
        ranks.device,
        initial_weights=str(start),
    )
    inner = engine.optimizer.optimizer
    inner.normalise, inner.compensate = hyper["normalise"], hyper["compensate"]
    inner.bias_correction = hyper["bias_corr"]
    ratios = {str(k): s for k, s in enumerate(golden["sampling_ratio"].tolist())}
    balance = TaskBalance(engine, settings, lambda step: ratios)
    share = (ranks.rank + 1) / sum(range(1, ranks.world + 1))
    saved: dict[str, list] = {name: [] for name in hyper["groups"]}
    for step, task in enumerate(golden["task_id"].tolist()):
        set_learning_rate(engine, golden["lr.decoder"][step].item(), 1.0)
        balance.before_step(step, str(task))
        batch = {n: (golden[f"grad.{n}"][step] * share).float() for n in hyper["groups"]}
        accumulate_and_step(engine, str(task), [batch], {})
        for name, values in gathered_partitions(engine, lambda p: p.master).items():
            saved[name].append(values)
    if ranks.leads:
        save_file(
            {n: torch.stack(v) for n, v in saved.items()},
            out / f"{path.stem}_zero{stage}.safetensors",
        )
    engine.destroy()
    return {}


def module_weights(engine) -> dict[str, torch.Tensor]:
    """What the forward pass uses, frozen parameters too."""
    out = {}
    for name, parameter in engine.module.named_parameters():
        with gathered([parameter]):
            out[name] = parameter.detach().clone()
    return out


@torch.no_grad()
def heldout_losses(engine) -> list[float]:
    """Loss of both tasks on a batch that all ranks have."""
    batch = toy_batch(1000)
    totals = {"images": batch["valid"].sum().float()}
    return [engine.module(task, "undivided", batch, totals)["loss"].item() for task in RATIOS]


def toy_cell(ranks, optimizer: str, stage: int, mode: str, micro_steps: int, out: Path) -> dict:
    settings = OPTIMIZERS[optimizer]
    config = deepspeed_config(stage, mode, settings, micro_steps)
    config["zero_optimization"]["sub_group_size"] = 100  # several calls of step() in stage 3
    if mode == "offload":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    engine = start_engine(two_task_model, settings, config, SEED, ranks.device)
    balance, ema = balance_for(engine, settings), Ema(engine, EMA)
    norms, sizes = [], []
    for step in range(STEPS):
        take_step(engine, balance, settings, ranks, step, micro_steps)
        ema.update(step)
        norms.append(float(engine.get_global_grad_norm()))
        size = mean_square_share(engine, ranks.device)
        dist.all_reduce(size)
        sizes.append(size.item() ** 0.5)
    averages = dict(zip((id(p.master) for p in list_partitions(engine)), ema.tensors, strict=True))
    saved = {f"end.{n}": t for n, t in gathered_partitions(engine, lambda p: p.master).items()}
    saved |= {
        f"ema.{n}": t
        for n, t in gathered_partitions(engine, lambda p: averages[id(p.master)]).items()
    }
    # As evaluation does it: what a forward pass leaves gathered must not be used again.
    seen = {"before": heldout_losses(engine)}
    with ema.in_module():
        seen["averaged"] = heldout_losses(engine)
    seen["after"] = heldout_losses(engine)
    before = module_weights(engine)
    with ema.in_module():
        saved |= {f"in_module.{n}": t for n, t in module_weights(engine).items()}
    after = module_weights(engine)
    if ranks.leads:
        save_file(saved, out / f"{cell_name(optimizer, stage, mode, micro_steps)}.safetensors")
    calls = len(list_partitions(engine))
    engine.destroy()
    return {
        "norms": norms,
        "sizes": sizes,
        "partitions": calls,
        "heldout": seen,
        "back": all(torch.equal(before[n], after[n]) for n in before),
    }


def toy_cells() -> list[tuple[str, int, str, int]]:
    """(optimizer, ZeRO stage, precision or "offload" in fp32, micro-steps)."""
    fp32 = [(o, s, "fp32", m) for o in OPTIMIZERS for s in STAGES for m in (1, 2)]
    offload = [(o, s, "offload", 1) for o in OPTIMIZERS for s in (2, 3)]
    return fp32 + offload + [("mt_adamw", s, "bf16", 1) for s in STAGES]


def cell_name(optimizer: str, stage: int, mode: str, micro_steps: int) -> str:
    return f"{optimizer}_zero{stage}_{mode}_micro{micro_steps}"


def main() -> None:
    out = Path(sys.argv[1])
    ranks = init_distributed(threads_per_rank=1)
    results = {}
    golden_stages = [stage for stage in STAGES if f"goldens{stage}" in sys.argv[2:]]
    for path in ZERO_GOLDENS:
        for stage in golden_stages:
            golden_cell(ranks, path, stage, out)
    for cell in toy_cells() if "toy" in sys.argv[2:] else ():
        results[cell_name(*cell)] = toy_cell(ranks, *cell, out)
        gc.collect()
    if ranks.leads:
        (out / "cells.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)
