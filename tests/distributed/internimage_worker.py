"""One rank of the cells of InternImage: stages of ZeRO, both heads, several sizes, in one launch.

Usage: python -m tests.distributed.internimage_worker OUT_DIR CELL...   (under the ranks'
environment). Writes cells.json with the losses, and the gradients of each cell's first step.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from data_pipeline.order.step_sampler import deal
from data_pipeline.samples.labels import smaller_view_name
from pretrain.engine.launch.distributed import init_distributed, leave, shutdown
from pretrain.engine.zero.zero import accumulate_and_step, set_learning_rate, start_engine
from pretrain.models.build_context import BuildContext
from pretrain.models.init import initialise
from pretrain.models.multitask import MultiTaskModel
from pretrain.objectives.classification import ClassificationSettings
from pretrain.optim.groups import OptimizerSettings
from tests.distributed.engines import deepspeed_config
from tests.pretrain.models.git.git_models import MEAN, STD
from tests.pretrain.models.internimage.internimage_models import SMALL_PROJECTOR, small_settings
from tests.pretrain.objectives.pair_models import rows_of
from tools.selfcheck.parity_cells import note_gradients

BATCH, CLASSES, SEED, STEPS = 6, 5, 5, 2
SGD = OptimizerSettings(kind="sgd", lr=0.2, weight_decay=0.0, clip_norm=None)
# Micro-batches. Batch norm couples a micro-step, so with `conv` there is one; the projector takes
# several. `conv` sees further sizes of its images, `views` also further views: passes of their own.
FORMS = {"conv": BATCH, "projector": 2, "views": 2}
CELLS = [(s, f) for s in (1, 3) for f in FORMS] + [(2, "views")]
FAST = [(1, "views"), (3, "conv"), (3, "projector")]
SMALLER_VIEW = 32


def cell_name(cell: tuple[int, str]) -> str:
    return f"zero{cell[0]}_{cell[1]}"


def build_model(form: str) -> MultiTaskModel:
    """Task `classify` on an InternImage with everything that parameters stand in; no values yet."""
    fields = (
        {"head": {"type": "conv"}, "layer_scale": 0.5, "post_norm": True, "stage_norm": False}
        if form == "conv"
        else {
            "head": SMALL_PROJECTOR,
            "res_post_norm": True,
            "post_norm_layers": (0,),
            "mixer": {"center_feature_scale": True, "dw_kernel_size": 5},
        }
    )
    encoder = small_settings(drop_path=0.4, gradient_checkpointing=True, **fields).build()
    objective = ClassificationSettings(
        pool="head",
        label_smoothing=0.0,
        smaller_sizes=(48, 33) if form == "conv" else (),
    ).build(
        BuildContext(
            {"image": encoder},
            None,
            MEAN,
            STD,
            classes=CLASSES,
            smaller_views=(SMALLER_VIEW,) if form == "views" else (),
        )
    )
    return MultiTaskModel({"image": encoder}, {"classify": objective}, seed=SEED)


def start(model: MultiTaskModel) -> MultiTaskModel:
    """Values for a model in one process."""
    initialise(model, SEED)
    return model


def batch_of(step: int) -> dict:
    """Six labelled images of a step."""
    generator = torch.Generator().manual_seed(step)
    positions = torch.arange(BATCH) + step * BATCH
    return {
        **{
            name: torch.randint(
                0, 256, (BATCH, 3, side, side), generator=generator, dtype=torch.uint8
            )
            for name, side in (("images", 64), (smaller_view_name(SMALLER_VIEW), SMALLER_VIEW))
        },
        "labels": torch.randint(0, CLASSES, (BATCH,), generator=generator),
        "valid": torch.ones(BATCH, dtype=torch.bool),
        "position": positions,
    }


def rows(batch: dict, places) -> dict:
    """Those rows; -1 makes a padding row as the loader does."""
    extra = {
        "tokens": torch.zeros(BATCH, 1, 2, dtype=torch.int64),
        "loss_mask": torch.zeros(BATCH, 1, 2, dtype=torch.bool),
        "row": batch["position"],
        "prompt_class": torch.full((BATCH,), -1),
    }
    part = rows_of(batch | extra, places)
    part["position"] = part["row"]
    return part


def run_cell(ranks, stage: int, form: str, out: Path) -> list[float]:
    dealt = deal(BATCH, FORMS[form], ranks.rank, ranks.world)
    config = deepspeed_config(stage, "fp32", SGD, len(dealt))
    # Nothing stays gathered: whatever reads a parameter outside of forward would find it empty.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = start_engine(lambda: build_model(form), SGD, config, SEED, ranks.device)
    gradients = note_gradients(engine)
    losses, saved = [], {}
    for step in range(STEPS):
        batch = batch_of(step)
        set_learning_rate(engine, SGD.lr, 1.0)
        shares = accumulate_and_step(
            engine,
            "classify",
            [rows(batch, places) for places in dealt],
            {"images": torch.tensor(float(BATCH)), "labels": torch.tensor(float(BATCH))},
        )
        loss = shares["loss"].double()
        dist.all_reduce(loss)
        losses.append(loss.item())
        if not step:
            saved |= gradients()
    saved |= {n: b.float().clone() for n, b in engine.module.named_buffers()}
    if ranks.leads:
        save_file(saved, out / f"zero{stage}_{form}.safetensors")
    engine.destroy()
    gc.collect()
    return losses


def main() -> None:
    out = Path(sys.argv[1])
    ranks = init_distributed(threads_per_rank=1)
    asked = [cell for cell in CELLS if cell_name(cell) in sys.argv[2:]]
    found = {cell_name(cell): run_cell(ranks, *cell, out) for cell in asked}
    if ranks.leads:
        (out / "cells.json").write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)
