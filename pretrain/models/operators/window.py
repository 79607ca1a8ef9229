"""The geometry of DCNv3: which pixels each output would read if nothing were learned."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """Kernel, steps and groups of one DCNv3 call; pairs are (vertical, horizontal), in pixels."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_scale: float
    remove_center: bool

    @property
    def points(self) -> int:
        """Sampling points of each output and group."""
        return self.kernel_size[0] * self.kernel_size[1] - self.remove_center

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output for an input of `height` x `width` pixels."""
        rows, columns = (
            (size + 2 * pad - (dilation * (kernel - 1) + 1)) // stride + 1
            for size, kernel, stride, pad, dilation in zip(
                (height, width), self.kernel_size, self.stride, self.pad, self.dilation, strict=True
            )
        )
        return rows, columns

    def centers(self) -> tuple[int, int]:
        """Row and column of the kernel's centre in it, rounded down."""
        rows, columns = (
            dilation * (kernel - 1) // 2
            for kernel, dilation in zip(self.kernel_size, self.dilation, strict=True)
        )
        return rows, columns

    def steps(self) -> list[tuple[int, int]]:
        """(vertical, horizontal) distance in pixels of each point from the kernel's centre.

        Points go column by column, as weights of released models expect.
        """
        kernel_rows, kernel_columns = self.kernel_size
        center_row, center_column = self.centers()
        removed = (kernel_rows // 2, kernel_columns // 2) if self.remove_center else None
        return [
            (j * self.dilation[0] - center_row, i * self.dilation[1] - center_column)
            for i in range(kernel_columns)
            for j in range(kernel_rows)
            if (j, i) != removed
        ]

    def check(self, value: Tensor, offset: Tensor, mask: Tensor) -> None:
        """Refuse what does not fit together.

        Errors: ValueError, TypeError naming the argument.
        """
        self._check_self()
        if value.dim() != 4:
            raise ValueError(f"dcnv3: value {_shape(value)} must be (N, H, W, C)")
        n, height, width, channels = value.shape
        if channels % self.groups:
            raise ValueError(
                f"dcnv3: groups ({self.groups}) must divide the {channels} channels "
                f"of value {_shape(value)}"
            )
        size = self.output_size(height, width)
        if min(size) < 1:
            raise ValueError(
                f"dcnv3: value {_shape(value)} is smaller than the kernel: kernel_size "
                f"{self.kernel_size}, dilation {self.dilation}, pad {self.pad}"
            )
        for name, tensor, each in (("offset", offset, 2), ("mask", mask, 1)):
            expected = (n, *size, self.groups * self.points * each)
            if tensor.shape != expected:
                raise ValueError(
                    f"dcnv3: {name} {_shape(tensor)} must be {expected}: (N, H_out, W_out, groups "
                    f"* points{' * 2' if each == 2 else ''}) for value {_shape(value)}, "
                    f"{self.groups} groups and {self.points} points"
                )
        check_types("dcnv3", value, {"offset": offset, "mask": mask})

    def _check_self(self) -> None:
        for name, least in (("kernel_size", 1), ("stride", 1), ("pad", 0), ("dilation", 1)):
            if min(getattr(self, name)) < least:
                raise ValueError(f"dcnv3: {name} {getattr(self, name)} must be at least {least}")
        if self.groups < 1:
            raise ValueError(f"dcnv3: groups {self.groups} must be at least 1")
        if not math.isfinite(self.offset_scale):
            raise ValueError(f"dcnv3: offset_scale {self.offset_scale} must be a finite number")
        if self.remove_center:
            even = any(size % 2 == 0 for size in self.kernel_size)
            if even or self.kernel_size == (1, 1):
                raise ValueError(
                    f"dcnv3: remove_center needs an odd kernel_size above 1, not {self.kernel_size}"
                )


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """What values of `dtype` are added up in, and coordinates are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def of_one_type(value: Tensor, place: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Place and weight, both float32 if one of them is and the other has the type of `value`.

    So it is under autocast: a softmax widens the weights.
    """
    if place.dtype != weight.dtype and {place.dtype, weight.dtype} == {value.dtype, torch.float32}:
        return place.float(), weight.float()
    return place, weight


def check_types(operator: str, value: Tensor, others: dict[str, Tensor]) -> None:
    """Refuse mixtures of types and devices that no backend computes.

    Errors: TypeError for types, ValueError for devices.
    """
    if value.dtype not in _FLOATS:
        raise TypeError(f"{operator}: value is {value.dtype}, not a floating point type")
    allowed = {value.dtype, sum_type(value.dtype)}
    for name, tensor in others.items():
        if tensor.dtype not in allowed:
            either = " or ".join(sorted(str(dtype) for dtype in allowed))
            raise TypeError(
                f"{operator}: {name} is {tensor.dtype}; beside a value of "
                f"{value.dtype} it must be {either}"
            )
        if tensor.device != value.device:
            raise ValueError(f"{operator}: {name} is on {tensor.device}, value on {value.device}")
    if len({tensor.dtype for tensor in others.values()}) > 1:
        kinds = ", ".join(f"{name} {tensor.dtype}" for name, tensor in others.items())
        raise TypeError(f"{operator}: {kinds}: these must have one type")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
