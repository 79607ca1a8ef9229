"""Initial values that depend on a seed and the parameter's name, and on nothing else.

Every parameter is drawn on the CPU by a generator of its own. The same seed therefore gives the
same model on one rank or a thousand, on CPU or GPU, at any ZeRO stage, and adding a head does not
change the values of anything else.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

_NORMS = (nn.LayerNorm, nn.GroupNorm)
_WEIGHTED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)

DEFAULT_STD = 0.02

Gather = Callable[[Sequence[nn.Parameter]], contextlib.AbstractContextManager]


def _no_gather(_: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


@torch.no_grad()
def initialise(model: nn.Module, seed: int, gather: Gather | None = None) -> None:
    """Set every parameter of `model`.

    Norm weights become 1 and all biases 0; weights of linear, convolution and embedding layers are
    drawn from N(0, 0.02). A module changes that, and gives values to parameters of its own, with
    an attribute `initial_std: dict[str, float]`: parameter name -> standard deviation (0: zeros),
    `initial_bound: dict[str, float]`: parameter name -> b of the uniform distribution on (-b, b),
    or `initial_value: dict[str, float | Tensor]`: parameter name -> one value for all its elements,
    or a CPU tensor of its shape.

    gather: makes a list of partitioned parameters whole inside its context and keeps what was
        written there (DeepSpeed's `GatheredParameters` with `modifier_rank=0`).

    Raises:
        ValueError: a parameter has no rule, no storage (meta device), or no dimension (DeepSpeed
            cannot broadcast those).
    """
    gather = gather or _no_gather
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            leaf = name.rpartition(".")[2]
            fixed = getattr(module, "initial_value", {}).get(leaf)
            bound = getattr(module, "initial_bound", {}).get(leaf)
            std = _std(module, name) if fixed is None and bound is None else 0.0
            with gather([parameter]):
                if parameter.dim() == 0:
                    raise ValueError(
                        f"parameter {name} has no dimension, which DeepSpeed cannot broadcast; "
                        "give it shape (1,)"
                    )
                if parameter.is_meta:
                    raise ValueError(
                        f"parameter {name} has no storage; call model.to_empty(device=...) first"
                    )
                if fixed is not None:
                    parameter.copy_(torch.as_tensor(fixed))
                else:
                    parameter.copy_(_draw(parameter.shape, std, bound, seed, name))


def _std(module: nn.Module, name: str) -> float | None:
    """Standard deviation of a parameter's first values; None for ones."""
    leaf = name.rpartition(".")[2]
    declared = getattr(module, "initial_std", {})
    if leaf in declared:
        return declared[leaf]
    if isinstance(module, _NORMS):
        return None if leaf == "weight" else 0.0
    if isinstance(module, _WEIGHTED):
        return DEFAULT_STD if leaf == "weight" else 0.0
    raise ValueError(
        f"no initial value for parameter {name} of {type(module).__name__}; "
        f"set initial_std[{leaf!r}] on that module"
    )


def _draw(
    shape: torch.Size, std: float | None, bound: float | None, seed: int, name: str
) -> torch.Tensor:
    """From U(-bound, bound) if there is a bound, else from N(0, std); ones without either."""
    if std is None:
        return torch.ones(shape)
    if std == 0 and bound is None:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    # torch keeps 64 bits of seed; a sign bit would be refused.
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.empty(shape, dtype=torch.float32)
    if bound is not None:
        return values.uniform_(-bound, bound, generator=generator)
    return values.normal_(0.0, std, generator=generator)


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path, gather: Gather | None = None) -> list[str]:
    """Start from the tensors of a safetensors file with our names (`tools.convert import-git`).

    The file may hold a part of the model, for instance only the encoder; call `initialise` first.
    It may hold buffers too (statistics of a batch norm).

    Returns the names of the parameters that the file does not hold.

    Raises:
        ValueError: a tensor of the file is unknown to the model, or has another shape.
    """
    gather = gather or _no_gather
    parameters = dict(model.named_parameters())
    places = parameters | dict(model.named_buffers())
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if unknown := sorted(names - places.keys()):
            raise ValueError(
                f"{path}: {len(unknown)} tensors are not part of this model, among them "
                f"{', '.join(unknown[:5])}; the names of encoders and tasks in the recipe must be "
                "those given to `tools.convert import-...`"
            )
        for name, place in places.items():
            if name not in names:
                continue
            tensor = file.get_tensor(name)
            with gather([place]) if name in parameters else contextlib.nullcontext():
                if place.shape != tensor.shape:
                    raise ValueError(
                        f"{path}: {name} has shape {tuple(tensor.shape)}, "
                        f"the model wants {tuple(place.shape)}{classes_hint(name)}"
                    )
                place.copy_(tensor)
    return [name for name in parameters if name not in names]


def classes_hint(name: str) -> str:
    """What to do about the linear layer of other classes, to end a message; "" for other names."""
    if not name.startswith("objectives.") or name.split(".")[2:-1] != ["head"]:
        return ""
    return (
        "; for other classes make the file with --head-rows FILE (rows of the linear layer) or "
        "without the layer (--leave-out 'head.*') of `tools.convert import-internimage`"
    )
