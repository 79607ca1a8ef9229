"""Inputs of DCNv3 for tests: the goldens, and random ones of any geometry."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from pretrain.models.operators.dcnv3 import dcnv3

GOLDENS = sorted((Path(__file__).parents[3] / "goldens").glob("dcnv3_op_*.safetensors"))


class Case(NamedTuple):
    """Arguments of `dcnv3`, and the gradient of its output."""

    tensors: dict[str, Tensor]
    geometry: dict[str, Any]
    gradient: Tensor


def golden(path: Path) -> tuple[Case, dict[str, Tensor]]:
    """The case of a golden file, and what is expected of it."""
    with safe_open(path, "pt") as file:
        fields = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    geometry = {name: int(fields[name]) for name in ("kernel_size", "stride", "pad", "dilation")}
    geometry |= {
        "groups": int(fields["group"]),
        "offset_scale": float(fields["offset_scale"]),
        "remove_center": fields["remove_center"] == "1",
    }
    inputs = {name: tensors.pop(name) for name in ("value", "offset", "mask")}
    return Case(inputs, geometry, tensors.pop("grad_output")), tensors


def random_case(
    shape: tuple[int, int, int, int],
    *,
    spread: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **geometry: Any,
) -> Case:
    """Gaussian tensors for a value of `shape`; offsets have a standard deviation of `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    geometry = {"kernel_size": 3, "stride": 1, "pad": 1, "dilation": 1, **geometry}
    pairs = {k: _pair(geometry[k]) for k in ("kernel_size", "stride", "pad", "dilation")}
    size = [
        (
            shape[1 + a]
            + 2 * pairs["pad"][a]
            - pairs["dilation"][a] * (pairs["kernel_size"][a] - 1)
            - 1
        )
        // pairs["stride"][a]
        + 1
        for a in (0, 1)
    ]
    points = pairs["kernel_size"][0] * pairs["kernel_size"][1]
    points = (points - geometry.get("remove_center", False)) * geometry["groups"]
    tensors = {
        "value": draw(*shape),
        "offset": spread * draw(shape[0], *size, points * 2),
        "mask": draw(shape[0], *size, points),
    }
    gradient = draw(shape[0], *size, shape[3]).to(dtype)
    return Case({name: t.to(dtype) for name, t in tensors.items()}, geometry, gradient)


def results(case: Case, backend: str = "auto", dtype: torch.dtype | None = None) -> dict:
    """Output and gradients of the inputs, under the names that the goldens give them."""
    inputs = {
        name: tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        for name, tensor in case.tensors.items()
    }
    output = dcnv3(**inputs, **case.geometry, backend=backend)
    output.backward(case.gradient.to(output.dtype))
    gradients = {f"grad_{name}": tensor.grad for name, tensor in inputs.items()}
    return {"output": output.detach(), **gradients}


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
