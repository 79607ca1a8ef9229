"""Initial values depend on the seed and the name, and on nothing else."""

import contextlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pretrain.models.init import initialise, load_weights
from tests.pretrain.models.git.git_models import (
    loss_and_gradients,
    small_batch,
    small_model,
    small_model_without_values,
)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_same_seed_same_values_whatever_else_the_model_holds() -> None:
    first, other = values(small_model(7)), values(small_model(8))
    deeper = values(small_model(7, layers=4, tied_output=False))
    assert first.keys() < deeper.keys()
    assert all(torch.equal(tensor, deeper[name]) for name, tensor in first.items())
    drawn = [name for name, tensor in first.items() if tensor.unique().numel() > 2]
    assert all(not torch.equal(first[name], other[name]) for name in drawn)
    assert len(drawn) > 20


def test_meta_model_gets_every_value() -> None:
    expected = small_model(3)
    with torch.device("meta"):
        model = small_model_without_values()
    with pytest.raises(ValueError, match="no storage"):
        initialise(model, 3)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    initialise(model, 3)
    assert values(model).keys() == values(expected).keys()  # the output matrix is still tied
    for name, tensor in values(expected).items():
        assert torch.equal(values(model)[name], tensor)
    first, second = (loss_and_gradients(m, small_batch())[0]["loss"] for m in (model, expected))
    assert first == second


def test_values_are_cast_not_drawn_again_in_bfloat16() -> None:
    exact, model = values(small_model(5)), small_model(0).to(torch.bfloat16)
    initialise(model, 5)
    for name, tensor in values(model).items():
        assert torch.equal(tensor, exact[name].bfloat16())


def test_gather_is_asked_for_each_parameter_once() -> None:
    model, asked = small_model(), []

    @contextlib.contextmanager
    def gather(parameters):
        asked.extend(parameters)
        yield

    initialise(model, 0, gather)
    assert [id(p) for p in asked] == [id(p) for p in model.parameters()]


def test_parameters_without_a_rule_or_a_dimension_are_refused() -> None:
    bare = nn.Module()
    bare.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"scale of Module.*initial_std\['scale'\]"):
        initialise(bare, 0)
    bare.initial_std = {"scale": 0.0}
    initialise(bare, 0)
    assert bare.scale.item() == 0
    bare.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="no dimension"):
        initialise(bare, 0)


def test_load_weights_of_a_part(tmp_path) -> None:
    source, target = small_model(1), small_model(2)
    encoder = {k: v for k, v in values(source).items() if k.startswith("encoders.")}
    save_file(encoder, tmp_path / "start.safetensors")
    before = values(target)
    left = load_weights(target, tmp_path / "start.safetensors")
    assert left == [name for name in before if not name.startswith("encoders.")]
    for name, tensor in values(target).items():
        assert torch.equal(tensor, encoder.get(name, before[name]))


def test_load_weights_names_what_does_not_fit(tmp_path) -> None:
    path = tmp_path / "start.safetensors"
    save_file({"encoders.picture.norm_after.weight": torch.ones(32)}, path)
    with pytest.raises(ValueError, match=r"encoders\.picture\.norm_after\.weight"):
        load_weights(small_model(), path)
    save_file({"encoders.image.norm_after.weight": torch.ones(31)}, path)
    with pytest.raises(ValueError, match=r"norm_after\.weight has shape \(31,\).*wants \(32,\)"):
        load_weights(small_model(), path)
