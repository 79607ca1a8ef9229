"""A deformable operator for PyTorch: differentiable, traceable, with a choice of backends.

Its three tensors are values, places of samples and their weights; numbers and sizes follow. The
backward pass is an operator too, and keeps nothing but the three tensors; it has no derivative of
its own.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pretrain.models.operators.backends import choose

NAMESPACE = "omnipretrain"


def register(
    name: str,
    tensors: tuple[str, str, str],
    numbers: str,
    prepare: Callable,
    output_shape: Callable[..., tuple[int, ...]],
    backends: Mapping[str, str],
) -> None:
    """Define `torch.ops.omnipretrain.<name>` and `<name>_backward`.

    `tensors` names the arguments, `numbers` is the schema of the rest. `prepare(*tensors,
    *numbers)` checks them and returns the geometry that backends take beside the tensors;
    `output_shape(value, place, geometry)` is the shape of the result. Backends are names of
    modules of this folder with `forward(*tensors, geometry)` and `backward(gradient, *tensors,
    geometry)`; they are imported when they are first chosen.
    """
    signature = f"{', '.join(f'Tensor {tensor}' for tensor in tensors)}, {numbers}, str backend"

    def forward(value: Tensor, place: Tensor, weight: Tensor, *numbers) -> Tensor:
        geometry = prepare(value, place, weight, *numbers[:-1])
        return choose(numbers[-1], value.device, backends).forward(value, place, weight, geometry)

    def forward_on_meta(value: Tensor, place: Tensor, weight: Tensor, *numbers) -> Tensor:
        geometry = prepare(value, place, weight, *numbers[:-1])
        return value.new_empty(output_shape(value, place, geometry))

    def backward(gradient: Tensor, value: Tensor, place: Tensor, weight: Tensor, *numbers) -> tuple:
        geometry = prepare(value, place, weight, *numbers[:-1])
        implementation = choose(numbers[-1], value.device, backends)
        return implementation.backward(gradient, value, place, weight, geometry)

    def backward_on_meta(gradient: Tensor, *inputs) -> tuple:
        return tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:3])

    def save(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.numbers = inputs[3:]

    def differentiate(ctx, gradient: Tensor) -> tuple:
        operator = getattr(torch.ops.omnipretrain, f"{name}_backward").default
        gradients = operator(gradient, *ctx.saved_tensors, *ctx.numbers)
        return *gradients, *(None for _ in ctx.numbers)

    def refuse(ctx, *_) -> tuple:
        # Without this PyTorch warns, and takes second derivatives to be zero.
        raise NotImplementedError(
            f"{name}: its gradients cannot be differentiated again (create_graph=True, as in a "
            "gradient penalty); detach them, or write this part in plain PyTorch"
        )

    for suffix, schema, kernel, on_meta in (
        ("", f"({signature}) -> Tensor", forward, forward_on_meta),
        (
            "_backward",
            f"(Tensor gradient, {signature}) -> (Tensor, Tensor, Tensor)",
            backward,
            backward_on_meta,
        ),
    ):
        operator = f"{NAMESPACE}::{name}{suffix}"
        torch.library.define(operator, schema)
        torch.library.impl(operator, "default", kernel)
        torch.library.register_fake(operator, on_meta)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", differentiate, setup_context=save)
    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", refuse)
