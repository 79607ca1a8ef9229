"""DCNv3, the deformable aggregation of InternImage: `dcnv3`, one function on every device.

A `torch.library` operator: it can be compiled, exported, checkpointed, and traced on the meta
device. Its backward pass keeps nothing but the three inputs.
"""

import torch
from torch import Tensor

from pretrain.models.operators.backends import AUTO
from pretrain.models.operators.registration import register
from pretrain.models.operators.window import Window, of_one_type

Size = int | tuple[int, int]


def dcnv3(
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    *,
    groups: int,
    group_channels: int | None = None,
    kernel_size: Size = 3,
    stride: Size = 1,
    pad: Size = 1,
    dilation: Size = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    backend: str = AUTO,
) -> Tensor:
    """Weighted sums of `value` at learned places: (N, H_out, W_out, C), in the type of `value`.

    `value` (N, H, W, C) has C = groups * group_channels channels; float16, bfloat16, float32 or
    float64. `offset` (N, H_out, W_out, groups * P * 2) holds (x, y) in pixels for each of the P
    points of the kernel, which are numbered column by column; `mask` (N, H_out, W_out, groups * P)
    their weights, used as they are. Each has the type of `value`, or float32. Coordinates and sums
    are float32, or float64 for float64 values.

    Point (j, i) of the kernel is read at `origin + offset_scale * (step + offset)`, where step is
    its distance from the kernel's centre. Bilinear; outside of the image there are zeros.
    `remove_center` leaves the middle point out: P is one less.

    Sizes are a number or (vertical, horizontal). `backend` is `triton` (GPU), `cpp` (CPU),
    `torch`, or `auto`, the fastest that works: see `backends.py`.

    Errors: ValueError or TypeError that names the argument which does not fit.
    """
    if group_channels is not None and groups * group_channels != value.shape[-1]:
        raise ValueError(
            f"dcnv3: groups ({groups}) * group_channels ({group_channels}) must be "
            f"the {value.shape[-1]} channels of value {tuple(value.shape)}"
        )
    offset, mask = of_one_type(value, offset, mask)
    return torch.ops.omnipretrain.dcnv3(
        value,
        offset,
        mask,
        _pair("kernel_size", kernel_size),
        _pair("stride", stride),
        _pair("pad", pad),
        _pair("dilation", dilation),
        groups,
        offset_scale,
        remove_center,
        backend,
    )


def _pair(name: str, size: Size) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    whole = isinstance(pair, (tuple, list)) and all(isinstance(side, int) for side in pair)
    if not whole or len(pair) != 2:
        raise ValueError(
            f"dcnv3: {name} {size!r} must be a whole number, or two of them: (vertical, horizontal)"
        )
    return tuple(pair)


def _prepare(value: Tensor, offset: Tensor, mask: Tensor, *numbers) -> Window:
    pairs = (tuple(pair) for pair in numbers[:4])
    window = Window(*pairs, *numbers[4:])
    window.check(value, offset, mask)
    return window


def _output_shape(value: Tensor, offset: Tensor, window: Window) -> tuple[int, ...]:
    n, height, width, channels = value.shape
    return (n, *window.output_size(height, width), channels)


register(
    "dcnv3",
    ("value", "offset", "mask"),
    "int[] kernel_size, int[] stride, int[] pad, int[] dilation, int groups, float offset_scale, "
    "bool remove_center",
    _prepare,
    _output_shape,
    {"triton": "dcnv3_triton", "cpp": "dcnv3_cpu", "torch": "dcnv3_torch"},
)
