"""Weights of momentum targets in place of what they follow."""

import pytest
import torch
from torch import nn

from pretrain.models.multitask import MultiTaskModel
from pretrain.optim.momentum import MomentumTargets
from tools.support.trained import _targets_in_place


class Follows(nn.Module):
    """An objective with a copy of an encoder, and one of a module of its own."""

    def __init__(self, pairs: dict[str, str]) -> None:
        super().__init__()
        self.copy, self.projector, self.slow = nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.momentum_targets = MomentumTargets(pairs, start=0.5, end=1.0)


def model_of(*pairs: dict[str, str]) -> MultiTaskModel:
    objectives = {f"task{number}": Follows(each) for number, each in enumerate(pairs)}
    return MultiTaskModel({"image": nn.BatchNorm1d(2)}, objectives, seed=0)


def test_parameters_and_buffers_of_all_pairs_move():
    model = model_of({"copy": "encoders.image", "slow": "projector"})
    state = model.state_dict()
    state["objectives.task0.copy.running_var"] = torch.tensor([3.0, 4.0])
    moved = _targets_in_place(model, state)
    assert moved.keys() == {
        *(f"encoders.image.{name}" for name in model.encoders["image"].state_dict()),
        "objectives.task0.projector.weight",
        "objectives.task0.projector.bias",
    }
    assert moved["encoders.image.running_var"].tolist() == [3, 4]
    slow = model.objectives["task0"].slow.weight
    assert torch.equal(moved["objectives.task0.projector.weight"], slow)


def test_two_targets_of_one_encoder_are_refused():
    model = model_of({"copy": "encoders.image"}, {"copy": "encoders.image"})
    with pytest.raises(ValueError, match=r"encoders\.image has momentum targets in several tasks"):
        _targets_in_place(model, model.state_dict())
