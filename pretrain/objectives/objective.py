"""What an objective is: a loss on the modules of a run, in the parts that the engine asks for.

`Objective` is for losses that are sums over samples, `CoupledObjective` for those that are not.
README.md beside this file says how to add one. The engine asks which of the two an objective is,
and calls methods; it looks for no attribute and knows no name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.models.step_draws import StepDraws
from pretrain.objectives.evaluation_mode import Gather, alone
from pretrain.optim.momentum import MomentumTargets

Modules = Mapping[str, nn.Module]
"""Name -> module that tasks share: the encoders of the run."""
Batch = Mapping[str, Any]
"""A micro-batch as the data's collate made it. The engine adds "step_draws" (StepDraws) and, where
rows have a position in their task's order, "draws" (SampleDraws)."""
Totals = Mapping[str, float | Tensor]
"""What `counts` says, summed over the global batch."""
Shares = dict[str, Tensor]
"""Name -> 0-dim float32: a share of the loss ("loss", with a graph) or of a metric. Summed over all
micro-batches and ranks each is the value for the global batch."""

Method = Literal["shared", "losses_in_pass", "targets", "features", "undivided"]
"""Methods that read parameters; the engine calls them by these names, through `forward`."""


class Example(Protocol):
    """One held-out sample as an evaluation saw it, which can show itself."""

    row: int
    key: str

    def drawn(self) -> tuple[np.ndarray, str] | None:
        """The picture (H, W, 3) uint8, with boxes and masks on it if it has some, and the text for
        below it; None if its picture was not kept."""


class Evaluation(NamedTuple):
    """What an evaluation found; the same on every rank but for the pictures kept."""

    metrics: dict[str, float | None]
    """In the order that matters; None where nothing was counted. "images" is always there."""
    examples: list[Example]


@dataclass(frozen=True)
class EvaluationContext:
    """Where an evaluation runs, and how its ranks talk."""

    device: torch.device
    vocabulary: Any = None
    """The run's tokenizer, if it has one."""
    reduce: Gather = alone
    """One JSON-like value per rank -> the values of all ranks in rank order, on every rank."""
    keep_images: int = 0
    """So many examples of this rank keep their picture."""
    agree: Callable[[bool], bool] = bool
    """Whether all ranks say so; a collective."""
    write_texts: bool = True
    """Whether texts are written and compared; without, only the losses of held-out data are said,
    in a fraction of the time."""


class Objective(nn.Module, ABC):
    """A loss that is a sum over samples, the heads that only its task uses, and its evaluation.

    Parameters have at least one dimension, (1,) and not (): DeepSpeed cannot broadcast others. One
    that is read outside of its module's own `forward` is empty under ZeRO-3: it needs a small
    module of its own, as `contrastive.Temperature` is.
    """

    counted_by: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """Metric -> the counts that it is a mean over: without any of them it has no value. Those under
    "loss" are the parts of the loss. A metric that is not named always has a value."""
    momentum_targets: MomentumTargets | None = None
    """Copies of modules that follow them slowly, if the loss asks for some."""

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int]:
        """What the loss of a micro-batch is averaged over: samples, tokens, boxes.

        The loop sums it over the global batch before the first forward pass. `batch` is on the CPU.
        """

    @abstractmethod
    def losses(
        self, modules: Modules, batch: Batch, totals: Totals, shared: Mapping[str, Tensor]
    ) -> Shares:
        """This micro-batch's shares of the loss and the metrics.

        Divide by `totals`, not by the size of the micro-batch. A batch without targets still runs
        every head, its loss multiplied by 0: other ranks wait for it.
        """

    @abstractmethod
    def flops(self, batch: Batch) -> int:
        """Model FLOPs, forward and backward, of a micro-batch, without padding rows and without
        recomputation. Parameters may be empty here: use sizes that were kept."""

    def evaluate(
        self, modules: Modules, loader: Iterable[Batch], context: EvaluationContext
    ) -> Evaluation:
        """Look at every held-out sample once; `loader` has equally many batches on every rank."""
        raise NotImplementedError(f"{type(self).__name__} has no evaluation: remove `evaluation`")

    def prepare(self, batch: Batch) -> dict[str, Any]:
        """What a micro-batch is to hold beside its fields, computed on the CPU: numbers that the
        host would else have to ask a GPU for, and wait."""
        return {}

    def shared(self, modules: Modules, draws: StepDraws) -> dict[str, Tensor]:
        """Features that belong to no sample (temperatures, class names), computed once a step.

        May be a collective (`gather.gather_rows`). The same keys and shapes on every rank, float32
        where there is a gradient. What it encodes takes `draws.of_shared(index)`.
        """
        return {}

    def passes(self, batch: Batch) -> int:
        """In how many parts the loss of a micro-batch is computed, one after another, for the
        memory of one; the same number on all ranks."""
        return 1

    def losses_in_pass(
        self,
        modules: Modules,
        batch: Batch,
        totals: Totals,
        shared: Mapping[str, Tensor],
        number: int,
        carried: Tensor | None,
    ) -> Shares:
        """`losses` of pass `number`; all passes sum up to `losses`. Each has a backward pass of its
        own.

        carried: what the pass before returned under this name, a tensor without gradient.
        """
        return self.losses(modules, batch, totals, shared)

    def undivided(self, modules: Modules, batch: Batch, totals: Totals) -> Shares:
        """`losses` of a micro-batch that is all that this rank has of the global batch."""
        return self.losses(modules, batch, totals, self.shared(modules, batch["step_draws"]))

    def forward(self, modules: Modules, method: Method, *arguments: Any) -> dict[str, Tensor]:
        """One method, within the module's own call: there ZeRO-3 gathers the parameters."""
        return getattr(self, method)(modules, *arguments)


class CoupledObjective(Objective):
    """A loss in which samples of the global batch meet.

    A rank that has its part of the batch in several micro-batches computes the features of all of
    them without gradient, then the loss of all features, then each micro-batch once more to carry
    the gradient of its features into the parameters (`pretrain.engine.zero.cached_features`). It
    always has one pass.
    """

    def targets(self, modules: Modules, batch: Batch) -> dict[str, Tensor]:
        """A row per sample, without gradient, computed once: what a frozen network sees, labels,
        masks, ids."""
        return {}

    @abstractmethod
    def features(self, modules: Modules, batch: Batch) -> dict[str, Tensor]:
        """A row per sample, with gradient. Called a second time it gives the same bits."""

    @abstractmethod
    def loss(
        self,
        features: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        totals: Totals,
    ) -> Shares:
        """The shares of all samples that this rank has of the global batch. It sees other ranks by
        `gather.gather_rows`, and reads no parameter: it runs outside of the engine."""

    def losses(
        self, modules: Modules, batch: Batch, totals: Totals, shared: Mapping[str, Tensor]
    ) -> Shares:
        features = self.features(modules, batch)
        with torch.no_grad():
            targets = self.targets(modules, batch)
        return self.loss(features, targets, shared, totals)


def shares_features(objective: Objective) -> bool:
    """Whether a class computes something once a step; if not, a forward pass is saved."""
    return type(objective).shared is not Objective.shared
