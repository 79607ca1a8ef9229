"""DCNv3 in operators that every runtime has, for graphs that leave this project.

    exported = torch.export.export(model, (images,))
    portable = exported.run_decompositions(standard_operators())

The sampling becomes one `grid_sample` a call, as in the official code, which ONNX has too. It reads
P copies of the values, so that it is neither for training nor fast; results equal those of the
operator to rounding, gradients at the rim of the image do not.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.operators import dcnv3  # noqa: F401  (registers the operator)
from pretrain.models.operators.window import Window, sum_type


def standard_operators() -> dict[torch._ops.OpOverload, Callable]:
    """The table for `ExportedProgram.run_decompositions`: DCNv3 -> what it is made of."""
    return {torch.ops.omnipretrain.dcnv3.default: by_grid_sample}


def by_grid_sample(
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
    backend: str = "auto",
) -> Tensor:
    """Arguments and result as those of `torch.ops.omnipretrain.dcnv3`; `backend` has no meaning
    here. Only the batch may be of unknown size in a trace.

    Raises ValueError or TypeError: arguments that do not fit together.
    """
    window = Window(
        tuple(kernel_size),
        tuple(stride),
        tuple(pad),
        tuple(dilation),
        groups,
        offset_scale,
        remove_center,
    )
    window.check(value, offset, mask)
    _, height, width, channels = value.shape
    rows, columns = window.output_size(height, width)
    positions, points, dtype = rows * columns, window.points, sum_type(value.dtype)
    # Batch and groups become one axis of unknown length, so that the graph computes no shapes.
    maps = value.to(dtype).reshape(-1, height, width, groups, channels // groups)
    maps = maps.permute(0, 3, 4, 1, 2).reshape(-1, channels // groups, height, width)
    places = _by_group(offset.to(dtype).reshape(-1, positions, groups, points, 2))
    weights = _by_group(mask.to(dtype).reshape(-1, positions, groups, points)).unsqueeze(1)
    grid = _grid(places, window, (height, width), (rows, columns))
    samples = F.grid_sample(maps, grid, "bilinear", "zeros", align_corners=False)
    total = (samples * weights).sum(-1).reshape(-1, channels, rows, columns)
    return total.permute(0, 2, 3, 1).contiguous().to(value.dtype)


def _by_group(x: Tensor) -> Tensor:
    """(N, positions, groups, ...) -> (N * groups, positions, ...)."""
    return x.transpose(1, 2).flatten(0, 1)


def _grid(offset: Tensor, window: Window, size: tuple[int, int], output: tuple[int, int]) -> Tensor:
    """Where to sample: (M, positions, points, 2), (x, y) from -1 to 1 over the edges of the map.

    offset: of the same shape, in pixels; size, output: rows and columns of map and output.
    """
    # Whole numbers from arange: a literal tensor would enter the graph as a copied constant.
    position = torch.arange(output[0] * output[1], device=offset.device)[:, None]
    number = torch.arange(window.points, device=offset.device)
    if window.remove_center:
        number = number + (number >= window.points // 2)
    axes = []
    for axis, at, step in (
        (1, position % output[1], number // window.kernel_size[0]),
        (0, position // output[1], number % window.kernel_size[0]),
    ):
        center = window.centers()[axis]
        origin = at * window.stride[axis] + (center - window.pad[axis])
        step = step * window.dilation[axis] - center
        moved = step.to(offset.dtype) + offset[..., 1 - axis]
        place = origin.to(offset.dtype) + window.offset_scale * moved
        axes.append((2 * place + 1) / size[axis] - 1)
    return torch.stack(axes, dim=-1)
