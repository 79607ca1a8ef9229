"""Freezing by name: what is met, its mode, and that it costs no backward pass."""

import pytest
import torch
from torch import nn

from pretrain.models.frozen import freeze, training_flops
from pretrain.models.init import initialise
from pretrain.models.multitask import MultiTaskModel
from pretrain.models.vit import VitSettings
from pretrain.objectives.evaluation_mode import evaluating
from pretrain.objectives.objective import Objective
from pretrain.optim.groups import OptimizerSettings, parameter_groups


class Head(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.output = nn.Linear(16, 3)

    def counts(self, batch):
        return {}

    def flops(self, batch):
        return 0

    def losses(self, modules, batch, totals, shared):
        return {"loss": self.output(self.drop(modules["image"](batch["images"]))).square().mean()}


def small_model(gradient_checkpointing: bool = False) -> MultiTaskModel:
    encoder = VitSettings(
        image_size=16,
        patch_size=8,
        width=16,
        layers=2,
        heads=2,
        gradient_checkpointing=gradient_checkpointing,
    ).build()
    model = MultiTaskModel({"image": encoder}, {"task": Head()})
    initialise(model, 0)
    return model


def saved_elements(model: MultiTaskModel) -> int:
    """Elements that a training step's graph keeps for its backward pass, weights left out."""
    weights = {p.data_ptr() for p in model.parameters()}
    kept = []

    def note(tensor):
        if tensor.data_ptr() not in weights:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        batch = {"images": torch.ones(5, 3, 16, 16)}
        loss = model("task", "undivided", batch, {})["loss"]
    loss.backward()
    return sum(kept)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_frozen_encoder_costs_no_backward_pass(gradient_checkpointing):
    model = small_model(gradient_checkpointing)
    trained = saved_elements(model)
    assert all(p.grad is not None for p in model.encoders.parameters())
    model.zero_grad()
    runs = []
    for block in model.encoders["image"].blocks:
        block.register_forward_hook(lambda *_: runs.append(1))
    freeze(model, ("encoders.image.*",))
    # What remains is of the head: its input, the mask of dropout, its output.
    assert saved_elements(model) <= 5 * 5 * (16 + 16 + 16 + 3) < trained / 4
    assert len(runs) == len(model.encoders["image"].blocks)  # once: nothing is recomputed
    assert all(p.grad is None for p in model.encoders.parameters())
    assert all(p.grad is not None for p in model.objectives.parameters())


def test_flops_of_a_frozen_encoder_are_those_of_its_forward_pass():
    encoder = small_model().encoders["image"]
    flops = training_flops(encoder, encoder.flops)
    forward = encoder.flops(16, 16)
    assert flops(16, 16) == 3 * forward > 0
    freeze(encoder, ("blocks.*",))
    assert flops(16, 16) == 3 * forward
    encoder.requires_grad_(False)
    assert flops(16, 16) == forward


def test_what_is_frozen_stays_in_evaluation_mode():
    model = small_model()
    model.encoders["image"].extra = nn.Dropout(0.5)
    freeze(model, ("encoders.image.*",))
    for _ in range(2):
        assert not any(m.training for m in model.encoders["image"].modules())
        assert model.objectives["task"].drop.training
        with evaluating(model.encoders["image"], model.objectives["task"]):
            assert not model.objectives["task"].drop.training
        model.train()
    model.eval()
    assert not model.objectives["task"].drop.training


def test_a_part_of_an_encoder():
    model = small_model()
    names = freeze(model, ("encoders.image.blocks.0.*", "*.bias"))
    first, second = model.encoders["image"].blocks
    assert not first.training and second.training and model.encoders["image"].training
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters()} - set(names)
    assert not any(n.startswith("encoders.image.blocks.0.") or n.endswith("bias") for n in trained)
    groups = parameter_groups(model, OptimizerSettings())
    assert sum(len(group["params"]) for group in groups) == len(trained)


def test_a_shared_parameter_is_frozen_by_any_of_its_names():
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    model["two"].weight = model["one"].weight
    assert freeze(model, ("two.weight",)) == ["one.weight"]
    assert not model["one"].weight.requires_grad and model["one"].bias.requires_grad


def test_what_is_not_trained_anyhow_is_not_met():
    model = nn.ModuleDict({"online": nn.Linear(4, 4), "target": nn.Linear(4, 4)})
    model["target"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"optimizer.frozen: pattern 'target.\*' matches no train"):
        freeze(model, ("target.*",))
    assert freeze(model, ("*.bias",)) == ["online.bias"]
    assert model["target"].training  # its objective decides


@pytest.mark.parametrize(
    "settings",
    [
        {"no_decay": ("one.*",)},
        {"lr_multipliers": {"one.*": 2.0}},
    ],
)
def test_settings_that_meet_only_what_is_frozen_are_refused(settings):
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    freeze(model, ("one.*",))
    with pytest.raises(ValueError, match=r"'one.\*' matches frozen parameters only .*remove it"):
        parameter_groups(model, OptimizerSettings(**settings))
