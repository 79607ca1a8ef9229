"""Which parameter of a model follows which: momentum targets as objectives declare them.

Needs no process group and no weights, so that a check before the start can ask, too.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from pretrain.engine.zero.partitions import parameter_names
from pretrain.optim.momentum import MomentumTargets


def declared_targets(model: nn.Module) -> dict[str, MomentumTargets]:
    """Task -> the targets that its objective declares, for objectives that do."""
    return {
        task: objective.momentum_targets
        for task, objective in model.objectives.items()
        if objective.momentum_targets is not None
    }


def module_pairs(model: nn.Module, task: str) -> Iterator[tuple[str, str]]:
    """Paths in the model of each target module of a task and of its online module."""
    place = f"objectives.{task}"
    for target, online in model.objectives[task].momentum_targets.pairs.items():
        yield f"{place}.{target}", online if _is_encoder(online) else f"{place}.{online}"


def _is_encoder(path: str) -> bool:
    return path.startswith("encoders.")


def target_sources(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Target parameter -> (task, online parameter), by their first names in the model.

    Works on a model on the meta device or under ZeRO-3, too.

    Raises:
        ValueError: a path that leads nowhere, modules that do not correspond, a target that would
            be trained or follows two modules.
    """
    names = parameter_names(model)
    sources: dict[str, tuple[str, str]] = {}
    for task in declared_targets(model):
        if hasattr(model.objectives[task], "encoders"):
            raise ValueError(
                f"objectives.{task}: its own submodule `encoders` hides the model's from its "
                "momentum targets; give it another name"
            )
        for target, online in module_pairs(model, task):
            theirs = _parameters(model, online, task)
            mine = _parameters(model, target, task)
            _require_alike(target, _shapes(mine), online, _shapes(theirs))
            _require_alike(
                target, _shapes(_buffers(model, target)), online, _shapes(_buffers(model, online))
            )
            for name, parameter in mine.items():
                first, source = names[id(parameter)], names[id(theirs[name])]
                if parameter.requires_grad:
                    raise ValueError(
                        f"{first} is a momentum target, but would be trained: call "
                        f"requires_grad_(False) on {target} where it is built"
                    )
                if sources.setdefault(first, (task, source)) != (task, source):
                    raise ValueError(
                        f"{first} is a momentum target of {source} and of {sources[first][1]}: "
                        "give each its own module, and tie weights in both alike"
                    )
    for target, (_, source) in sources.items():
        if source in sources:
            raise ValueError(f"{target} follows {source}, which is a momentum target itself")
    return sources


def _parameters(model: nn.Module, path: str, task: str) -> dict[str, nn.Parameter]:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"momentum targets of task {task}: the model has no module {path} ({error})"
        ) from None
    return dict(module.named_parameters(remove_duplicate=False))


def _buffers(model: nn.Module, path: str) -> dict[str, Tensor]:
    return dict(model.get_submodule(path).named_buffers())


def buffer_pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Every buffer of a target with the online one."""
    return [
        (buffer, _buffers(model, online)[name])
        for task in declared_targets(model)
        for target, online in module_pairs(model, task)
        for name, buffer in _buffers(model, target).items()
    ]


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(t, "ds_shape", t.shape)) for name, t in tensors.items()}


def _require_alike(target: str, mine: dict, online: str, theirs: dict) -> None:
    differing = [
        name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)
    ]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{target} cannot follow {online}: {len(differing)} of their tensors differ, among "
            f"them {name}, {mine.get(name, 'missing')} against {theirs.get(name, 'missing')}; "
            "build both with the same settings"
        )


def moving_targets(model: nn.Module) -> dict[str, tuple[str, str]]:
    """`target_sources`, without those whose online parameter is frozen: these never move."""
    parameters = dict(model.named_parameters())
    return {
        target: about
        for target, about in target_sources(model).items()
        if parameters[about[1]].requires_grad
    }


def require_weights_in_memory(model: nn.Module, zero: Mapping) -> None:
    """Refuse targets whose weights DeepSpeed keeps in files.

    Args:
        zero: the block `zero_optimization` of the DeepSpeed settings.

    Raises:
        ValueError: there are targets, and weights lie on NVMe.
    """
    device = (zero.get("offload_param") or {}).get("device")
    if device == "nvme" and declared_targets(model):
        raise ValueError(
            "momentum targets are written after every step, which weights on NVMe "
            "(offload_param.device=nvme) do not allow: set deepspeed=zero3_offload"
        )
