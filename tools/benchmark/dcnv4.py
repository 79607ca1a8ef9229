"""The CUDA kernel of the DCNv4 package as a peer in `tools.benchmark gpu`, where it is installed.

Its operator is DCNv3's with offsets and weights in one tensor: of each group first the offsets,
then the weights; behind the groups zeros up to a multiple of 8 (arXiv 2401.06197).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Images that it takes in one go, of which a batch must be a multiple if it is larger.
_STEP = 256


def find() -> tuple[Callable | None, str]:
    """The package's function, if it is there, and a line that says so."""
    try:
        from DCNv4.functions import DCNv4Function
    except (ImportError, OSError) as error:  # not there, or built for another torch
        return None, (
            f"DCNv4 was not compared ({error}): it is built from source, with a CUDA compiler and "
            "for the torch that is here (pip install --no-build-isolation DCNv4)"
        )
    return DCNv4Function.apply, (
        "DCNv4: the same sampling; its offsets and weights were joined into one tensor before"
    )


def join(offset: Tensor, mask: Tensor, groups: int) -> Tensor:
    """Offsets (N, H, W, groups * 2 P) and weights (N, H, W, groups * P) as the package reads them:
    (N, H, W, groups * 3 P and what is missing to a multiple of 8)."""
    joined = torch.cat([t.unflatten(-1, (groups, -1)) for t in (offset, mask)], dim=-1).flatten(-2)
    return F.pad(joined, (0, -joined.shape[-1] % 8))


def call(function: Callable, value: Tensor, joined: Tensor, groups: int) -> Tensor:
    """DCNv4 of kernel 3, stride 1, pad 1: (N, H, W, C) as `value`."""
    square = (3, 3, 1, 1, 1, 1, 1, 1)  # sides, strides, pads, dilations
    found = function(value, joined, *square, groups, value.shape[-1] // groups, 1.0, _STEP, 0)
    return found.view(value.shape)
