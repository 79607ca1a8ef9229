"""Multi-scale deformable attention on GPUs, in Triton; see `sampling_triton.py`."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.models.operators.sampling_triton import (
    Scatter,
    add_sample,
    block,
    configurations,
    constants,
    grid,
    scatter_sample,
)

Sizes = tuple[tuple[int, ...], tuple[int, ...]]


def forward(value: Tensor, locations: Tensor, weights: Tensor, maps: Sizes) -> Tensor:
    """Output (N, Q, heads * D) in the type of `value`; arguments as in `ms_deform_attn`, checked.

    `maps` are the heights and the widths of the maps.
    """
    value, locations, weights = (t.contiguous() for t in (value, locations, weights))
    n, pixels, heads, depth = value.shape
    queries = locations.shape[1]
    out = value.new_empty(n, queries, heads * depth)
    if out.numel():
        _forward_kernel[grid(n * queries, heads)](
            value, locations, weights, out, _table(*maps, value.device), n * queries, queries,
            pixels, heads, MAPS=len(maps[0]), POINTS=weights.shape[-1], **constants(value, depth),
        )
    return out


def backward(
    gradient: Tensor, value: Tensor, locations: Tensor, weights: Tensor, maps: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, each of its own shape and type."""
    gradient, value, locations, weights = (
        t.contiguous() for t in (gradient, value, locations, weights)
    )
    n, pixels, heads, depth = value.shape
    queries = locations.shape[1]
    scatter = Scatter(value, gradient, weights, queries * weights.shape[-1])
    of_locations, of_weights = torch.empty_like(locations), torch.empty_like(weights)
    if gradient.numel():
        _backward_kernel[grid(n * queries, heads)](
            gradient, value, locations, weights, scatter.buffer, of_locations, of_weights,
            scatter.scale, _table(*maps, value.device), n * queries, queries, pixels, heads,
            FIXED=scatter.fixed, MAPS=len(maps[0]), POINTS=weights.shape[-1],
            **constants(value, depth),
        )
    return scatter.result(value.dtype), of_locations, of_weights


@functools.lru_cache(maxsize=256)
def _table(heights: tuple[int, ...], widths: tuple[int, ...], device: torch.device) -> Tensor:
    """(maps, 3) int64: height, width, and pixels of the maps before it."""
    starts = [0]
    for height, width in zip(heights, widths, strict=True):
        starts.append(starts[-1] + height * width)
    return torch.tensor(list(zip(heights, widths, starts, strict=False)), device=device)


@triton.autotune(configs=configurations(), key=["CHANNELS", "POINTS", "MAPS", "positions"])
@triton.jit
def _forward_kernel(
    value, locations, weights, out, table, positions, queries, pixels, heads,
    MAPS: tl.constexpr, POINTS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, position, valid, channel, used = block(
        positions, CHANNELS, BLOCK_CHANNELS, BLOCK
    )
    step = heads * CHANNELS
    image = value + (position // queries * pixels * step + head * CHANNELS)
    first = (position * heads + head) * (MAPS * POINTS)
    total = tl.zeros((BLOCK, BLOCK_CHANNELS), SUM)
    for level in range(MAPS):
        height = tl.load(table + 3 * level)
        width = tl.load(table + 3 * level + 1)
        start = tl.load(table + 3 * level + 2)
        for number in range(POINTS):
            point = first + level * POINTS + number
            x = tl.load(locations + 2 * point, mask=valid, other=0.0).to(SUM) * width - 0.5
            y = tl.load(locations + 2 * point + 1, mask=valid, other=0.0).to(SUM) * height - 0.5
            weight = tl.load(weights + point, mask=valid, other=0.0).to(SUM)
            total = add_sample(
                total, image + start * step, y, x, weight, valid, height, width, step, channel,
                used, SUM,
            )  # fmt: skip
    place = out + position * step + head * CHANNELS
    tl.store(place[:, None] + channel, total.to(out.dtype.element_ty), mask=valid[:, None] & used)


@triton.autotune(
    configs=configurations(), key=["CHANNELS", "POINTS", "MAPS", "positions", "FIXED"],
    reset_to_zero=["value_gradient"],
)  # fmt: skip
@triton.jit
def _backward_kernel(
    gradient, value, locations, weights, value_gradient, location_gradient, weight_gradient, scale,
    table, positions, queries, pixels, heads,
    FIXED: tl.constexpr, MAPS: tl.constexpr, POINTS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, position, valid, channel, used = block(
        positions, CHANNELS, BLOCK_CHANNELS, BLOCK
    )
    step = heads * CHANNELS
    image = position // queries * pixels * step + head * CHANNELS
    first = (position * heads + head) * (MAPS * POINTS)
    place = gradient + position * step + head * CHANNELS
    upstream = tl.load(place[:, None] + channel, mask=valid[:, None] & used, other=0.0).to(SUM)
    fixed_scale = tl.load(scale)
    for level in range(MAPS):
        height = tl.load(table + 3 * level)
        width = tl.load(table + 3 * level + 1)
        start = tl.load(table + 3 * level + 2)
        for number in range(POINTS):
            point = first + level * POINTS + number
            x = tl.load(locations + 2 * point, mask=valid, other=0.0).to(SUM) * width - 0.5
            y = tl.load(locations + 2 * point + 1, mask=valid, other=0.0).to(SUM) * height - 0.5
            weight = tl.load(weights + point, mask=valid, other=0.0).to(SUM)
            along_y, along_x, along_weight = scatter_sample(
                upstream, value, value_gradient, fixed_scale, image + start * step, y, x, weight,
                valid, height, width, step, channel, used, FIXED, SUM, BLOCK,
            )  # fmt: skip
            kind = location_gradient.dtype.element_ty
            tl.store(location_gradient + 2 * point, (along_x * width).to(kind), mask=valid)
            tl.store(location_gradient + 2 * point + 1, (along_y * height).to(kind), mask=valid)
            kind = weight_gradient.dtype.element_ty
            tl.store(weight_gradient + point, along_weight.to(kind), mask=valid)
