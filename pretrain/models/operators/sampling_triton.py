"""Weighted sums of bilinear samples in Triton: what the kernels of the deformable operators share.

An item is one position of one group (or query of one head); a program computes BLOCK items that
follow each other in memory, all channels of each. So results are written and offsets read in one
run, and neighbouring threads read neighbouring pixels. Sums and coordinates are float32 (float64
for float64 values). Indices are 64-bit where a tensor or an image needs it (INDEX_LIMIT). The
gradient of the values is scattered by atomic additions into a float32 buffer. Under
`torch.use_deterministic_algorithms(True)` it is scattered as 64-bit fixed-point numbers, whose sum
does not depend on the order: the same bits in every run, at twice the traffic of that buffer.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.models.operators.window import sum_type

_TRITON_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
ACCESS = 16
"""Bytes that a thread reads, or adds, at a time."""
# Bits that a fixed-point sum may fill: one below the sign, one to spare.
_FIXED_BITS = 62
FORWARD_WARPS, BACKWARD_WARPS = 4, 1
"""Of a program. In the backward pass gradients of places change hands before they are written,
which several warps do through shared memory, behind barriers."""
_HELD = 32
"""Sums of an item that a thread holds at most: with hundreds, a candidate runs out of registers."""
INDEX_LIMIT = 2**31
"""Elements of a tensor from which on indices are 64-bit: these take a quarter more instructions in
the forward pass, a tenth in the backward pass. An image begins at a 64-bit place in any case."""

_FIRST_IS_NEAR = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))
# Neighbouring threads go along the axis on which addresses run on; then, as none does so on the
# others, along the first of these before Triton 3.7, the last one since. It has to be the items:
# were it the parts, threads would pass gradients on to each other, or read apart.


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def configurations(warps: int, unrolls: tuple[int, ...]) -> list[triton.Config]:
    """Candidates that are timed on the first call; the interpreter, which times nothing, has one.

    SPAN, bytes of a pixel that threads read or add to at a time: 32 are a whole sector of memory,
    with 16 fewer threads compute the place of the same point. UNROLL, points at a time: more hide
    more latency, and take more registers.
    """
    if interpreted():
        return [triton.Config({"SPAN": 32, "UNROLL": 1, "WARPS": 64}, num_warps=4)]
    return [
        triton.Config({"SPAN": span, "UNROLL": unroll, "WARPS": warps}, num_warps=warps)
        for span in (32, 16)
        for unroll in unrolls
    ]


def constants(
    value: Tensor, groups: int, channels: int, largest: int, buffer: Tensor | None = None
) -> dict:
    """Compile-time arguments of every kernel.

    Args:
        groups, channels: groups (or heads), and channels of one.
        largest: elements of the largest tensor, or of one image of values.
        buffer: what value gradients are added to. A thread takes as many channels as it reads at
            a time, or adds: else threads would pass the gradients of channels on to each other.
    """
    wide = largest >= INDEX_LIMIT
    accessed = value if buffer is None else buffer
    width = ACCESS // accessed.element_size() if buffer is None or _adds_vectors(buffer) else 1
    pairs = value.dtype == torch.bfloat16 and width > 1 and torch.version.hip is None
    return {
        "GROUPS": groups,
        "CHANNELS": channels,
        "BLOCK_CHANNELS": triton.next_power_of_2(channels),
        "ELEMENT": accessed.element_size(),
        "WIDTH": width,
        "SUM": _TRITON_TYPES[sum_type(value.dtype)],
        "INDEX": tl.int64 if wide else tl.int32,
        "UNSIGNED": tl.uint64 if wide else tl.uint32,
        "PAIRS": pairs and not interpreted(),
        "enable_fp_fusion": True,  # as a later Triton will not do by itself
    }


def _adds_vectors(buffer: Tensor) -> bool:
    """Whether one atomic addition takes 16 bytes: of float32, since Hopper."""
    if buffer.is_cuda and torch.cuda.get_device_capability(buffer.device) < (9, 0):
        return False
    return buffer.dtype == torch.float32


def launch(kernel: Any, items: int, arguments: Sequence[Any], settings: dict[str, Any]) -> None:
    """Run an autotuned kernel; told to be deterministic, its first candidate, without timing.

    Candidates add in different orders, and which is fastest depends on the moment: what they
    compute would differ in its last bits from one run to the next.
    """
    names = ("BLOCK_CHANNELS", "ELEMENT", "WIDTH", "SPAN", "WARPS")

    def programs(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(items, items_of_program(*(meta[name] for name in names))),)

    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current one
        if torch.are_deterministic_algorithms_enabled():
            settings = settings | kernel.configs[0].all_kwargs()
            kernel.fn[programs](*arguments, **settings)
        else:
            kernel[programs](*arguments, **settings)


@triton.constexpr_function
def part_channels(block_channels: int, element: int, width: int, span: int) -> int:
    """Channels that an item's threads hold side by side, `width` each; a power of two."""
    return max(min(span // element, block_channels), block_channels * width // _HELD)


@triton.constexpr_function
def items_of_program(block_channels: int, element: int, width: int, span: int, warps: int) -> int:
    """How many items a program computes; a power of two."""
    return max(1, 32 * warps * width // part_channels(block_channels, element, width, span))


@triton.constexpr_function
def _smaller(first: int, second: int) -> int:
    """`min` itself is an operation of kernels to older compilers."""
    return min(first, second)


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
        kind = sum_type(value.dtype)
        if self.fixed and gradient.numel() and weights.numel():
            # A single addition is of type `kind`: it must not overflow there.
            largest = gradient.abs().amax().to(kind) * weights.abs().amax().to(kind)
            largest = largest.double() * terms
            exponent = (_FIXED_BITS - largest.log2()).floor().clamp(-1000.0, 1000.0)
            # Stays on the device.
            scale = torch.where(torch.isfinite(largest), exponent.exp2(), torch.nan)
            self.scale = scale.reshape(1)
        dtype = torch.int64 if self.fixed else kind
        self.buffer = torch.zeros(value.shape, dtype=dtype, device=value.device)

    def result(self, dtype: torch.dtype) -> Tensor:
        """The gradient; not a number everywhere if fixed point could not hold what came in."""
        if not self.fixed:
            return self.buffer.to(dtype)
        return (self.buffer.double() / self.scale).to(dtype)


@triton.jit
def block(
    items,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
    ELEMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    WARPS: tl.constexpr,
):
    """What a program computes: items (BLOCK,), their positions and groups, and which of them are
    its own: beyond the last one it computes that again, for no one. Channels (parts, 1, of a part),
    or (of a part, 1, parts), and which of them there are."""
    PART: tl.constexpr = part_channels(BLOCK_CHANNELS, ELEMENT, WIDTH, SPAN)
    BLOCK: tl.constexpr = items_of_program(BLOCK_CHANNELS, ELEMENT, WIDTH, SPAN, WARPS)
    item = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    own = item < items
    item = tl.where(own, item, items - 1)
    part = tl.arange(0, BLOCK_CHANNELS // PART)
    inner = tl.arange(0, PART)
    RUN: tl.constexpr = _smaller(PART, WIDTH)
    if _FIRST_IS_NEAR:
        channel = part[None, None, :] * PART + inner[:, None, None]
        channel = tl.max_contiguous(channel, [RUN, 1, 1])
    else:
        channel = part[:, None, None] * PART + inner[None, None, :]
        channel = tl.max_contiguous(channel, [1, 1, RUN])
    return item, own, item // GROUPS, item % GROUPS, channel, channel < CHANNELS


@triton.jit
def _sum_of_channels(terms):
    """(BLOCK,): of the parts first, which a thread holds together."""
    if _FIRST_IS_NEAR:
        return tl.sum(tl.sum(terms, axis=2), axis=0)
    return tl.sum(tl.sum(terms, axis=0), axis=1)


@triton.jit
def _axis(coordinate, size, INDEX: tl.constexpr, UNSIGNED: tl.constexpr):
    """Lower neighbour of a coordinate, the weight of the upper one, and which of them are inside.

    The range is open: at -1 exactly nothing is inside, though the upper neighbour exists. A
    coordinate that is distant or not a number would overflow as an index, and becomes -1 or `size`.
    """
    above = coordinate > -1
    bounded = tl.minimum(tl.where(above, coordinate, -1.0), size.to(coordinate.dtype))
    low = tl.floor(bounded)
    index = low.to(INDEX)
    upper = above & ((index + 1).to(UNSIGNED) < size.to(UNSIGNED))
    return index, bounded - low, index.to(UNSIGNED) < size.to(UNSIGNED), upper


@triton.jit
def widen(read, SUM: tl.constexpr, PAIRS: tl.constexpr):
    """What was read, as the type of sums. PAIRS: bfloat16 on an NVIDIA GPU, the upper half of a
    float32: one instruction for each, where the compiler's own conversion takes three for two."""
    if PAIRS:
        bits = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [read],
            dtype=tl.int32,
            is_pure=True,
            pack=2,
        )
        return bits.to(tl.float32, bitcast=True)
    return read.to(SUM)


@triton.jit
def add_sample(
    total,
    image,
    y,
    x,
    weight,
    height,
    width,
    used,
    PIXEL: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    UNSIGNED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """`total` (BLOCK, channels) plus weight times the sample at (y, x) of a map.

    image: (BLOCK, channels) pointers into the map's first pixel; PIXEL: elements of a pixel.
    """
    row, down, row_low, row_high = _axis(y, height, INDEX, UNSIGNED)
    column, right, column_low, column_high = _axis(x, width, INDEX, UNSIGNED)
    pixel = image + ((row * width + column) * PIXEL)[None, :, None]
    for far_y in tl.static_range(2):
        row_share = weight * down if far_y else weight - weight * down
        row_inside = row_high if far_y else row_low
        for far_x in tl.static_range(2):
            inside = row_inside & (column_high if far_x else column_low)
            places = pixel + (far_y * width.to(tl.int64) + far_x) * PIXEL
            read = tl.load(places, mask=inside[None, :, None] & used, other=0.0)
            share = row_share * right if far_x else row_share - row_share * right
            total += share[None, :, None] * widen(read, SUM, PAIRS)
    return total


@triton.jit
def scatter_sample(
    upstream,
    value,
    value_gradient,
    scale,
    image,
    y,
    x,
    weight,
    height,
    width,
    used,
    FIXED: tl.constexpr,
    PIXEL: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    UNSIGNED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Gradients (BLOCK,) of a point's y, x and weight; that of the values is scattered.

    upstream: (BLOCK, channels), gradient of the sum; image: (BLOCK, channels), 64-bit elements
    before the map's first pixel and its channels, in `value` as in `value_gradient`.
    """
    row, down, row_low, row_high = _axis(y, height, INDEX, UNSIGNED)
    column, right, column_low, column_high = _axis(x, width, INDEX, UNSIGNED)
    pixel = image + ((row * width + column) * PIXEL)[None, :, None]
    along_y = tl.zeros_like(weight)
    along_x = tl.zeros_like(weight)
    along_weight = tl.zeros_like(weight)
    for far_y in tl.static_range(2):
        share_y = down if far_y else 1 - down
        row_inside = row_high if far_y else row_low
        for far_x in tl.static_range(2):
            share_x = right if far_x else 1 - right
            wanted = (row_inside & (column_high if far_x else column_low))[None, :, None] & used
            places = pixel + (far_y * width.to(tl.int64) + far_x) * PIXEL
            read = tl.load(value + places, mask=wanted, other=0.0)
            product = _sum_of_channels(widen(read, SUM, PAIRS) * upstream)
            along_weight += product * share_y * share_x
            along_y += product * share_x * (2 * far_y - 1)
            along_x += product * share_y * (2 * far_x - 1)
            part = (weight * share_y * share_x)[None, :, None] * upstream
            if FIXED:
                part = tl.floor(part.to(tl.float64) * scale + 0.5).to(tl.int64)
            tl.atomic_add(value_gradient + places, part, mask=wanted, sem="relaxed")
    return along_y * weight, along_x * weight, along_weight
