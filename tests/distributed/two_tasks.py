"""Two tasks in turns on one trunk: a head, a temperature and tied weights for each."""

import torch

from pretrain.engine.zero.balance import TaskBalance
from pretrain.engine.zero.zero import accumulate_and_step, set_learning_rate
from pretrain.models.multitask import MultiTaskModel
from pretrain.optim.groups import OptimizerSettings
from tests.distributed.toy import ToyEncoder, ToyObjective, share_of, toy_batch

TASKS = ("words", "shapes", "words", "words")
RATIOS = {"words": 0.75, "shapes": 0.25}
LOUD = 300.0
"""Factor on the loss of the rarer task: gradients of real tasks differ more than that."""

MT_ADAMW = OptimizerSettings(
    kind="mt_adamw",
    lr=1e-3,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    clip_norm=None,
    omega={"shapes": 0.5},
    max_compensation=3.0,
    lr_multipliers={"objectives.*": 2.0},
)
CLIPPED = OptimizerSettings(
    kind="adamw",
    lr=1e-3,
    weight_decay=0.05,
    clip_norm=0.7,
    task_clip_norms={"shapes": 40.0},
    lr_multipliers={"objectives.*": 2.0},
)


class LoudObjective(ToyObjective):
    def losses(self, modules, batch, totals, shared):
        shares = super().losses(modules, batch, totals, shared)
        return {**shares, "loss": LOUD * shares["loss"]}


def two_task_model() -> MultiTaskModel:
    return MultiTaskModel(
        {"image": ToyEncoder()}, {"words": ToyObjective(), "shapes": LoudObjective()}
    )


def task_of(step: int) -> str:
    return TASKS[step % len(TASKS)]


def balance_for(engine, settings: OptimizerSettings) -> TaskBalance:
    return TaskBalance(engine, settings, lambda step: RATIOS)


def take_step(engine, balance, settings, ranks, step: int, micro_steps: int = 1) -> torch.Tensor:
    """One optimizer step of the schedule; returns this rank's share of the loss."""
    batch = toy_batch(step)
    set_learning_rate(engine, settings.lr, 1.0 / (1 + step / 10))
    balance.before_step(step, task_of(step))
    shares = accumulate_and_step(
        engine,
        task_of(step),
        share_of(batch, ranks.rank, ranks.world, micro_steps),
        {"images": batch["valid"].sum().float()},
    )
    return shares["loss"]
