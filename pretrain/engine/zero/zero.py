"""From a model and settings to a DeepSpeed ZeRO engine, and one optimizer step on it."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from pretrain.engine.zero.backward import run_backward
from pretrain.engine.zero.cached_features import CachedFeatures
from pretrain.engine.zero.held_features import HeldFeatures
from pretrain.engine.zero.host_memory import return_freed_memory
from pretrain.engine.zero.partitions import clear_padding, gathered
from pretrain.engine.zero.stale_gradients import clear_gradients
from pretrain.models.frozen import freeze, kept_at_random
from pretrain.models.init import initialise, load_weights
from pretrain.objectives.objective import CoupledObjective, Shares, shares_features
from pretrain.optim.groups import OptimizerSettings, parameter_groups
from pretrain.optim.mt_adamw import MTAdamW

log = logging.getLogger(__name__)


def start_engine(
    build: Callable[[], nn.Module],
    optimizer: OptimizerSettings,
    config: dict,
    seed: int,
    device: torch.device,
    initial_weights: str | None = None,
):
    """Build the model, draw its weights and hand both to DeepSpeed.

    Args:
        build: makes the model; under ZeRO-3 it runs inside `deepspeed.zero.Init`, so that no rank
            ever holds the whole of it.
        optimizer: settings of the optimizer and its parameter groups.
        config: a complete DeepSpeed configuration (`pretrain.ds_config.engine_config`).
        seed: seed of the initial weights, which depend on it and their names alone.
        device: where the model trains.
        initial_weights: safetensors file whose tensors replace the drawn ones.

    Returns:
        The DeepSpeed engine. Accumulation is ours: the engine is told where a window ends.
    """
    import deepspeed

    import_muon_uncompiled()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    stage = config["zero_optimization"]["stage"]
    construct = contextlib.nullcontext()
    if stage == 3:
        construct = deepspeed.zero.Init(config_dict_or_path=config)
    with construct:
        model = build()
    if stage != 3:
        model.to(device)
    writable = partial(gathered, writable=True)
    initialise(model, seed, gather=writable)
    drawn = load_weights(model, initial_weights, gather=writable) if initial_weights else []
    random = sorted(set(freeze(model, optimizer.frozen)) & set(drawn))
    if random:
        log.warning("%s", kept_at_random(random))
    groups = parameter_groups(model, optimizer)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make_optimizer(groups, optimizer), config=config
    )
    clear_padding(engine)
    return_freed_memory()
    return engine


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without `torch.compile`, before DeepSpeed imports it with.

    DeepSpeed (0.19.8) imports Muon for every engine, whatever its optimizer, and `torch.compile`
    around its functions loads all of torch's compiler: 5 of the 11 s of CPU that a rank's start
    costs. Muon is not among our optimizers, so that nothing calls these functions.
    """
    from deepspeed.runtime import compiler

    compiled = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compiled


def make_optimizer(groups: list[dict], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The element-wise optimizer that ZeRO runs on flat fp32 partitions."""
    if settings.kind == "mt_adamw":
        return MTAdamW(
            groups,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            omega=settings.omega,
            max_compensation=settings.max_compensation,
        )
    if settings.kind == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
    )


def set_learning_rate(engine, base: float, factor: float) -> None:
    """Give every group its rate for this step: `base` x its multiplier x the schedule's factor."""
    for group in engine.optimizer.param_groups:
        group["lr"] = base * group["lr_multiplier"] * factor


class TaskBatch(NamedTuple):
    """What one step runs of one task on this rank."""

    task: str
    micro_batches: Sequence[Mapping]
    totals: Mapping[str, torch.Tensor]
    """The objective's counts, summed over the global batch."""
    weight: float = 1.0
    """Factor of this task's loss in the loss of the step."""
    step: int = 0
    """Number of the step, which its random draws depend on."""


def accumulate_and_step(
    engine,
    task: str,
    micro_batches: Sequence[Mapping],
    totals: Mapping[str, torch.Tensor],
    step: int = 0,
) -> Shares:
    """`accumulate_parts` for a step of one task; returns its metrics."""
    return accumulate_parts(engine, [TaskBatch(task, micro_batches, totals, step=step)])[task]


def accumulate_parts(engine, parts: Sequence[TaskBatch]) -> dict[str, Shares]:
    """Forward and backward over all micro-batches of one step, then the optimizer.

    The gradient is that of one process with the whole global batches, for the loss
    sum_k weight_k * loss_k: losses are shares of the global loss, so the sum over micro-steps and
    ranks is what counts, while DeepSpeed averages over ranks.

    Returns:
        task -> this rank's share of every metric (detached, on the device), summed over its
        micro-batches; losses without their weight.
    """
    sums = {
        part.task: accumulate_task(engine, part, ends_step=index == len(parts) - 1)
        for index, part in enumerate(parts)
    }
    engine.step()
    clear_gradients(engine)
    return sums


def accumulate_task(engine, task_batch: TaskBatch, ends_step: bool = True) -> Shares:
    """Forward and backward of one task's micro-batches; the optimizer is not stepped.

    Args:
        ends_step: whether nothing else is accumulated into the step after this.

    Returns:
        As `accumulate_parts`, of this task.
    """
    # The engine is handed copies of mappings: ZeRO-3 puts other tensors into the dicts that a
    # module is given, and what is read from them afterwards would have no gradient.
    objective = engine.module.objectives[task_batch.task]
    run = partial(engine, task_batch.task, step=task_batch.step)
    factor = dist.get_world_size() * task_batch.weight
    if len(task_batch.micro_batches) == 1 and objective.passes(task_batch.micro_batches[0]) == 1:
        engine.set_gradient_accumulation_boundary(ends_step)
        (batch,) = task_batch.micro_batches
        shares = run("undivided", dict(batch), dict(task_batch.totals))
        run_backward(engine, shares["loss"] * factor, task_batch.task)
        return {name: value.detach() for name, value in shares.items()}
    engine.set_gradient_accumulation_boundary(False)
    values = run("shared") if shares_features(objective) else {}
    coupled = isinstance(objective, CoupledObjective) and len(task_batch.micro_batches) > 1
    # What the leaves gather in a coupled loss, `engine.backward` has not scaled.
    held = HeldFeatures(values, 1.0 if coupled else engine.optimizer.loss_scale)
    divided = _coupled_losses if coupled else _summed_losses
    return divided(engine, run, task_batch, held, factor, ends_step)


def _coupled_losses(
    engine, run: Callable, task_batch: TaskBatch, held: HeldFeatures, factor: float, ends_step: bool
) -> Shares:
    """`accumulate_task` of a loss in which the samples of several micro-batches meet."""
    cached = CachedFeatures(run, task_batch.micro_batches, engine.device)
    objective = engine.module.objectives[task_batch.task]
    shares = cached.loss(objective, held.leaves, task_batch.totals, factor)
    last = len(task_batch.micro_batches) - 1
    for index in range(last + 1):
        engine.set_gradient_accumulation_boundary(ends_step and index == last)
        surrogate = cached.surrogate(index)
        if index == last:
            surrogate = surrogate + held.owed()
        run_backward(engine, surrogate, task_batch.task, "last" if index == last else 0)
    return shares


def _summed_losses(
    engine, run: Callable, task_batch: TaskBatch, held: HeldFeatures, factor: float, ends_step: bool
) -> Shares:
    """`accumulate_task` of losses that add up, over micro-batches and their passes. A pass hands
    the next one no more than a tensor without gradient."""
    objective = engine.module.objectives[task_batch.task]
    sums: Shares = {}
    for index, batch in enumerate(task_batch.micro_batches):
        count, carried = objective.passes(batch), None
        for number in range(count):
            last = index == len(task_batch.micro_batches) - 1 and number == count - 1
            engine.set_gradient_accumulation_boundary(ends_step and last)
            shares = dict(
                run(
                    "losses_in_pass",
                    dict(batch),
                    dict(task_batch.totals),
                    held.seen(last),
                    number,
                    carried,
                )
            )
            carried = shares.pop("carried", None)
            loss = shares["loss"] * factor
            if last:
                loss = loss + held.owed()
            run_backward(engine, loss, task_batch.task, "last" if last else number)
            for name, value in shares.items():
                value = value.detach()
                sums[name] = sums[name] + value if name in sums else value
    return sums


def to_device(batch: Mapping, device: torch.device) -> dict:
    """The batch with its tensors on `device` (copied asynchronously from pinned memory)."""
    return {
        name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }
