"""Layers of deformable transformers (arXiv 2010.04159), under the names of Mask DINO."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.host_numbers import on_device
from pretrain.models.operators.ms_deform_attn import ms_deform_attn
from pretrain.models.regions.boxes import exact

Sizes = Sequence[tuple[int, int]]


def xavier(linear: nn.Linear) -> nn.Linear:
    """The layer with Glorot's uniform first values."""
    bound = math.sqrt(6 / (linear.in_features + linear.out_features))
    linear.initial_bound = {"weight": bound}
    return linear


class DeformableAttention(nn.Module):
    """Each query looks at a few places around its reference, on every map."""

    def __init__(self, width: int, heads: int, maps: int, points: int) -> None:
        super().__init__()
        self.heads, self.maps, self.points = heads, maps, points
        self.sampling_offsets = nn.Linear(width, heads * maps * points * 2)
        self.sampling_offsets.initial_std = {"weight": 0.0}
        self.sampling_offsets.initial_value = {"bias": _star(heads, maps, points)}
        self.attention_weights = nn.Linear(width, heads * maps * points)
        self.attention_weights.initial_std = {"weight": 0.0}
        self.value_proj = xavier(nn.Linear(width, width))
        self.output_proj = xavier(nn.Linear(width, width))

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        values: Tensor,
        sizes: Sizes,
        present: Tensor | None = None,
    ) -> Tensor:
        """Read the maps around references.

        queries: (B, Q, width), with their positions. references: (B, Q, 2) x and y, or (B, Q, 4)
            boxes, float32 fractions of the canvas. values: (B, S, width), the pixels of maps of
            these (height, width), one map after the other. present: (B, S) bool, False in padding,
            which reads as zeros.
        Returns (B, Q, width).
        """
        batch, count, _ = queries.shape
        value = self.value_proj(values)
        if present is not None:
            value = value.masked_fill(~present[..., None], 0.0)
        value = value.unflatten(-1, (self.heads, -1))
        shape = (batch, count, self.heads, self.maps, self.points)
        # Where to look is never rounded to the type of the weights.
        offsets = exact(self.sampling_offsets(queries)).view(*shape, 2)
        weights = exact(self.attention_weights(queries)).view(*shape[:3], -1)
        weights = weights.softmax(-1).view(shape)
        references = references[:, :, None, None, None]
        if references.shape[-1] == 2:
            pixels = on_device([(w, h) for h, w in sizes], offsets.device)[:, None]
            locations = references + offsets / pixels
        else:
            steps = references[..., 2:] * (0.5 / self.points)
            locations = references[..., :2] + offsets * steps
        if value.dtype == torch.float64:
            locations = locations.double()
        return self.output_proj(ms_deform_attn(value, sizes, locations, weights))


def _star(heads: int, maps: int, points: int) -> Tensor:
    """First offsets, flat: each head looks in its own direction, each point one pixel further."""
    angles = torch.arange(heads, dtype=torch.float32, device="cpu") * (2 * math.pi / heads)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, points + 1, dtype=torch.float32, device="cpu")
    star = directions[:, None, None] * steps[:, None]
    return star.expand(heads, maps, points, 2).flatten()


class SelfAttention(nn.Module):
    """Attention among queries, with the parameters of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.initial_bound = {"in_proj_weight": math.sqrt(6 / (4 * width))}
        self.initial_std = {"in_proj_bias": 0.0}
        self.out_proj = xavier(nn.Linear(width, width))

    def forward(self, queries: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """queries: (B, Q, width); positions join queries and keys, not values; mask: (B, Q, Q)
        bool, True where a query may look, None: everywhere. Returns (B, Q, width)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        placed = queries + positions
        query, key, value = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((placed, placed, queries), weights, biases, strict=True)
        )
        if mask is not None:
            mask = mask[:, None]
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """The pixels of all maps look around themselves; then an MLP. Norms come last."""

    def __init__(self, width: int, heads: int, maps: int, points: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(width, heads, maps, points)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = xavier(nn.Linear(width, hidden))
        self.linear2 = xavier(nn.Linear(hidden, width))
        self.norm2 = nn.LayerNorm(width)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        references: Tensor,
        sizes: Sizes,
        present: Tensor | None,
    ) -> Tensor:
        """tokens: (B, S, width); positions broadcast to it; the others as in
        `DeformableAttention`. Returns (B, S, width)."""
        mixed = self.self_attn(tokens + positions, references, tokens, sizes, present)
        tokens = self.norm1(tokens + mixed)
        return self.norm2(tokens + self.linear2(F.relu(self.linear1(tokens))))


class DecoderLayer(nn.Module):
    """Queries look at each other, then at the maps around their boxes; then an MLP."""

    def __init__(self, width: int, heads: int, maps: int, points: int, hidden: int) -> None:
        super().__init__()
        self.cross_attn = DeformableAttention(width, heads, maps, points)
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = xavier(nn.Linear(width, hidden))
        self.linear2 = xavier(nn.Linear(hidden, width))
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        references: Tensor,
        memory: Tensor,
        sizes: Sizes,
        present: Tensor | None,
    ) -> Tensor:
        """queries, positions: (B, Q, width); mask as in `SelfAttention`; references: (B, Q, 4);
        memory: (B, S, width); sizes, present as in `DeformableAttention`.
        Returns (B, Q, width)."""
        queries = self.norm2(queries + self.self_attn(queries, positions, mask))
        read = self.cross_attn(queries + positions, references, memory, sizes, present)
        queries = self.norm1(queries + read)
        return self.norm3(queries + self.linear2(F.relu(self.linear1(queries))))


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 (float64 stays), whatever type its weights have."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features). Returns (..., out_features)."""
        x = exact(x)
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Mlp(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, width: int, hidden: int, width_out: int, layers: int) -> None:
        super().__init__()
        widths = [width, *[hidden] * (layers - 1), width_out]
        self.layers = nn.ModuleList(xavier(nn.Linear(a, b)) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width). Returns (..., width_out)."""
        *inner, last = self.layers
        for layer in inner:
            x = F.relu(layer(x))
        return last(x)


def box_head(width: int) -> Mlp:
    """Three layers from a content to changes of a box, float32; no change at first."""
    head = Mlp(width, width, width, 2)
    last = Float32Linear(width, 4)
    last.initial_std = {"weight": 0.0}
    head.layers.append(last)
    return head
