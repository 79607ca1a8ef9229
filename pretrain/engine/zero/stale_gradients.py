"""Gradients of an earlier step must not reach the optimizer: a guard around a DeepSpeed defect.

DeepSpeed 0.19.8 keeps the gradient partition of a parameter until that parameter gets a gradient
again. A parameter that a step does not use (another task's head) is then updated by what an earlier
step left: under ZeRO-3 always, under any stage with optimizer offload. With several micro-steps and
offload, ZeRO-2 also adds up what the window before has gathered, for a parameter whose first
gradient comes after the window's first backward pass. Losses look plausible, and no error is
raised. The guard empties all of it after every optimizer step.

It touches DeepSpeed's internals, so several tasks are trained under the affected modes only with a
DeepSpeed that the parity matrix has passed on (`VERIFIED`), or where `python -m tools.selfcheck`
has passed on this installation.
"""

import json
from pathlib import Path

import torch

from data_pipeline.files import cache_folder

# Versions on which tests/distributed/test_task_parity.py has passed.
VERIFIED = ("0.19.8",)


class UnverifiedDeepSpeed(RuntimeError):
    """Several tasks, an affected ZeRO mode, and a DeepSpeed that nobody has checked."""


def affected(stage: int, offloaded: bool) -> bool:
    """Whether DeepSpeed keeps stale gradients at this ZeRO stage, with or without offload."""
    return stage == 3 or offloaded


def clear_gradients(engine) -> None:
    """Empty what DeepSpeed keeps of this step's gradients. Call it right after `engine.step()`."""
    zero = engine.optimizer
    offloaded = engine.zero_use_cpu_optimizer()
    if not affected(engine.zero_optimization_stage(), offloaded):
        return
    if hasattr(zero, "grad_partitions_flat_buffer"):
        zero.grad_partitions_flat_buffer.zero_()
        partitions = zero.fp32_partitioned_groups_flat if offloaded else ()
    else:
        partitions = zero.single_partition_of_fp32_groups
    for gathered in getattr(zero, "accumulated_grads_in_cpu", {}).values():
        gathered.zero_()
    for partition in partitions:
        if partition.grad is not None:
            partition.grad.zero_()


def require_verified(tasks: int, stage: int, offloaded: bool) -> None:
    """Refuse several tasks under an affected mode on an unchecked DeepSpeed.

    Raises:
        UnverifiedDeepSpeed: with the command that checks it.
    """
    import deepspeed

    version = deepspeed.__version__
    if tasks < 2 or not affected(stage, offloaded) or version in VERIFIED:
        return
    if passed_here():
        return
    raise UnverifiedDeepSpeed(
        f"DeepSpeed {version} has not been checked for stale gradients, which earlier versions "
        f"apply under ZeRO-{stage}{' with offload' if offloaded else ''} to the parameters that a "
        "task does not use. Run `python -m tools.selfcheck` (about two minutes, no GPU needed), "
        f"use a checked version ({', '.join(VERIFIED)}), or ZeRO 1 or 2 without offload"
    )


# ---- the record of a passed selfcheck ------------------------------------------------------------


def record_path() -> Path:
    """Where a passed selfcheck of the installed versions is noted, in the user's cache folder."""
    import deepspeed

    name = f"selfcheck_deepspeed-{deepspeed.__version__}_torch-{torch.__version__}.json"
    return cache_folder() / name


def passed_here() -> bool:
    """Whether `tools.selfcheck` has passed with the installed DeepSpeed and torch."""
    try:
        return json.loads(record_path().read_text(encoding="utf-8"))["passed"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False
