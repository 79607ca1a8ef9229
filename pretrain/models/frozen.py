"""Parameters that are kept as they are: `optimizer.frozen`."""

from collections.abc import Callable, Sequence

from torch import nn

from pretrain.models.parameter_names import aliases, matches, require_matches


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters whose name matches a pattern; call it before the optimizer is
    made.

    A parameter with several names is frozen by each of them. A module all of whose parameters are
    frozen is put into evaluation mode, and stays in it if it is part of a `MultiTaskModel`: no
    dropout, no drop path of a whole encoder, no moving statistics.

    Returns their first names.

    Raises:
        ValueError: a pattern matches no parameter that would be trained.
    """
    named = [(names, p) for names, p in aliases(model) if p.requires_grad]
    require_matches("frozen", patterns, [name for names, _ in named for name in names])
    frozen = []
    for names, parameter in named:
        if any(matches(names, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
            parameter.frozen = True  # unlike a target's, which its objective does not train
            frozen.append(names[0])
    rest_frozen(model)
    return frozen


def kept_at_random(names: Sequence[str]) -> str:
    """What to say of frozen parameters that a file of first weights does not hold."""
    return (
        f"optimizer.frozen keeps {len(names)} tensors at their random first values, which the file "
        f"of initial_weights does not hold, among them {names[0]}"
    )


def training_flops(module: nn.Module, forward: Callable[..., int]) -> Callable[..., int]:
    """FLOPs of forward and backward through a module that the model begins with.

    forward: anything -> FLOPs of a forward pass; three times that, or just that if nothing of the
    module is trained, which is looked at when the FLOPs are asked for.
    """

    def both_ways(*arguments) -> int:
        trained = any(parameter.requires_grad for parameter in module.parameters())
        return (3 if trained else 1) * forward(*arguments)

    return both_ways


def rest_frozen(model: nn.Module) -> None:
    """Put every module all of whose parameters `freeze` has met into evaluation mode."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and all(getattr(p, "frozen", False) for p in parameters):
            for part in module.modules():  # also those without parameters, as dropout
                part.training = False
