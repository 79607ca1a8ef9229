"""Features that belong to no sample, held over the micro-steps of a step.

They are computed with their graph before the first micro-step. Micro-steps read detached copies,
whose gradients add up; the last one reads the graph itself, and carries what the copies have
gathered back through it. So there is one encoding and no backward pass of its own, which several
modes of ZeRO would drop without a word: they keep only what the last micro-step's backward pass
touches, and ZeRO-3 counts micro-steps by forward passes.
"""

from collections.abc import Mapping

from torch import Tensor


class HeldFeatures:
    """The features of one step.

    Args:
        values: name -> tensor, with their graph.
        scale: what gradients of the micro-steps' backward passes are multiplied by: that of fp16.
    """

    def __init__(self, values: Mapping[str, Tensor], scale: float = 1.0) -> None:
        self.values, self.scale = dict(values), scale
        self.leaves = {
            name: value.detach().requires_grad_(value.requires_grad)
            for name, value in self.values.items()
        }

    def seen(self, last: bool) -> dict[str, Tensor]:
        """What a micro-step reads. A new dict each: ZeRO-3 puts other tensors into those that a
        module is given, and a copy's gradient would be lost."""
        return dict(self.values if last else self.leaves)

    def owed(self) -> Tensor | float:
        """A scalar for the last micro-step's loss, whose gradient with respect to `values` is what
        the copies have gathered."""
        return sum(
            (self.values[name] * (leaf.grad / self.scale)).sum()
            for name, leaf in self.leaves.items()
            if leaf.grad is not None
        )
