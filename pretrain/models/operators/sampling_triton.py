"""Weighted sums of bilinear samples in Triton: what the kernels of the deformable operators share.

A program computes BLOCK positions of one group (or head), for all its channels. Sums and
coordinates are float32 (float64 for float64 values); indices into tensors are 64-bit. The gradient
of the values is scattered by atomic additions into a float32 buffer. Under
`torch.use_deterministic_algorithms(True)` it is scattered as 64-bit fixed-point numbers, whose sum
does not depend on the order: the same bits in every run, at twice the traffic of that buffer.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.models.operators.window import sum_type

_TRITON_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
# Bits that a fixed-point sum may fill: one below the sign, one to spare.
_FIXED_BITS = 62


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def configurations() -> list[triton.Config]:
    """Blocks to choose from by measurement; the interpreter, which measures nothing, has one."""
    if interpreted():
        return [triton.Config({"BLOCK": 1024}, num_warps=4)]
    return [
        triton.Config({"BLOCK": block}, num_warps=warps)
        for block, warps in ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4), (128, 4), (256, 8))
    ]


def constants(value: Tensor, channels: int) -> dict:
    """Compile-time arguments of every kernel: `channels` of a group, and the type of sums."""
    return {
        "CHANNELS": channels, "BLOCK_CHANNELS": triton.next_power_of_2(channels),
        "SUM": _TRITON_TYPES[sum_type(value.dtype)],
    }  # fmt: skip


def grid(positions: int, groups: int):
    """Programs of a launch, given its block."""
    return lambda meta: (triton.cdiv(positions, meta["BLOCK"]), groups)


class Scatter:
    """The buffer that value gradients are added to, in floating or fixed point.

    Args:
        value: what the gradient is of.
        gradient, weights: of the sums; they bound what a pixel can receive.
        terms: most points that can fall on one pixel.
    """

    def __init__(self, value: Tensor, gradient: Tensor, weights: Tensor, terms: int) -> None:
        self.fixed = torch.are_deterministic_algorithms_enabled()
        self.scale = torch.ones(1, dtype=torch.float64, device=value.device)
        if self.fixed and gradient.numel() and weights.numel():
            largest = gradient.abs().amax().double() * weights.abs().amax().double() * terms
            exponent = (_FIXED_BITS - largest.log2()).floor().clamp(-1000.0, 1000.0)
            # Stays on the device. A gradient that is zero or not finite has no scale.
            scale = torch.where(torch.isfinite(exponent), exponent.exp2(), 1.0)
            self.scale = torch.where(largest > 0, scale, 1.0).reshape(1)
        dtype = torch.int64 if self.fixed else sum_type(value.dtype)
        self.buffer = torch.zeros(value.shape, dtype=dtype, device=value.device)
        self._finite = torch.isfinite(gradient).all() if self.fixed else None

    def result(self, dtype: torch.dtype) -> Tensor:
        """The gradient; not a number everywhere if fixed point could not hold what came in."""
        if not self.fixed:
            return self.buffer.to(dtype)
        total = self.buffer.double() / self.scale
        return torch.where(self._finite, total, torch.nan).to(dtype)


@triton.jit
def block(
    positions, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    """What a program computes: its group, positions (BLOCK,) and which of them there are, channels
    (1, BLOCK_CHANNELS) and which of them there are."""
    group = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_CHANNELS)[None, :]
    return group, position, position < positions, channel, channel < CHANNELS


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
    """One of the four pixels around a point: its number in the map, its weights along y and x, and
    whether it is inside."""
    FAR_Y: tl.constexpr = CORNER // 2
    FAR_X: tl.constexpr = CORNER % 2
    inside = (row_high if FAR_Y else row_low) & (column_high if FAR_X else column_low)
    share_y = down if FAR_Y else 1 - down
    share_x = right if FAR_X else 1 - right
    return (row + FAR_Y) * width + column + FAR_X, share_y, share_x, inside


@triton.jit
def add_sample(
    total, image, y, x, weight, valid, height, width, pixel_step, channel, used, SUM: tl.constexpr
):
    """`total` (BLOCK, channels) plus weight times the sample at (y, x) of a map.

    image: (BLOCK,) pointers to the map's first pixel; pixel_step: elements between two pixels.
    """
    near = valid & (y > -1) & (y < height) & (x > -1) & (x < width)
    row, down, row_low, row_high = _axis(y, near, height)
    column, right, column_low, column_high = _axis(x, near, width)
    for corner in tl.static_range(4):
        pixel, share_y, share_x, inside = _corner(
            row, down, row_low, row_high, column, right, column_low, column_high, width, corner
        )
        places = (image + pixel * pixel_step)[:, None] + channel
        read = tl.load(places, mask=inside[:, None] & used, other=0.0)
        total += (weight * share_y * share_x)[:, None] * read.to(SUM)
    return total


@triton.jit
def scatter_sample(
    upstream, value, value_gradient, scale, image, y, x, weight, valid, height, width, pixel_step,
    channel, used, FIXED: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients (BLOCK,) of a point's y, x and weight; that of the values is scattered.

    upstream: (BLOCK, channels), gradient of the sum; image: (BLOCK,) elements before the map's
    first pixel, in `value` as in `value_gradient`.
    """
    near = valid & (y > -1) & (y < height) & (x > -1) & (x < width)
    row, down, row_low, row_high = _axis(y, near, height)
    column, right, column_low, column_high = _axis(x, near, width)
    along_y = tl.zeros((BLOCK,), SUM)
    along_x = tl.zeros((BLOCK,), SUM)
    along_weight = tl.zeros((BLOCK,), SUM)
    for corner in tl.static_range(4):
        pixel, share_y, share_x, inside = _corner(
            row, down, row_low, row_high, column, right, column_low, column_high, width, corner
        )
        places = (image + pixel * pixel_step)[:, None] + channel
        wanted = inside[:, None] & used
        read = tl.load(value + places, mask=wanted, other=0.0).to(SUM)
        product = tl.sum(read * upstream, axis=1)
        along_weight += product * share_y * share_x
        along_y += product * share_x * (2 * (corner // 2) - 1)
        along_x += product * share_y * (2 * (corner % 2) - 1)
        part = (weight * share_y * share_x)[:, None] * upstream
        if FIXED:
            part = tl.floor(part.to(tl.float64) * scale + 0.5).to(tl.int64)
        tl.atomic_add(value_gradient + places, part, mask=wanted, sem="relaxed")
    return along_y * weight, along_x * weight, along_weight
