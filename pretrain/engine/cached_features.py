"""Gradients of a loss that couples samples, when one forward pass cannot hold them all.

A first pass without gradients computes the features of every micro-batch. The loss of all of them
together (with those of other ranks) gives the gradient of each feature. A second pass repeats each
micro-batch with the same random draws and carries that gradient into the parameters. The result is
the gradient of the undivided batch, for the memory of one micro-batch and one more forward pass.

What an objective offers for this:

    couples_samples = True
    shared_features: names of features that belong to no sample (a temperature)
    constant_features: names of features without gradient that the second pass need not compute
        again (targets of a frozen network); it finds them in batch["constant_features"]
    forward(encoders, batch, totals, part="features") -> name -> tensor, a row per sample, or shared
    coupled_loss(features of all samples of this rank, totals) -> shares; reads no parameter

Everything that reads parameters happens inside the engine's forward pass, as ZeRO-3 asks for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.engine.backward import run_backward


@dataclass(frozen=True)
class RandomState:
    """Where the generators of this process stand: of the CPU, and of the device if it has one."""

    cpu: Tensor
    device: torch.device
    on_device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """The present state."""
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, on_device)

    def restore(self) -> None:
        """Make the next draws those that followed `now`."""
        torch.set_rng_state(self.cpu)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)


def must_couple(model, task: str, micro_batches: Sequence[Mapping]) -> bool:
    """Whether a step must go through `accumulate_coupled`: one micro-batch needs no second pass."""
    return len(micro_batches) > 1 and getattr(model.objectives[task], "couples_samples", False)


def accumulate_coupled(
    engine,
    task: str,
    micro_batches: Sequence[Mapping],
    totals: Mapping[str, Tensor],
    weight: float = 1.0,
    ends_step: bool = True,
) -> dict[str, Tensor]:
    """Forward and backward of a window whose samples are coupled; the optimizer is not stepped.

    Args:
        engine: DeepSpeed engine of a `MultiTaskModel`.
        task: its objective offers what the module's text says.
        micro_batches: equally many, with equally many rows, on every rank.
        totals: as in `accumulate_and_step`.
        weight: factor of this task's loss in the loss of the step.
        ends_step: whether nothing else is accumulated into the step after this.

    Returns:
        This rank's share of every metric (detached, on the device), the loss without its weight.
    """
    objective = engine.module.objectives[task]
    shared = objective.shared_features
    constant = getattr(objective, "constant_features", ())
    last = len(micro_batches) - 1
    engine.set_gradient_accumulation_boundary(False)
    states, parts = [], []
    with torch.no_grad():
        for batch in micro_batches:
            states.append(RandomState.now(engine.device))
            # Copies of mappings: ZeRO-3 puts other tensors into the dicts that it is given.
            parts.append(dict(engine(task, dict(batch), dict(totals), part="features")))
    shares, gradients = _loss_and_gradients(objective, parts, totals, weight)
    pieces = {
        name: [gradient] * len(parts) if name in shared
        else gradient.split([len(part[name]) for part in parts])
        for name, gradient in gradients.items()
    }
    for index, batch in enumerate(micro_batches):
        engine.set_gradient_accumulation_boundary(ends_step and index == last)
        states[index].restore()
        given = dict(batch)
        if constant:
            given["constant_features"] = {name: parts[index][name] for name in constant}
        features = engine(task, given, dict(totals), part="features")
        # Shared features get their gradient once, and zero before: a parameter without a gradient
        # in some micro-step is where offloading has lost gradients.
        surrogate = sum(
            (features[name] * piece[index]).sum() * (name not in shared or index == last)
            for name, piece in pieces.items()
        )
        run_backward(engine, surrogate, task)
    return {name: value.detach() for name, value in shares.items()}


def _loss_and_gradients(
    objective, parts: Sequence[Mapping[str, Tensor]], totals: Mapping[str, Tensor], weight: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The coupled loss, and its gradient by feature, times the world: the engine averages."""
    features = {
        name: value if name in objective.shared_features else torch.cat([p[name] for p in parts])
        for name, value in parts[0].items()
    }
    constant = getattr(objective, "constant_features", ())
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in features.items()
        if value.is_floating_point() and name not in constant
    }
    with torch.enable_grad():
        shares = objective.coupled_loss({**features, **leaves}, totals)
        loss = shares["loss"] * (dist.get_world_size() * weight)
        found = torch.autograd.grad(loss, list(leaves.values()))
    return shares, dict(zip(leaves, found, strict=True))
