"""DCNv3, the deformable aggregation of InternImage: `dcnv3`, one function on every device.

A `torch.library` operator: it can be compiled, exported, checkpointed, and traced on the meta
device. Its backward pass keeps nothing but the three inputs.
"""

from types import ModuleType

import torch
from torch import Tensor

from pretrain.models.operators import dcnv3_torch
from pretrain.models.operators.backends import AUTO, choose
from pretrain.models.operators.window import Window

Size = int | tuple[int, int]

_GEOMETRY = (
    "int[] kernel_size, int[] stride, int[] pad, int[] dilation, int groups, float offset_scale, "
    "bool remove_center, str backend"
)
_BACKENDS: dict[str, ModuleType] = {"torch": dcnv3_torch}


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
    their weights, used as they are. Both have the type of `value`, or float32. Coordinates and sums
    are float32, or float64 for float64 values.

    Point (j, i) of the kernel is read at `origin + offset_scale * (step + offset)`, where step is
    its distance from the kernel's centre. Bilinear; outside of the image there are zeros.
    `remove_center` leaves the middle point out: P is one less.

    Sizes are a number or (vertical, horizontal). `backend` is `torch`, or `auto`: see
    `backends.py`.

    Errors: ValueError or TypeError that names the argument which does not fit.
    """
    if group_channels is not None and groups * group_channels != value.shape[-1]:
        raise ValueError(f"dcnv3: groups ({groups}) * group_channels ({group_channels}) must be "
                         f"the {value.shape[-1]} channels of value {tuple(value.shape)}")
    return torch.ops.omnipretrain.dcnv3(
        value, offset, mask, _pair(kernel_size), _pair(stride), _pair(pad), _pair(dilation),
        groups, offset_scale, remove_center, backend,
    )  # fmt: skip


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _window(
    kernel_size: list[int],
    stride: list[int],
    pad: list[int],
    dilation: list[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> Window:
    pairs = (tuple(pair) for pair in (kernel_size, stride, pad, dilation))
    return Window(*pairs, groups, offset_scale, remove_center)


def _usable(device: torch.device) -> dict:
    return {"torch": lambda: True}


def _backend(name: str, device: torch.device) -> ModuleType:
    return _BACKENDS[choose(name, device, _usable(device))]


def _forward(value: Tensor, offset: Tensor, mask: Tensor, *geometry) -> Tensor:
    *fields, backend = geometry
    window = _window(*fields)
    window.check(value, offset, mask)
    return _backend(backend, value.device).forward(value, offset, mask, window)


def _forward_shape(value: Tensor, offset: Tensor, mask: Tensor, *geometry) -> Tensor:
    window = _window(*geometry[:-1])
    window.check(value, offset, mask)
    n, height, width, channels = value.shape
    return value.new_empty(n, *window.output_size(height, width), channels)


def _backward(
    gradient: Tensor, value: Tensor, offset: Tensor, mask: Tensor, *geometry
) -> tuple[Tensor, Tensor, Tensor]:
    *fields, backend = geometry
    window = _window(*fields)
    return _backend(backend, value.device).backward(gradient, value, offset, mask, window)


def _backward_shapes(
    gradient: Tensor, value: Tensor, offset: Tensor, mask: Tensor, *geometry
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, offset, mask))


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.geometry = inputs[3:]


def _differentiate(ctx, gradient: Tensor) -> tuple:
    gradients = torch.ops.omnipretrain.dcnv3_backward(gradient, *ctx.saved_tensors, *ctx.geometry)
    return *gradients, *(None for _ in ctx.geometry)


def _register() -> None:
    inputs = f"Tensor value, Tensor offset, Tensor mask, {_GEOMETRY}"
    for name, schema, kernel, shapes in (
        ("dcnv3", f"({inputs}) -> Tensor", _forward, _forward_shape),
        ("dcnv3_backward", f"(Tensor gradient, {inputs}) -> (Tensor, Tensor, Tensor)",
         _backward, _backward_shapes),
    ):
        torch.library.define(f"omnipretrain::{name}", schema)
        torch.library.impl(f"omnipretrain::{name}", "default", kernel)
        torch.library.register_fake(f"omnipretrain::{name}", shapes)
    torch.library.register_autograd("omnipretrain::dcnv3", _differentiate, setup_context=_save)


_register()
