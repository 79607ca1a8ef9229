"""Linear layers with experts that are merged before they are used (Uni-Perceiver-MoE).

Which experts work depends on what a part of a sequence is (`attributes.py`), not on its tokens. So
the weights of the chosen ones are added up first, and what follows is one ordinary linear layer: no
dispatch of tokens, nothing to balance, and one matrix per attribute when training is over.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.general.attributes import ATTRIBUTES, LENGTH, attribute_table


class Choice(NamedTuple):
    """Experts of one part of a sequence."""

    attribute: int
    """Number of the part's attribute."""
    experts: Tensor | None = None
    """(k,) int64: which; None where there are none to choose from."""
    shares: Tensor | None = None
    """(k,) float32, with a sum of 1."""


class Router(nn.Module):
    """Chooses experts for every attribute, in float32 whatever the model's precision.

    Args:
        experts: how many there are. chosen: how many of them work at a time.
        width: channels of the hidden layer.
        noise: standard deviation of the noise on the scores in training, times `experts`.
    """

    def __init__(self, experts: int, chosen: int, width: int, noise: float = 1.0) -> None:
        super().__init__()
        self.experts, self.chosen, self.noise = experts, chosen, noise
        self.code = ExactLinear(LENGTH, width)
        self.norm = ExactNorm(width)
        self.score = ExactLinear(width, experts, bias=False)

    def forward(self, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Experts (attributes, chosen) int64 and their shares, float32.

        noise: (attributes, experts) float32 from N(0, 1), equal on all ranks; None: no noise.
        """
        scores = self.score(self.norm(self.code(attribute_table(self.norm.weight.device))))
        if noise is not None:
            scores = scores + noise.to(scores.device) * (self.noise / self.experts)
        shares, experts = scores.softmax(-1).topk(self.chosen, dim=-1)
        return experts, shares / shares.sum(-1, keepdim=True)


class ExactLinear(nn.Linear):
    """A linear layer that computes in float32, whatever its parameters are."""

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: (..., in_features). Returns (..., out_features) float32."""
        with torch.autocast(inputs.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(inputs.float(), self.weight.float(), bias)


class ExactNorm(nn.LayerNorm):
    """A norm that computes in float32, whatever its parameters are."""

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: (..., width). Returns the same shape, float32."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(inputs.float(), self.normalized_shape, weight, bias, self.eps)


class PlainLinear(nn.Linear):
    """One linear layer for all parts."""

    def forward(self, parts: Sequence[Tensor], choices: Sequence[Choice]) -> list[Tensor]:
        """parts: (B, n_i, in_features) each. Returns (B, n_i, out_features) each."""
        joined = super().forward(torch.cat(list(parts), dim=1) if len(parts) > 1 else parts[0])
        return list(joined.split([part.shape[1] for part in parts], dim=1))


class ExpertLinear(nn.Module):
    """Linear layers of which each part gets a mixture of its own.

    `weight` (experts * out_features, in_features) and `bias` (experts * out_features,) hold them
    one behind the other.
    """

    def __init__(self, in_features: int, out_features: int, experts: int, std: float) -> None:
        super().__init__()
        self.in_features, self.out_features, self.experts = in_features, out_features, experts
        self.weight = nn.Parameter(torch.zeros(experts * out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(experts * out_features))
        self.initial_std = {"weight": std, "bias": 0.0}

    def forward(self, parts: Sequence[Tensor], choices: Sequence[Choice]) -> list[Tensor]:
        """As `PlainLinear`; choices: one for each part."""
        merged = {choice.attribute: choice for choice in choices}
        layers = {number: self.merged(choice) for number, choice in merged.items()}
        return [
            F.linear(part, *layers[choice.attribute])
            for part, choice in zip(parts, choices, strict=True)
        ]

    def merged(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """The one linear layer of a choice: weight (out, in) and bias (out,)."""
        shares = choice.shares.to(self.weight.dtype)
        weight = self.weight.view(self.experts, -1).index_select(0, choice.experts)
        bias = self.bias.view(self.experts, -1).index_select(0, choice.experts)
        return (shares @ weight).view(self.out_features, self.in_features), shares @ bias


class FoldedRouter(nn.Module):
    """Stands where a `Router` was: there is nothing left to choose."""


class FoldedLinear(nn.Module):
    """One linear layer for each of a few attributes: what became of an `ExpertLinear`.

    weight: (attributes, out_features, in_features); bias: (attributes, out_features); numbers: of
    these attributes.
    """

    def __init__(self, weight: Tensor, bias: Tensor, numbers: Sequence[int]) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape[1:]
        self.rows = {number: row for row, number in enumerate(numbers)}
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, parts: Sequence[Tensor], choices: Sequence[Choice]) -> list[Tensor]:
        """As `PlainLinear`. Raises ValueError: the experts of an attribute were not kept."""
        return [
            F.linear(part, self.weight[row], self.bias[row])
            for part, row in zip(parts, map(self._row, choices), strict=True)
        ]

    def _row(self, choice: Choice) -> int:
        if choice.attribute not in self.rows:
            kept = ", ".join(ATTRIBUTES[number] for number in self.rows)
            raise ValueError(
                f"the experts were folded for {kept}, and not for {ATTRIBUTES[choice.attribute]}: "
                "fold the model again, with that too"
            )
        return self.rows[choice.attribute]


@torch.no_grad()
def folded_linear(layer: ExpertLinear, router: Router, numbers: Sequence[int]) -> FoldedLinear:
    """What `layer` does for the attributes of these numbers, without noise."""
    experts, shares = router()
    merged = [layer.merged(Choice(n, experts[n], shares[n])) for n in numbers]
    weights, biases = zip(*merged, strict=True)
    return FoldedLinear(torch.stack(weights), torch.stack(biases), numbers)
