"""Optimizer settings, and parameter groups merged by (learning-rate multiplier, weight decay).

ZeRO flattens, pads and reduces every group on its own, so groups are merged as far as they can be:
two towers with one learning rate each and the usual decay rule give four groups, however deep.
Layer-wise decay gives two groups for each layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from data_pipeline.settings import Settings
from pretrain.models.parameter_names import aliases, matches, require_matches

if TYPE_CHECKING:
    from torch import nn


class OptimizerSettings(Settings):
    kind: Literal["adamw", "mt_adamw", "sgd"] = "adamw"
    """`adamw` (decoupled weight decay); `mt_adamw` for several tasks in one run: each step's
    gradient is divided by its norm and moments are weighted by 1 / sampling ratio, so that tasks
    count alike (Uni-Perceiver v2; steps are larger than AdamW's: tune lr again); or `sgd` for
    parity tests: its steps are linear in the gradient, so a wrong gradient cannot hide."""

    lr: float = Field(default=1e-4, gt=0.0)
    """Peak learning rate; a parameter's own peak is `lr` times its multiplier."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment, both in [0, 1). With kind=mt_adamw a
    second one of 0.95 is safer: with 0.999 steps of a rare task can be several times too long."""

    eps: float = Field(default=1e-8, gt=0.0)
    """AdamW's addend to the root of the second moment."""

    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    """SGD's momentum."""

    weight_decay: float = Field(default=0.05, ge=0.0)
    """Decay of parameters with two or more dimensions; vectors (biases, norm weights) never
    decay."""

    clip_norm: float | None = Field(default=1.0, gt=0.0)
    """Global gradient norm above which gradients are scaled down; null = no clipping. Must be null
    with kind=mt_adamw, which normalises every gradient."""

    task_clip_norms: dict[str, float] = Field(default_factory=dict)
    """Task -> its own `clip_norm`, since gradients of tasks differ in size; tasks that are not
    named have `clip_norm`."""

    omega: dict[str, float] = Field(default_factory=dict)
    """Task -> its importance (> 0) with kind=mt_adamw: the norm that its gradient is given; 1 for
    tasks that are not named."""

    max_compensation: float | None = Field(default=None, ge=1.0)
    """Cap on 1 / sampling ratio with kind=mt_adamw, which bounds the steps of rare tasks and makes
    these tasks count less than the others; null = no cap."""

    no_decay: tuple[str, ...] = ()
    """Further parameters without weight decay: patterns over parameter names (`*` also matches
    dots), e.g. `*.positions`. A pattern that matches nothing is an error."""

    frozen: tuple[str, ...] = ()
    """Parameters that are kept as they are, e.g. `encoders.image.*`: patterns over parameter names.
    No gradient, no optimizer state, no moving average, no weight decay; in checkpoints and exports
    they are like all others. A module that is frozen as a whole runs in evaluation mode, without
    dropout and drop path. A pattern that matches nothing is an error."""

    lr_multipliers: dict[str, float] = Field(default_factory=dict)
    """Name pattern -> factor (> 0) on the learning rate, e.g. `{"objectives.*": 5.0}`. The last
    pattern that matches a parameter wins. A pattern that matches nothing is an error."""

    multipliers_need_layer_decay: bool = False
    """Whether `lr_multipliers` hold only for parameters of encoders that are in `layer_decay`, as
    in InternImage's official code: its recipes without layer-wise decay ask for slower offsets,
    and do not get them. With false every multiplier holds."""

    layer_decay: dict[str, float] = Field(default_factory=dict)
    """Encoder -> factor d in (0, 1] on the learning rate from each of its layers to the one before
    it, e.g. `{"encoders.image": 0.9}`: its last norm has 1, its last block d, its embedding
    d ** (blocks + 1). It multiplies what `lr_multipliers` says. Every layer becomes groups of its
    own, which ZeRO communicates one by one."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for beta in self.betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas must lie in [0, 1), not {list(self.betas)}")
        for field in ("lr_multipliers", "task_clip_norms", "omega", "layer_decay"):
            for name, factor in getattr(self, field).items():
                if field == "lr_multipliers" and factor == 0.0:
                    raise ValueError(
                        f"{field}: 0.0 of {name!r} must be positive and finite; to keep parameters "
                        f"as they are, remove it and set optimizer.frozen=[{name!r}]"
                    )
                if not 0.0 < factor < float("inf"):
                    raise ValueError(f"{field}: {factor} of {name!r} must be positive and finite")
                if field == "layer_decay" and factor > 1.0:
                    raise ValueError(f"layer_decay: {factor} of {name!r} must be at most 1")
        if self.kind != "sgd" and self.momentum:
            raise ValueError(
                f"momentum belongs to kind=sgd; with kind={self.kind} set betas instead"
            )
        self._check_balance()
        return self

    def _check_balance(self) -> None:
        """What belongs to MT-AdamW, and what does not."""
        if self.kind != "mt_adamw":
            for field in ("omega", "max_compensation"):
                if getattr(self, field):
                    raise ValueError(f"{field} belongs to kind=mt_adamw, not kind={self.kind}")
            return
        for field in ("clip_norm", "task_clip_norms"):
            if value := getattr(self, field):
                empty = "null" if field == "clip_norm" else "{}"
                raise ValueError(
                    f"{field}={value} does not go with kind=mt_adamw, which gives every gradient "
                    f"the norm omega, whatever it was before: set {field}={empty}"
                )


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, in an order that depends on names and settings only.

    Each is {"name", "params": list[Parameter], "lr": peak, "lr_multiplier", "weight_decay"}. Frozen
    parameters are left out; a shared one appears once and follows a pattern that matches any of its
    names. Under ZeRO-3 the full shape is read from DeepSpeed's `ds_shape`.
    Raises ValueError for a pattern that matches no trained parameter, for a 0-dim parameter (ZeRO
    cannot partition one), for a model without trainable parameters, and for a module in
    `layer_decay` that does not tell its layers or is not trained.
    """
    named = aliases(model)
    every_name = [name for names, parameter in named if parameter.requires_grad for name in names]
    frozen = [name for names, p in named if getattr(p, "frozen", False) for name in names]
    require_matches("no_decay", settings.no_decay, every_name, frozen)
    require_matches("lr_multipliers", tuple(settings.lr_multipliers), every_name, frozen)
    depth_factors = _layer_factors(model, settings.layer_decay)

    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for names, parameter in named:
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if not shape:
            raise ValueError(
                f"parameter {names[0]} has no dimension, which ZeRO cannot partition: "
                "give it shape (1,) in the model"
            )
        if not parameter.requires_grad:
            continue
        own_factors = [depth_factors[name] for name in names if name in depth_factors]
        multiplier = 1.0
        if own_factors or not settings.multipliers_need_layer_decay:
            for pattern, factor in settings.lr_multipliers.items():
                if matches(names, pattern):
                    multiplier = factor
        # A parameter that several layers share learns like the last of them.
        multiplier *= max(own_factors, default=1.0)
        exempt = len(shape) < 2 or any(matches(names, pattern) for pattern in settings.no_decay)
        decay = 0.0 if exempt else settings.weight_decay
        members.setdefault((multiplier, decay), []).append(parameter)
    if not members:
        hint = ": optimizer.frozen names all of them" if frozen else ""
        raise ValueError(f"the model has no trainable parameter{hint}")
    return [
        {
            "name": f"lr*{multiplier:g} decay {decay:g}",
            "params": parameters,
            "lr": settings.lr * multiplier,
            "lr_multiplier": multiplier,
            "weight_decay": decay,
        }
        for (multiplier, decay), parameters in sorted(members.items(), key=lambda item: item[0])
    ]


def _layer_factors(model: nn.Module, layer_decay: dict[str, float]) -> dict[str, float]:
    """Parameter name -> factor by the depth of its layer, for the modules in `layer_decay`."""
    factors = {}
    modules = dict(model.named_modules())
    for path, decay in layer_decay.items():
        module = modules.get(path)
        if not hasattr(module, "layer_names"):
            able = [
                name
                for name, m in modules.items()
                if hasattr(m, "layer_names")
                and any(parameter.requires_grad for parameter in m.parameters())
            ]
            raise ValueError(
                f"optimizer.layer_decay: {path!r} is not a module that tells its layers (it has no "
                f"layer_names()); there are: {', '.join(able) or 'none'}"
            )
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(f"optimizer.layer_decay: {path!r} is not trained: remove it")
        layers = module.layer_names()
        for depth, prefixes in enumerate(layers):
            for name, _ in module.named_parameters(remove_duplicate=False):
                if any(name == p or name.startswith(f"{p}.") for p in prefixes):
                    factors[f"{path}.{name}"] = decay ** (len(layers) - 1 - depth)
    return factors
