"""Multi-scale deformable attention on GPUs, in Triton; see `sampling_triton.py`."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.models.operators.sampling_triton import (
    BACKWARD_WARPS,
    FORWARD_WARPS,
    Scatter,
    add_sample,
    block,
    configurations,
    constants,
    launch,
    scatter_sample,
)

Sizes = tuple[tuple[int, ...], tuple[int, ...]]
# Points of a map computed at a time.
UNROLLS = (2, 1, 4)
# No compilation of its own for each image size.
_SIZES = (
    "heights",
    "more_heights",
    "widths",
    "more_widths",
    "items",
    "queries",
    "pixels",
    "magnitude",
)
# Sides of maps go to the kernels within numbers (`_packed`). A table of them would have to be kept
# for later calls, in the GPU's memory: if a CUDA graph is made of the first one, in the graph's,
# which others write over.
_IN_NUMBER, _SIDE_BITS = 4, 15


def forward(value: Tensor, locations: Tensor, weights: Tensor, maps: Sizes) -> Tensor:
    """Output (N, Q, heads * D) in the type of `value`; arguments as in `ms_deform_attn`, checked.

    `maps` are the heights and the widths of the maps.
    """
    value, locations, weights = (t.contiguous() for t in (value, locations, weights))
    n, _, heads, depth = value.shape
    queries = locations.shape[1]
    out = value.new_empty(n, queries, heads * depth)
    if out.numel():
        arguments = (value, locations, weights, out, *geometry(value, queries, maps))
        launch(forward_kernel, n * queries * heads, arguments, settings(value, locations, out))
    return out


def backward(
    gradient: Tensor, value: Tensor, locations: Tensor, weights: Tensor, maps: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, each of its own shape and type."""
    gradient, value, locations, weights = (
        t.contiguous() for t in (gradient, value, locations, weights)
    )
    n, _, heads, _ = value.shape
    queries = locations.shape[1]
    scatter = Scatter(value, gradient, weights, queries * weights.shape[-1])
    of_locations, of_weights = torch.empty_like(locations), torch.empty_like(weights)
    if gradient.numel():
        arguments = (
            gradient,
            value,
            locations,
            weights,
            scatter.buffer,
            of_locations,
            of_weights,
            scatter.scale,
            *geometry(value, queries, maps),
        )
        launch(
            backward_kernel,
            n * queries * heads,
            arguments,
            {"FIXED": scatter.fixed} | settings(value, locations, gradient, scatter.buffer),
        )
    return scatter.result(value.dtype), of_locations, of_weights


def geometry(value: Tensor, queries: int, maps: Sizes) -> tuple:
    """Sizes that the kernels take after their tensors.

    Errors: ValueError for more maps, or longer ones, than there is room for.
    """
    n, pixels, heads, _ = value.shape
    items = n * queries * heads
    heights, widths = maps
    if len(heights) > 2 * _IN_NUMBER or max(heights + widths) >> _SIDE_BITS:
        raise ValueError(
            f"maps of heights {heights} and widths {widths}: backend='triton' has room for "
            f"{2 * _IN_NUMBER} maps with sides below {1 << _SIDE_BITS}; take backend='torch'"
        )
    return *_packed(heights), *_packed(widths), items, queries, pixels, items.bit_length()


def settings(value: Tensor, locations: Tensor, out: Tensor, buffer: Tensor | None = None) -> dict:
    """What the kernels are compiled for; `buffer` is that of the backward pass."""
    largest = max(locations.numel(), out.numel(), value.shape[1:].numel())
    return {
        "MAPS": locations.shape[3],
        "POINTS": locations.shape[4],
    } | constants(value, *value.shape[2:], largest, buffer)


def _packed(sides: Sequence[int]) -> tuple[int, int]:
    """The sides of four maps, and of the next four, from the lowest bits on."""
    # A bit above all sides: Triton's type of a number depends on its size.
    numbers = [1 << 62, 1 << 62]
    for place, side in enumerate(sides):
        numbers[place // _IN_NUMBER] |= side << place % _IN_NUMBER * _SIDE_BITS
    return tuple(numbers)


@triton.jit
def _side(sides, more_sides, level, MAPS: tl.constexpr):
    """That of a map, out of two numbers that `_packed` made."""
    if MAPS > 4:
        sides = tl.where(level < 4, sides, more_sides)
    return (sides >> (level % 4 * 15) & 0x7FFF).to(tl.int32)


@triton.jit
def _place(locations, point, height, width, SUM: tl.constexpr):
    """Coordinates (y, x) at which a point (BLOCK,) is read."""
    x = tl.load(locations + 2 * point).to(SUM) * width - 0.5
    return tl.load(locations + 2 * point + 1).to(SUM) * height - 0.5, x


@triton.autotune(
    configs=configurations(FORWARD_WARPS, UNROLLS),
    key=["GROUPS", "CHANNELS", "POINTS", "MAPS", "magnitude"],
)
@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    value,
    locations,
    weights,
    out,
    heights,
    more_heights,
    widths,
    more_widths,
    items,
    queries,
    pixels,
    magnitude,
    MAPS: tl.constexpr,
    POINTS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    UNSIGNED: tl.constexpr,
    PAIRS: tl.constexpr,
    ELEMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    item, own, position, head, channel, used = block(
        items, GROUPS, CHANNELS, BLOCK_CHANNELS, INDEX, ELEMENT, WIDTH, SPAN, WARPS
    )
    step: tl.constexpr = GROUPS * CHANNELS
    image = position // queries * pixels.to(tl.int64) * step + head * CHANNELS
    image = (value + image)[None, :, None] + channel
    total = tl.zeros((channel.shape[0], item.shape[0], channel.shape[2]), SUM)
    start = pixels.to(tl.int64) * 0
    for level in range(MAPS):
        height = _side(heights, more_heights, level, MAPS)
        width = _side(widths, more_widths, level, MAPS)
        for number in tl.range(POINTS, loop_unroll_factor=UNROLL):
            point = (item * MAPS + level) * POINTS + number
            y, x = _place(locations, point, height, width, SUM)
            weight = tl.load(weights + point).to(SUM)
            total = add_sample(
                total,
                image + start * step,
                y,
                x,
                weight,
                height,
                width,
                used,
                step,
                SUM,
                INDEX,
                UNSIGNED,
                PAIRS,
            )
        start += height.to(tl.int64) * width
    places = (out + item * CHANNELS)[None, :, None] + channel
    tl.store(places, total.to(out.dtype.element_ty), mask=own[None, :, None] & used)


@triton.autotune(
    configs=configurations(BACKWARD_WARPS, UNROLLS),
    key=["GROUPS", "CHANNELS", "POINTS", "MAPS", "magnitude", "FIXED"],
    reset_to_zero=["value_gradient"],
)
@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    gradient,
    value,
    locations,
    weights,
    value_gradient,
    location_gradient,
    weight_gradient,
    scale,
    heights,
    more_heights,
    widths,
    more_widths,
    items,
    queries,
    pixels,
    magnitude,
    FIXED: tl.constexpr,
    MAPS: tl.constexpr,
    POINTS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    UNSIGNED: tl.constexpr,
    PAIRS: tl.constexpr,
    ELEMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    item, own, position, head, channel, used = block(
        items, GROUPS, CHANNELS, BLOCK_CHANNELS, INDEX, ELEMENT, WIDTH, SPAN, WARPS
    )
    step: tl.constexpr = GROUPS * CHANNELS
    image = position // queries * pixels.to(tl.int64) * step + head * CHANNELS
    image = image[None, :, None] + channel
    places = (gradient + item * CHANNELS)[None, :, None] + channel
    upstream = tl.load(places, mask=own[None, :, None] & used, other=0.0).to(SUM)
    fixed_scale = tl.load(scale)
    start = pixels.to(tl.int64) * 0
    for level in range(MAPS):
        height = _side(heights, more_heights, level, MAPS)
        width = _side(widths, more_widths, level, MAPS)
        for number in tl.range(POINTS, loop_unroll_factor=UNROLL):
            point = (item * MAPS + level) * POINTS + number
            y, x = _place(locations, point, height, width, SUM)
            weight = tl.load(weights + point).to(SUM)
            along_y, along_x, along_weight = scatter_sample(
                upstream,
                value,
                value_gradient,
                fixed_scale,
                image + start * step,
                y,
                x,
                weight,
                height,
                width,
                used,
                FIXED,
                step,
                SUM,
                INDEX,
                UNSIGNED,
                PAIRS,
            )
            kind = location_gradient.dtype.element_ty
            tl.store(location_gradient + 2 * point, (along_x * width).to(kind), mask=own)
            tl.store(location_gradient + 2 * point + 1, (along_y * height).to(kind), mask=own)
            kind = weight_gradient.dtype.element_ty
            tl.store(weight_gradient + point, along_weight.to(kind), mask=own)
        start += height.to(tl.int64) * width
