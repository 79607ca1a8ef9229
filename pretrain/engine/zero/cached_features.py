"""Gradients of a loss that couples samples, when one forward pass cannot hold them all.

A first pass without gradients computes targets and features of every micro-batch. The loss of all
of them together (with those of other ranks) gives the gradient of each feature, and of what belongs
to no sample. A second pass repeats each micro-batch with the same random draws and carries that
gradient into the parameters. The result is the gradient of the undivided batch, for the memory of
one micro-batch and one more forward pass.

Everything that reads parameters happens inside the engine's forward pass, as ZeRO-3 asks for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.objectives.objective import CoupledObjective, Shares


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


class CachedFeatures:
    """The features of a window's micro-batches, without their graph, and the loss of them all.

    Args:
        run: (part, arguments) -> what the engine's forward pass returns of it.
        micro_batches: equally many, with equally many rows, on every rank.
        device: where random draws are made beside the CPU.
    """

    def __init__(
        self,
        run: Callable[..., dict[str, Tensor]],
        micro_batches: Sequence[Mapping],
        device: torch.device,
    ) -> None:
        self._run, self._micro_batches = run, micro_batches
        self._states, features, targets = [], [], []
        with torch.no_grad():
            for batch in micro_batches:
                # Copies of mappings: ZeRO-3 puts other tensors into the dicts that it is given.
                targets.append(dict(run("targets", dict(batch))))
                self._states.append(RandomState.now(device))
                features.append(dict(run("features", dict(batch))))
        self._sizes = [len(next(iter(found.values()))) for found in features]
        self._features, self._targets = _joined(features), _joined(targets)
        self._gradients: dict[str, tuple[Tensor, ...]] = {}

    def loss(
        self,
        objective: CoupledObjective,
        shared: Mapping[str, Tensor],
        totals: Mapping[str, Tensor],
        factor: float,
    ) -> Shares:
        """The shares of all micro-batches; from now on features have their gradient, and the leaves
        in `shared` theirs.

        factor: of the loss in what is differentiated.
        """
        leaves = {name: value.requires_grad_() for name, value in self._features.items()}
        with torch.enable_grad():
            shares = objective.loss(leaves, self._targets, shared, totals)
            (shares["loss"] * factor).backward()
        self._gradients = {
            name: leaf.grad.split(self._sizes)
            for name, leaf in leaves.items()
            if leaf.grad is not None
        }
        return {name: value.detach() for name, value in shares.items()}

    def surrogate(self, index: int) -> Tensor:
        """A scalar whose gradient is that of the loss, through micro-batch `index` alone."""
        self._states[index].restore()
        features = self._run("features", dict(self._micro_batches[index]))
        return sum(
            (features[name] * gradient[index]).sum() for name, gradient in self._gradients.items()
        )


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
