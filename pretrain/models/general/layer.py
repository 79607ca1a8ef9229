"""A layer of the general decoder, over the parts of a sequence."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.general.experts import Choice, ExpertLinear, PlainLinear, Router
from pretrain.models.general.settings import ExpertSettings
from pretrain.models.init import DEFAULT_STD

KeysValues = tuple[Tensor, Tensor]
"""Of tokens that others look at: (B, heads, N, width / heads) each."""


class GeneralLayer(nn.Module):
    """Attention and an MLP, with norms behind each sum (BERT) or before what is added (v1).

    Args:
        experts: those of this layer; None: it is dense.
        other arguments: as of `GeneralDecoderSettings`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        norm: Literal["after", "before"],
        layer_scale: float | None,
        experts: ExpertSettings | None,
    ) -> None:
        super().__init__()
        self.heads, self.norm_first = heads, norm == "before"

        def linear(inputs: int, outputs: int, of_experts: bool) -> nn.Module:
            if of_experts:
                return ExpertLinear(inputs, outputs, experts.number, DEFAULT_STD)
            return PlainLinear(inputs, outputs)

        in_attention = experts is not None and experts.attention
        self.qkv = linear(width, 3 * width, in_attention)
        self.output = linear(width, width, in_attention)
        self.expand = linear(width, hidden, experts is not None)
        self.reduce = linear(hidden, width, experts is not None)
        # Both layers of attention, and both of the MLP, follow one decision.
        self.attention_router = _router(experts, width) if in_attention else None
        self.mlp_router = None if experts is None else _router(experts, width)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        if layer_scale is not None:
            self.scale_attention = nn.Parameter(torch.zeros(width))
            self.scale_mlp = nn.Parameter(torch.zeros(width))
            names = ("scale_attention", "scale_mlp")
            self.initial_value = dict.fromkeys(names, layer_scale)
        self.scaled = layer_scale is not None

    def forward(
        self,
        parts: Sequence[Tensor],
        attributes: Sequence[int],
        masks: Sequence[Tensor | None],
        seen: KeysValues | None = None,
        noise: Tensor | None = None,
    ) -> tuple[list[Tensor], list[KeysValues]]:
        """parts: (B, n_i, width) each. attributes: number of each part's attribute. masks: as in
        `Part`, over `seen` too. seen: keys and values of tokens that came before. noise: (2,
        attributes, experts), for attention and MLP.

        Returns the parts, and keys and values of each.
        """
        noises = (None, None) if noise is None else noise.unbind(0)
        choices = _choices(self.attention_router, attributes, noises[0])
        normed = [self.norm_attention(part) for part in parts] if self.norm_first else parts
        mixed, keys_values = self._attention(normed, choices, masks, seen)
        parts = self._added(parts, mixed, "attention")
        choices = _choices(self.mlp_router, attributes, noises[1])
        normed = [self.norm_mlp(part) for part in parts] if self.norm_first else parts
        hidden = [F.gelu(part) for part in self.expand(normed, choices)]
        return self._added(parts, self.reduce(hidden, choices), "mlp"), keys_values

    def _attention(self, parts, choices, masks, seen) -> tuple[list[Tensor], list[KeysValues]]:
        """Each part looks at `seen`, the parts before it and itself, as its mask says."""
        keys, values = ([], []) if seen is None else ([seen[0]], [seen[1]])
        mixed, keys_values = [], []
        for qkv, mask in zip(self.qkv(parts, choices), masks, strict=True):
            batch, length, width = qkv.shape
            split = qkv.view(batch, length, 3, self.heads, width // 3 // self.heads)
            query, key, value = split.permute(2, 0, 3, 1, 4)
            keys.append(key)
            values.append(value)
            keys_values.append((key, value))
            found = F.scaled_dot_product_attention(
                query, torch.cat(keys, dim=2), torch.cat(values, dim=2), mask
            )
            mixed.append(found.transpose(1, 2).reshape(batch, length, width // 3))
        return self.output(mixed, choices), keys_values

    def _added(self, parts, others, name: str) -> list[Tensor]:
        if self.scaled:
            scale = getattr(self, f"scale_{name}")
            others = [scale * other for other in others]
        sums = [part + other for part, other in zip(parts, others, strict=True)]
        return sums if self.norm_first else [getattr(self, f"norm_{name}")(s) for s in sums]


def _router(experts: ExpertSettings, width: int) -> Router:
    return Router(experts.number, experts.chosen, width, experts.noise)


def _choices(
    router: nn.Module | None, attributes: Sequence[int], noise: Tensor | None
) -> list[Choice]:
    """Experts of each part."""
    if not isinstance(router, Router):
        return [Choice(number) for number in attributes]
    experts, shares = router(noise)
    return [Choice(number, experts[number], shares[number]) for number in attributes]
