"""DCNv3 on GPUs, in Triton; see `sampling_triton.py` for the precision and for determinism."""

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
from pretrain.models.operators.window import Window


def forward(value: Tensor, offset: Tensor, mask: Tensor, window: Window) -> Tensor:
    """Output (N, H_out, W_out, C) in the type of `value`; arguments as in `dcnv3`, checked."""
    value, offset, mask = (tensor.contiguous() for tensor in (value, offset, mask))
    n, height, width, channels = value.shape
    out = value.new_empty(n, *window.output_size(height, width), channels)
    if out.numel():
        _forward_kernel[_grid(out, window)](
            value, offset, mask, out, *_geometry(value, out, window), **_constants(value, window)
        )
    return out


def backward(
    gradient: Tensor, value: Tensor, offset: Tensor, mask: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offset and mask, each of its own shape and type."""
    gradient, value, offset, mask = (t.contiguous() for t in (gradient, value, offset, mask))
    terms = gradient.shape[1] * gradient.shape[2] * window.points
    scatter = Scatter(value, gradient, mask, terms)
    offset_gradient, mask_gradient = torch.empty_like(offset), torch.empty_like(mask)
    if gradient.numel():
        _backward_kernel[_grid(gradient, window)](
            gradient, value, offset, mask, scatter.buffer, offset_gradient, mask_gradient,
            scatter.scale, *_geometry(value, gradient, window), FIXED=scatter.fixed,
            **_constants(value, window),
        )
    return scatter.result(value.dtype), offset_gradient, mask_gradient


def _grid(out: Tensor, window: Window):
    return grid(out.shape[0] * out.shape[1] * out.shape[2], window.groups)


def _geometry(value: Tensor, out: Tensor, window: Window) -> tuple[int, ...]:
    n, height, width, channels = value.shape
    rows, columns = out.shape[1:3]
    return n * rows * columns, height, width, rows, columns, channels, window.groups


def _constants(value: Tensor, window: Window) -> dict:
    center_y, center_x = window.centers()
    middle = (window.kernel_size[1] // 2) * window.kernel_size[0] + window.kernel_size[0] // 2
    return {
        "STRIDE_Y": window.stride[0], "STRIDE_X": window.stride[1],
        "ORIGIN_Y": center_y - window.pad[0], "ORIGIN_X": center_x - window.pad[1],
        "STEP_Y": window.dilation[0], "STEP_X": window.dilation[1],
        "CENTER_Y": center_y, "CENTER_X": center_x,
        "KERNEL_ROWS": window.kernel_size[0], "POINTS": window.points,
        "REMOVED": middle if window.remove_center else window.points,
        "SCALE": float(window.offset_scale),
    } | constants(value, value.shape[-1] // window.groups)  # fmt: skip


@triton.jit
def _place(
    offset, point_index, point, origin_y, origin_x, valid,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, CENTER_Y: tl.constexpr, CENTER_X: tl.constexpr,
    KERNEL_ROWS: tl.constexpr, REMOVED: tl.constexpr, SCALE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Coordinates (y, x) at which a point is read, (BLOCK,)."""
    number = point + tl.where(point >= REMOVED, 1, 0)  # points go column by column
    step_x = (number // KERNEL_ROWS) * STEP_X - CENTER_X
    step_y = (number % KERNEL_ROWS) * STEP_Y - CENTER_Y
    shift_x = tl.load(offset + 2 * point_index, mask=valid, other=0.0).to(SUM)
    shift_y = tl.load(offset + 2 * point_index + 1, mask=valid, other=0.0).to(SUM)
    return origin_y + SCALE * (step_y + shift_y), origin_x + SCALE * (step_x + shift_x)


@triton.autotune(configs=configurations(), key=["CHANNELS", "POINTS", "positions"])
@triton.jit
def _forward_kernel(
    value, offset, mask, out, positions, height, width, rows, columns, channels, groups,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, ORIGIN_Y: tl.constexpr, ORIGIN_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, CENTER_Y: tl.constexpr, CENTER_X: tl.constexpr,
    KERNEL_ROWS: tl.constexpr, POINTS: tl.constexpr, REMOVED: tl.constexpr, SCALE: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, position, valid, channel, used = block(
        positions, CHANNELS, BLOCK_CHANNELS, BLOCK
    )
    origin_y = (position // columns % rows * STRIDE_Y + ORIGIN_Y).to(SUM)
    origin_x = (position % columns * STRIDE_X + ORIGIN_X).to(SUM)
    image = value + (position // (rows * columns) * height * width * channels + group * CHANNELS)
    first = (position * groups + group) * POINTS
    total = tl.zeros((BLOCK, BLOCK_CHANNELS), SUM)
    for point in range(POINTS):
        y, x = _place(
            offset, first + point, point, origin_y, origin_x, valid,
            STEP_Y, STEP_X, CENTER_Y, CENTER_X, KERNEL_ROWS, REMOVED, SCALE, SUM,
        )  # fmt: skip
        weight = tl.load(mask + first + point, mask=valid, other=0.0).to(SUM)
        total = add_sample(
            total, image, y, x, weight, valid, height, width, channels, channel, used, SUM
        )
    place = out + position * channels + group * CHANNELS
    tl.store(place[:, None] + channel, total.to(out.dtype.element_ty), mask=valid[:, None] & used)


@triton.autotune(
    configs=configurations(), key=["CHANNELS", "POINTS", "positions", "FIXED"],
    reset_to_zero=["value_gradient"],
)  # fmt: skip
@triton.jit
def _backward_kernel(
    gradient, value, offset, mask, value_gradient, offset_gradient, mask_gradient, scale,
    positions, height, width, rows, columns, channels, groups, FIXED: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, ORIGIN_Y: tl.constexpr, ORIGIN_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, CENTER_Y: tl.constexpr, CENTER_X: tl.constexpr,
    KERNEL_ROWS: tl.constexpr, POINTS: tl.constexpr, REMOVED: tl.constexpr, SCALE: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, position, valid, channel, used = block(
        positions, CHANNELS, BLOCK_CHANNELS, BLOCK
    )
    origin_y = (position // columns % rows * STRIDE_Y + ORIGIN_Y).to(SUM)
    origin_x = (position % columns * STRIDE_X + ORIGIN_X).to(SUM)
    image = position // (rows * columns) * height * width * channels + group * CHANNELS
    first = (position * groups + group) * POINTS
    place = gradient + position * channels + group * CHANNELS
    upstream = tl.load(place[:, None] + channel, mask=valid[:, None] & used, other=0.0).to(SUM)
    fixed_scale = tl.load(scale)
    for point in range(POINTS):
        y, x = _place(
            offset, first + point, point, origin_y, origin_x, valid,
            STEP_Y, STEP_X, CENTER_Y, CENTER_X, KERNEL_ROWS, REMOVED, SCALE, SUM,
        )  # fmt: skip
        weight = tl.load(mask + first + point, mask=valid, other=0.0).to(SUM)
        along_y, along_x, along_weight = scatter_sample(
            upstream, value, value_gradient, fixed_scale, image, y, x, weight, valid, height, width,
            channels, channel, used, FIXED, SUM, BLOCK,
        )  # fmt: skip
        offsets = offset_gradient + 2 * (first + point)
        kind = offset_gradient.dtype.element_ty
        tl.store(offsets, (along_x * SCALE).to(kind), mask=valid)
        tl.store(offsets + 1, (along_y * SCALE).to(kind), mask=valid)
        kind = mask_gradient.dtype.element_ty
        tl.store(mask_gradient + first + point, along_weight.to(kind), mask=valid)
