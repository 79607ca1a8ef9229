"""Which parameter follows which, and the faults of models that declare it wrongly."""

import pytest
import torch
from torch import nn

from pretrain.engine.zero.momentum_pairs import (
    buffer_pairs,
    moving_targets,
    require_weights_in_memory,
    target_sources,
)
from pretrain.models.multitask import MultiTaskModel
from pretrain.optim.momentum import MomentumTargets


class Nothing(nn.Module):
    """An objective without targets."""

    momentum_targets = None


def objective(pairs: dict[str, str], **modules: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, part in modules.items():
        setattr(module, name, part)
    module.momentum_targets = MomentumTargets(pairs)
    return module


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def one_task(pairs: dict[str, str], **modules: nn.Module) -> MultiTaskModel:
    """An encoder whose first layer is frozen, and a task with these modules and pairs."""
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    frozen(encoder[0])
    return MultiTaskModel(
        {"image": encoder}, {"learn": objective(pairs, **modules), "plain": Nothing()}
    )


def copy_of_encoder() -> nn.Module:
    return frozen(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))


def test_paths_lead_to_the_encoder_or_into_the_objective():
    model = one_task(
        {"target": "encoders.image", "slow.inner": "quick"},
        target=copy_of_encoder(),
        slow=nn.ModuleDict({"inner": frozen(nn.Linear(4, 2))}),
        quick=nn.Linear(4, 2),
    )
    assert target_sources(model) == {
        "objectives.learn.target.0.weight": ("learn", "encoders.image.0.weight"),
        "objectives.learn.target.0.bias": ("learn", "encoders.image.0.bias"),
        "objectives.learn.target.1.weight": ("learn", "encoders.image.1.weight"),
        "objectives.learn.target.1.bias": ("learn", "encoders.image.1.bias"),
        "objectives.learn.slow.inner.weight": ("learn", "objectives.learn.quick.weight"),
        "objectives.learn.slow.inner.bias": ("learn", "objectives.learn.quick.bias"),
    }
    # What never moves needs no float32 values of its own.
    assert target_sources(model).keys() - moving_targets(model).keys() == {
        "objectives.learn.target.0.weight",
        "objectives.learn.target.0.bias",
    }
    target, online = model.objectives["learn"].target[1], model.encoders["image"][1]
    assert [(id(a), id(b)) for a, b in buffer_pairs(model)] == [
        (id(dict(target.named_buffers())[name]), id(buffer))
        for name, buffer in online.named_buffers()
    ]


def test_a_part_of_an_encoder_and_two_targets_of_it():
    part = {
        "learn": objective({"target": "encoders.image.1"}, target=frozen(nn.Linear(4, 2))),
        "other": objective({"target": "encoders.image.1"}, target=frozen(nn.Linear(4, 2))),
    }
    with torch.device("meta"):
        encoder = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model = MultiTaskModel({"image": encoder}, part)
    assert moving_targets(model) == {
        f"objectives.{task}.target.{name}": (task, f"encoders.image.1.{name}")
        for task in ("learn", "other")
        for name in ("weight", "bias")
    }


def test_tied_weights_are_one_target():
    def tied() -> nn.Module:
        module = nn.ModuleDict({"words": nn.Embedding(5, 4), "output": nn.Linear(4, 5)})
        module["output"].weight = module["words"].weight
        return module

    model = one_task({"target": "quick"}, target=frozen(tied()), quick=tied())
    assert moving_targets(model).keys() == {
        "objectives.learn.target.words.weight",
        "objectives.learn.target.output.bias",
    }
    untied = nn.ModuleDict({"words": nn.Embedding(5, 4), "output": nn.Linear(4, 5)})
    with pytest.raises(ValueError, match=r"words.weight is a momentum target of .* and of .*"):
        target_sources(one_task({"target": "quick"}, target=frozen(tied()), quick=untied))


def two_targets_in_one_chain() -> MultiTaskModel:
    return one_task(
        {"second": "first", "first": "quick"},
        quick=nn.Linear(4, 2),
        first=frozen(nn.Linear(4, 2)),
        second=frozen(nn.Linear(4, 2)),
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: one_task({"target": "encoders.text"}, target=copy_of_encoder()),
            "task learn: the model has no module encoders.text",
        ),
        (
            lambda: one_task({"missing": "encoders.image"}),
            "task learn: the model has no module objectives.learn.missing",
        ),
        (
            lambda: one_task({"target": "encoders.image"}, target=nn.Linear(3, 4)),
            "objectives.learn.target cannot follow encoders.image",
        ),
        (
            lambda: one_task(
                {"target": "quick"}, target=frozen(nn.Linear(4, 3)), quick=nn.Linear(4, 2)
            ),
            r"2 of their tensors differ, among them bias, \(3,\) against \(2,\)",
        ),
        (
            lambda: one_task(
                {"target": "quick"},
                target=frozen(nn.BatchNorm1d(4)),
                quick=nn.BatchNorm1d(4, track_running_stats=False),
            ),
            "num_batches_tracked, .* against missing",
        ),
        (
            lambda: one_task({"target": "quick"}, target=nn.Linear(4, 2), quick=nn.Linear(4, 2)),
            r"target.weight is a momentum target, but would be trained: call "
            r"requires_grad_\(False\) on "
            "objectives.learn.target",
        ),
        (
            two_targets_in_one_chain,
            "follows objectives.learn.first.weight, which is a momentum target",
        ),
        (
            lambda: one_task(
                {"target": "encoders.image"}, target=copy_of_encoder(), encoders=nn.Linear(2, 2)
            ),
            "its own submodule `encoders` hides",
        ),
    ],
)
def test_faults_are_named(model, message):
    with pytest.raises(ValueError, match=message):
        target_sources(model())


def test_weights_in_files_are_refused():
    model = one_task({"target": "encoders.image"}, target=copy_of_encoder())
    with pytest.raises(ValueError, match="set deepspeed=zero3_offload"):
        require_weights_in_memory(model, {"stage": 3, "offload_param": {"device": "nvme"}})
    for allowed in ({"stage": 1}, {"stage": 3, "offload_param": {"device": "cpu"}}):
        require_weights_in_memory(model, allowed)
    plain = MultiTaskModel({}, {"plain": Nothing()})
    require_weights_in_memory(plain, {"stage": 3, "offload_param": {"device": "nvme"}})
