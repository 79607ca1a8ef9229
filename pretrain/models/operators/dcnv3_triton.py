"""DCNv3 on GPUs, in Triton: a program computes some outputs of one group, for all its channels.

Sums and coordinates are float32 (float64 for float64 values); indices into tensors are 64-bit. The
gradient of the values is scattered by atomic additions into a float32 buffer. Under
`torch.use_deterministic_algorithms(True)` it is scattered as 64-bit fixed-point numbers, whose sum
does not depend on the order: the same bits in every run, at twice the traffic of that buffer.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.models.operators.window import Window, sum_type

_TRITON_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
# Bits that a fixed-point sum may fill: one below the sign, one to spare.
_FIXED_BITS = 62


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
    fixed = torch.are_deterministic_algorithms_enabled()
    summed = torch.int64 if fixed else sum_type(value.dtype)
    value_gradient = torch.zeros(value.shape, dtype=summed, device=value.device)
    offset_gradient, mask_gradient = torch.empty_like(offset), torch.empty_like(mask)
    scale = _fixed_point_scale(gradient, mask, window) if fixed else gradient.new_ones(1).double()
    if gradient.numel():
        _backward_kernel[_grid(gradient, window)](
            gradient, value, offset, mask, value_gradient, offset_gradient, mask_gradient, scale,
            *_geometry(value, gradient, window), FIXED=fixed, **_constants(value, window),
        )
    if fixed:
        value_gradient = value_gradient.double() / scale
    return value_gradient.to(value.dtype), offset_gradient, mask_gradient


def _grid(out: Tensor, window: Window):
    positions = out.shape[0] * out.shape[1] * out.shape[2]
    return lambda meta: (triton.cdiv(positions, meta["BLOCK"]), window.groups)


def _geometry(value: Tensor, out: Tensor, window: Window) -> tuple[int, ...]:
    n, height, width, channels = value.shape
    rows, columns = out.shape[1:3]
    return n * rows * columns, height, width, rows, columns, channels, window.groups


def _constants(value: Tensor, window: Window) -> dict:
    channels = value.shape[-1] // window.groups
    center_y, center_x = window.centers()
    middle = (window.kernel_size[1] // 2) * window.kernel_size[0] + window.kernel_size[0] // 2
    return {
        "STRIDE_Y": window.stride[0], "STRIDE_X": window.stride[1],
        "ORIGIN_Y": center_y - window.pad[0], "ORIGIN_X": center_x - window.pad[1],
        "STEP_Y": window.dilation[0], "STEP_X": window.dilation[1],
        "CENTER_Y": center_y, "CENTER_X": center_x,
        "KERNEL_ROWS": window.kernel_size[0], "POINTS": window.points,
        "REMOVED": middle if window.remove_center else window.points,
        "SCALE": float(window.offset_scale), "CHANNELS": channels,
        "BLOCK_CHANNELS": triton.next_power_of_2(channels),
        "SUM": _TRITON_TYPES[sum_type(value.dtype)],
    }  # fmt: skip


def _fixed_point_scale(gradient: Tensor, mask: Tensor, window: Window) -> Tensor:
    """(1,) float64 power of two: the largest that no sum of contributions can overflow with.

    Stays on the device. A pixel gets at most |gradient| * |mask| of every point of its image.
    """
    terms = gradient.shape[1] * gradient.shape[2] * window.points
    largest = gradient.abs().amax().double() * mask.abs().amax().double() * terms
    exponent = (_FIXED_BITS - largest.log2()).floor().clamp(-1000.0, 1000.0)
    return torch.where(torch.isfinite(exponent), exponent.exp2(), 1.0).reshape(1)


def _configurations() -> list[triton.Config]:
    """Blocks to choose from by measurement; the interpreter, which measures nothing, has one."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [triton.Config({"BLOCK": 64}, num_warps=4)]
    return [
        triton.Config({"BLOCK": block}, num_warps=warps)
        for block, warps in ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4), (128, 4), (256, 8))
    ]


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


@triton.jit
def _axis(coordinate, near, size):
    """Lower neighbour of a coordinate, the weight of the upper one, and which of them are inside.

    A distant coordinate would overflow as an index: it becomes 0, and nothing of it is inside.
    """
    coordinate = tl.where(near, coordinate, 0.0)
    low = tl.floor(coordinate)
    fraction = coordinate - low
    index = low.to(tl.int64)
    return index, fraction, near & (index >= 0), near & (index < size - 1)


@triton.jit
def _corner(
    row, down, row_low, row_high, column, right, column_low, column_high, width,
    CORNER: tl.constexpr,
):  # fmt: skip
    """One of the four pixels around a point: its number in the image, its weights along y and x,
    and whether it is inside."""
    FAR_Y: tl.constexpr = CORNER // 2
    FAR_X: tl.constexpr = CORNER % 2
    inside = (row_high if FAR_Y else row_low) & (column_high if FAR_X else column_low)
    share_y = down if FAR_Y else 1 - down
    share_x = right if FAR_X else 1 - right
    return (row + FAR_Y) * width + column + FAR_X, share_y, share_x, inside


@triton.autotune(configs=_configurations(), key=["CHANNELS", "POINTS", "positions"])
@triton.jit
def _forward_kernel(
    value, offset, mask, out, positions, height, width, rows, columns, channels, groups,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, ORIGIN_Y: tl.constexpr, ORIGIN_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, CENTER_Y: tl.constexpr, CENTER_X: tl.constexpr,
    KERNEL_ROWS: tl.constexpr, POINTS: tl.constexpr, REMOVED: tl.constexpr, SCALE: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = position < positions
    channel = tl.arange(0, BLOCK_CHANNELS)[None, :]
    used = channel < CHANNELS
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
        near = valid & (y > -1) & (y < height) & (x > -1) & (x < width)
        weight = tl.load(mask + first + point, mask=valid, other=0.0).to(SUM)
        row, down, row_low, row_high = _axis(y, near, height)
        column, right, column_low, column_high = _axis(x, near, width)
        for corner in tl.static_range(4):
            pixel, share_y, share_x, inside = _corner(
                row, down, row_low, row_high, column, right, column_low, column_high, width, corner
            )
            places = (image + pixel * channels)[:, None] + channel
            read = tl.load(places, mask=inside[:, None] & used, other=0.0)
            total += (weight * share_y * share_x)[:, None] * read.to(SUM)
    place = out + position * channels + group * CHANNELS
    tl.store(place[:, None] + channel, total.to(out.dtype.element_ty), mask=valid[:, None] & used)


@triton.autotune(
    configs=_configurations(), key=["CHANNELS", "POINTS", "positions", "FIXED"],
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
    group = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = position < positions
    channel = tl.arange(0, BLOCK_CHANNELS)[None, :]
    used = channel < CHANNELS
    origin_y = (position // columns % rows * STRIDE_Y + ORIGIN_Y).to(SUM)
    origin_x = (position % columns * STRIDE_X + ORIGIN_X).to(SUM)
    image = position // (rows * columns) * height * width * channels + group * CHANNELS
    first = (position * groups + group) * POINTS
    place = gradient + position * channels + group * CHANNELS
    upstream = tl.load(place[:, None] + channel, mask=valid[:, None] & used, other=0.0).to(SUM)
    if FIXED:
        fixed_scale = tl.load(scale)
    for point in range(POINTS):
        y, x = _place(
            offset, first + point, point, origin_y, origin_x, valid,
            STEP_Y, STEP_X, CENTER_Y, CENTER_X, KERNEL_ROWS, REMOVED, SCALE, SUM,
        )  # fmt: skip
        near = valid & (y > -1) & (y < height) & (x > -1) & (x < width)
        weight = tl.load(mask + first + point, mask=valid, other=0.0).to(SUM)
        row, down, row_low, row_high = _axis(y, near, height)
        column, right, column_low, column_high = _axis(x, near, width)
        along_y = tl.zeros((BLOCK,), SUM)
        along_x = tl.zeros((BLOCK,), SUM)
        along_weight = tl.zeros((BLOCK,), SUM)
        for corner in tl.static_range(4):
            pixel, share_y, share_x, inside = _corner(
                row, down, row_low, row_high, column, right, column_low, column_high, width, corner
            )
            places = (image + pixel * channels)[:, None] + channel
            wanted = inside[:, None] & used
            read = tl.load(value + places, mask=wanted, other=0.0).to(SUM)
            product = tl.sum(read * upstream, axis=1)
            along_weight += product * share_y * share_x
            along_y += product * share_x * (2 * (corner // 2) - 1)
            along_x += product * share_y * (2 * (corner % 2) - 1)
            part = (weight * share_y * share_x)[:, None] * upstream
            if FIXED:
                part = tl.floor(part.to(tl.float64) * fixed_scale + 0.5).to(tl.int64)
            tl.atomic_add(value_gradient + places, part, mask=wanted, sem="relaxed")
        offsets = offset_gradient + 2 * (first + point)
        kind = offset_gradient.dtype.element_ty
        tl.store(offsets, (along_x * weight * SCALE).to(kind), mask=valid)
        tl.store(offsets + 1, (along_y * weight * SCALE).to(kind), mask=valid)
        kind = mask_gradient.dtype.element_ty
        tl.store(mask_gradient + first + point, along_weight.to(kind), mask=valid)
