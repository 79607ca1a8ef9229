"""DCNv3 on GPUs, in Triton; see `sampling_triton.py` for the precision and for determinism."""

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
from pretrain.models.operators.window import Window

# Points computed at a time.
UNROLLS = (3, 1, 9)
# No compilation of its own for each image size.
_SIZES = ("items", "height", "width", "rows", "columns", "magnitude")


def forward(value: Tensor, offset: Tensor, mask: Tensor, window: Window) -> Tensor:
    """Output (N, H_out, W_out, C) in the type of `value`; arguments as in `dcnv3`, checked."""
    value, offset, mask = (tensor.contiguous() for tensor in (value, offset, mask))
    n, height, width, channels = value.shape
    out = value.new_empty(n, *window.output_size(height, width), channels)
    if out.numel():
        arguments = (value, offset, mask, out, *geometry(value, out, window))
        launch(forward_kernel, _items(out, window), arguments, settings(value, offset, out, window))
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
        arguments = (
            gradient,
            value,
            offset,
            mask,
            scatter.buffer,
            offset_gradient,
            mask_gradient,
            scatter.scale,
            *geometry(value, gradient, window),
        )
        launch(
            backward_kernel,
            _items(gradient, window),
            arguments,
            {"FIXED": scatter.fixed} | settings(value, offset, gradient, window, scatter.buffer),
        )
    return scatter.result(value.dtype), offset_gradient, mask_gradient


def _items(out: Tensor, window: Window) -> int:
    return out.shape[0] * out.shape[1] * out.shape[2] * window.groups


def geometry(value: Tensor, out: Tensor, window: Window) -> tuple[int, ...]:
    """Sizes that the kernels take after their tensors."""
    items = _items(out, window)
    return items, *value.shape[1:3], *out.shape[1:3], items.bit_length()


def settings(
    value: Tensor, offset: Tensor, out: Tensor, window: Window, buffer: Tensor | None = None
) -> dict:
    """What the kernels are compiled for; `buffer` is that of the backward pass."""
    center_y, center_x = window.centers()
    middle = (window.kernel_size[1] // 2) * window.kernel_size[0] + window.kernel_size[0] // 2
    largest = max(offset.numel(), out.numel(), value.shape[1:].numel())
    return {
        "STRIDE_Y": window.stride[0],
        "STRIDE_X": window.stride[1],
        "ORIGIN_Y": center_y - window.pad[0],
        "ORIGIN_X": center_x - window.pad[1],
        "STEP_Y": window.dilation[0],
        "STEP_X": window.dilation[1],
        "CENTER_Y": center_y,
        "CENTER_X": center_x,
        "KERNEL_ROWS": window.kernel_size[0],
        "POINTS": window.points,
        "REMOVED": middle if window.remove_center else window.points,
        "SCALE": float(window.offset_scale),
    } | constants(value, window.groups, value.shape[-1] // window.groups, largest, buffer)


@triton.jit
def _place(
    offset,
    first,
    point,
    origin_y,
    origin_x,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    CENTER_Y: tl.constexpr,
    CENTER_X: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    REMOVED: tl.constexpr,
    SCALE: tl.constexpr,
    SUM: tl.constexpr,
):
    """Coordinates (y, x) at which a point is read, (BLOCK,)."""
    number = point + tl.where(point >= REMOVED, 1, 0)  # points go column by column
    step_x = (number // KERNEL_ROWS) * STEP_X - CENTER_X
    step_y = (number % KERNEL_ROWS) * STEP_Y - CENTER_Y
    shift_x = tl.load(offset + 2 * first + 2 * point).to(SUM)
    shift_y = tl.load(offset + 2 * first + 2 * point + 1).to(SUM)
    return origin_y + SCALE * (step_y + shift_y), origin_x + SCALE * (step_x + shift_x)


@triton.autotune(
    configs=configurations(FORWARD_WARPS, UNROLLS),
    key=["GROUPS", "CHANNELS", "POINTS", "magnitude"],
)
@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    value,
    offset,
    mask,
    out,
    items,
    height,
    width,
    rows,
    columns,
    magnitude,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    ORIGIN_Y: tl.constexpr,
    ORIGIN_X: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    CENTER_Y: tl.constexpr,
    CENTER_X: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    POINTS: tl.constexpr,
    REMOVED: tl.constexpr,
    SCALE: tl.constexpr,
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
    item, own, position, group, channel, used = block(
        items, GROUPS, CHANNELS, BLOCK_CHANNELS, INDEX, ELEMENT, WIDTH, SPAN, WARPS
    )
    line = position // columns
    origin_y = (line % rows * STRIDE_Y + ORIGIN_Y).to(SUM)
    origin_x = (position % columns * STRIDE_X + ORIGIN_X).to(SUM)
    pixels = height.to(tl.int64) * width
    image = line // rows * pixels * (GROUPS * CHANNELS) + group * CHANNELS
    image = (value + image)[None, :, None] + channel
    first = item * POINTS
    total = tl.zeros((channel.shape[0], item.shape[0], channel.shape[2]), SUM)
    for point in tl.range(POINTS, loop_unroll_factor=UNROLL):
        y, x = _place(
            offset,
            first,
            point,
            origin_y,
            origin_x,
            STEP_Y,
            STEP_X,
            CENTER_Y,
            CENTER_X,
            KERNEL_ROWS,
            REMOVED,
            SCALE,
            SUM,
        )
        weight = tl.load(mask + first + point).to(SUM)
        total = add_sample(
            total,
            image,
            y,
            x,
            weight,
            height,
            width,
            used,
            GROUPS * CHANNELS,
            SUM,
            INDEX,
            UNSIGNED,
            PAIRS,
        )
    places = (out + item * CHANNELS)[None, :, None] + channel
    tl.store(places, total.to(out.dtype.element_ty), mask=own[None, :, None] & used)


@triton.autotune(
    configs=configurations(BACKWARD_WARPS, UNROLLS),
    key=["GROUPS", "CHANNELS", "POINTS", "magnitude", "FIXED"],
    reset_to_zero=["value_gradient"],
)
@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    gradient,
    value,
    offset,
    mask,
    value_gradient,
    offset_gradient,
    mask_gradient,
    scale,
    items,
    height,
    width,
    rows,
    columns,
    magnitude,
    FIXED: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    ORIGIN_Y: tl.constexpr,
    ORIGIN_X: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    CENTER_Y: tl.constexpr,
    CENTER_X: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    POINTS: tl.constexpr,
    REMOVED: tl.constexpr,
    SCALE: tl.constexpr,
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
    item, own, position, group, channel, used = block(
        items, GROUPS, CHANNELS, BLOCK_CHANNELS, INDEX, ELEMENT, WIDTH, SPAN, WARPS
    )
    line = position // columns
    origin_y = (line % rows * STRIDE_Y + ORIGIN_Y).to(SUM)
    origin_x = (position % columns * STRIDE_X + ORIGIN_X).to(SUM)
    pixels = height.to(tl.int64) * width
    image = line // rows * pixels * (GROUPS * CHANNELS) + group * CHANNELS
    image = image[None, :, None] + channel
    first = item * POINTS
    places = (gradient + item * CHANNELS)[None, :, None] + channel
    upstream = tl.load(places, mask=own[None, :, None] & used, other=0.0).to(SUM)
    fixed_scale = tl.load(scale)
    for point in tl.range(POINTS, loop_unroll_factor=UNROLL):
        y, x = _place(
            offset,
            first,
            point,
            origin_y,
            origin_x,
            STEP_Y,
            STEP_X,
            CENTER_Y,
            CENTER_X,
            KERNEL_ROWS,
            REMOVED,
            SCALE,
            SUM,
        )
        weight = tl.load(mask + first + point).to(SUM)
        along_y, along_x, along_weight = scatter_sample(
            upstream,
            value,
            value_gradient,
            fixed_scale,
            image,
            y,
            x,
            weight,
            height,
            width,
            used,
            FIXED,
            GROUPS * CHANNELS,
            SUM,
            INDEX,
            UNSIGNED,
            PAIRS,
        )
        offsets = offset_gradient + 2 * first + 2 * point
        kind = offset_gradient.dtype.element_ty
        tl.store(offsets, (along_x * SCALE).to(kind), mask=own)
        tl.store(offsets + 1, (along_y * SCALE).to(kind), mask=own)
        kind = mask_gradient.dtype.element_ty
        tl.store(mask_gradient + first + point, along_weight.to(kind), mask=own)
