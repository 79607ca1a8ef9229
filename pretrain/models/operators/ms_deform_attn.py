"""Multi-scale deformable attention: each query reads a few places on maps of several sizes.

A `torch.library` operator on the same sampling core as DCNv3.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.models.operators.backends import AUTO
from pretrain.models.operators.registration import register
from pretrain.models.operators.window import check_types, of_one_type


def ms_deform_attn(
    value: Tensor,
    sizes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    *,
    backend: str = AUTO,
) -> Tensor:
    """Weighted sums of `value` at the places that queries ask for: (N, Q, heads * D).

    `value` (N, S, heads, D) holds the pixels of all maps, one map after the other, row by row;
    `sizes` their (height, width), S pixels together. `locations` (N, Q, heads, maps, points, 2) are
    (x, y), 0 to 1 from edge to edge of a map; `weights` (N, Q, heads, maps, points) are used as
    they are. Each has the type of `value`, or float32. Coordinates and sums are float32, or
    float64 for float64 values. Bilinear; outside of a map there are zeros.

    `backend` is `triton` (GPU), `cpp` (CPU), `torch`, or `auto`, the fastest that works: see
    `backends.py`.

    Errors: ValueError or TypeError that names the argument which does not fit.
    """
    locations, weights = of_one_type(value, locations, weights)
    heights, widths = zip(*sizes, strict=True) if sizes else ((), ())
    return torch.ops.omnipretrain.ms_deform_attn(
        value, locations, weights, heights, widths, backend
    )


class Maps(NamedTuple):
    """Heights and widths of the maps, in pixels."""

    heights: tuple[int, ...]
    widths: tuple[int, ...]


def _prepare(
    value: Tensor, locations: Tensor, weights: Tensor, heights: list[int], widths: list[int]
) -> Maps:
    maps = Maps(tuple(heights), tuple(widths))
    sizes = list(zip(heights, widths, strict=True))
    if not sizes or min(*heights, *widths) < 1:
        raise ValueError(f"ms_deform_attn: sizes {sizes} must be one or more (height, width) >= 1")
    if value.dim() != 4:
        raise ValueError(f"ms_deform_attn: value {tuple(value.shape)} must be (N, S, heads, D)")
    n, pixels, heads, _ = value.shape
    if sum(height * width for height, width in sizes) != pixels:
        raise ValueError(
            f"ms_deform_attn: sizes {sizes} must have together the {pixels} pixels "
            f"of value {tuple(value.shape)}"
        )
    if weights.dim() != 5 or (n, heads, len(sizes)) != (weights.shape[0], *weights.shape[2:4]):
        raise ValueError(
            f"ms_deform_attn: weights {tuple(weights.shape)} must be (N, Q, heads, "
            f"maps, points) = ({n}, Q, {heads}, {len(sizes)}, points)"
        )
    if weights.shape[4] < 1:
        raise ValueError(f"ms_deform_attn: weights {tuple(weights.shape)} have no points")
    if locations.shape != (*weights.shape, 2):
        raise ValueError(
            f"ms_deform_attn: locations {tuple(locations.shape)} must be "
            f"{(*weights.shape, 2)}, as weights and (x, y)"
        )
    check_types("ms_deform_attn", value, {"locations": locations, "weights": weights})
    return maps


def _output_shape(value: Tensor, locations: Tensor, maps: Maps) -> tuple[int, ...]:
    return value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]


register(
    "ms_deform_attn",
    ("value", "locations", "weights"),
    "int[] heights, int[] widths",
    _prepare,
    _output_shape,
    {
        "triton": "ms_deform_attn_triton",
        "cpp": "ms_deform_attn_cpu",
        "torch": "ms_deform_attn_torch",
    },
)
