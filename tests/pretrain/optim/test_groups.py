"""Parameter groups: merged, ordered by settings, complete, and strict about patterns."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pretrain.models.vit import VisionTransformer
from pretrain.optim.groups import OptimizerSettings, parameter_groups


class Toy(nn.Module):
    """Two towers, a tied output, a frozen layer and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        self.positions = nn.Parameter(torch.zeros(5, 8))
        self.words = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10)
        self.head.weight = self.words.weight
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.temperature = nn.Parameter(torch.ones(1))


def by_name(model: nn.Module, settings: OptimizerSettings) -> dict[str, tuple[float, float]]:
    """First name of each parameter -> (lr, weight decay) of its group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, settings)
        for p in group["params"]
    }


def test_vectors_and_named_patterns_do_not_decay():
    settings = OptimizerSettings(lr=0.1, weight_decay=0.05, no_decay=("positions",))
    found = by_name(Toy(), settings)
    assert found == {
        "encoder.0.weight": (0.1, 0.05),
        "encoder.0.bias": (0.1, 0.0),
        "encoder.1.weight": (0.1, 0.0),
        "encoder.1.bias": (0.1, 0.0),
        "encoder.2.weight": (0.1, 0.05),
        "encoder.2.bias": (0.1, 0.0),
        "positions": (0.1, 0.0),
        "words.weight": (0.1, 0.05),
        "head.bias": (0.1, 0.0),
        "temperature": (0.1, 0.0),
    }


def test_groups_are_merged_and_ordered():
    settings = OptimizerSettings(
        lr=0.1, weight_decay=0.05, lr_multipliers={"encoder.*": 0.5, "encoder.0.*": 0.25}
    )
    groups = parameter_groups(Toy(), settings)
    keys = [(g["lr_multiplier"], g["weight_decay"]) for g in groups]
    assert keys == [(0.25, 0.0), (0.25, 0.05), (0.5, 0.0), (0.5, 0.05), (1.0, 0.0), (1.0, 0.05)]
    assert all(g["lr"] == pytest.approx(0.1 * g["lr_multiplier"]) for g in groups)
    assert groups[0]["name"] == "lr*0.25 decay 0"
    optimizer = torch.optim.AdamW(groups)
    assert [g["lr_multiplier"] for g in optimizer.param_groups] == [k[0] for k in keys]


def test_without_decay_one_group_is_enough():
    groups = parameter_groups(Toy(), OptimizerSettings(weight_decay=0.0))
    assert len(groups) == 1
    assert len({id(p) for p in groups[0]["params"]}) == len(groups[0]["params"]) == 10


def test_the_last_matching_pattern_wins():
    one = OptimizerSettings(lr=1.0, lr_multipliers={"encoder.0.*": 3.0, "*": 2.0})
    two = OptimizerSettings(lr=1.0, lr_multipliers={"*": 2.0, "encoder.0.*": 3.0})
    assert by_name(Toy(), one)["encoder.0.weight"][0] == 2.0
    assert by_name(Toy(), two)["encoder.0.weight"][0] == 3.0
    assert by_name(Toy(), two)["encoder.2.weight"][0] == 2.0


def test_a_shared_parameter_answers_to_each_of_its_names():
    settings = OptimizerSettings(lr=1.0, lr_multipliers={"head.weight": 7.0})
    assert by_name(Toy(), settings)["words.weight"][0] == 7.0


def test_shapes_of_zero3_partitions_are_the_full_ones():
    """Under ZeRO-3 a parameter is empty outside of forward and keeps its shape in ds_shape."""
    model = nn.Linear(4, 3)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert by_name(model, OptimizerSettings(lr=1.0, weight_decay=0.1)) == {
        "weight": (1.0, 0.1),
        "bias": (1.0, 0.0),
    }


@pytest.mark.parametrize(
    "settings",
    [{"no_decay": ("positons",)}, {"lr_multipliers": {"encodr.*": 2.0}}],
)
def test_a_pattern_without_match_is_an_error(settings):
    message = r"matches no trained parameter; the nearest name is (pos|enc)"
    with pytest.raises(ValueError, match=message):
        parameter_groups(Toy(), OptimizerSettings(**settings))


def test_refuses_what_zero_cannot_train():
    model = Toy()
    model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"scale has no dimension.*shape \(1,\)"):
        parameter_groups(model, OptimizerSettings())
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), OptimizerSettings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.9, 1.0)}, "betas must lie in"),
        ({"lr_multipliers": {"*": 0.0}}, "must be positive and finite"),
        ({"lr_multipliers": {"*": float("inf")}}, "must be positive and finite"),
        ({"momentum": 0.9}, "momentum belongs to kind=sgd"),
        ({"clip_norm": 0.0}, "greater than 0"),
        ({"kind": "mt_adamw"}, r"clip_norm=1.0 does not go with kind=mt_adamw.*clip_norm=null"),
        (
            {"kind": "mt_adamw", "clip_norm": None, "task_clip_norms": {"a": 1.0}},
            r"task_clip_norms=.* does not go with kind=mt_adamw",
        ),
        ({"omega": {"a": 2.0}}, "omega belongs to kind=mt_adamw, not kind=adamw"),
        ({"kind": "sgd", "max_compensation": 4.0}, "max_compensation belongs to kind=mt_adamw"),
        ({"kind": "mt_adamw", "clip_norm": None, "omega": {"a": 0.0}}, "0.0 of 'a' must be posit"),
        ({"max_compensation": 0.5}, "greater than or equal to 1"),
        ({"task_clip_norms": {"a": -1.0}}, "must be positive and finite"),
        ({"layer_decay": {"encoders.image": 1.1}}, "must be at most 1"),
    ],
)
def test_settings_refuse_nonsense(settings, message):
    with pytest.raises(ValidationError, match=message):
        OptimizerSettings(**settings)


# ---- layer-wise decay --------------------------------------------------------------------------


def small_vit_model() -> nn.Module:
    """A transformer of three blocks as `encoders.image`, and a head that knows no layers."""
    model = nn.Module()
    encoder = VisionTransformer(image_size=8, patch_size=4, width=8, layers=3, heads=2)
    model.encoders = nn.ModuleDict({"image": encoder})
    model.head = nn.Linear(8, 2)
    return model


def test_layers_before_the_last_learn_slower():
    settings = OptimizerSettings(lr=1.0, weight_decay=0.0, layer_decay={"encoders.image": 0.5})
    found = {name: lr for name, (lr, _) in by_name(small_vit_model(), settings).items()}
    expected = {
        "embedding.": 0.5**4,
        "norm_before.": 0.5**4,
        "blocks.0.": 0.5**3,
        "blocks.1.": 0.5**2,
        "blocks.2.": 0.5,
        "norm_after.": 1.0,
    }
    for name, lr in found.items():
        inner = name.removeprefix("encoders.image.")
        (factor,) = [f for prefix, f in expected.items() if inner.startswith(prefix)] or [1.0]
        assert lr == factor, name
    assert len(set(found.values())) == 5


def test_every_parameter_of_the_transformer_has_one_layer():
    """Also with more than ten blocks, whose names begin alike."""
    encoder = VisionTransformer(image_size=8, patch_size=4, width=8, layers=12, heads=2)
    prefixes = [p for layer in encoder.layer_names() for p in layer]
    for name, _ in encoder.named_parameters():
        assert sum(name.startswith(f"{p}.") for p in prefixes) == 1, name


def test_layer_decay_multiplies_the_patterns_and_merges_groups():
    settings = OptimizerSettings(
        lr=1.0,
        weight_decay=0.1,
        layer_decay={"encoders.image": 0.5},
        lr_multipliers={"encoders.*": 0.5, "head.*": 0.25},
    )
    found = by_name(small_vit_model(), settings)
    assert found["encoders.image.norm_after.weight"] == (0.5, 0.0)
    assert found["encoders.image.blocks.2.attention.qkv.weight"] == (0.25, 0.1)
    assert found["encoders.image.embedding.patches.weight"] == (0.5**5, 0.1)
    groups = parameter_groups(small_vit_model(), settings)
    # blocks.2 and the head have the same rate, so they share two groups; norm_after has no matrix.
    keys = [(g["lr_multiplier"], g["weight_decay"]) for g in groups]
    assert keys == [(0.5**n, w) for n in (5, 4, 3, 2) for w in (0.0, 0.1)] + [(0.5, 0.0)]


def test_a_shared_parameter_learns_like_its_last_layer():
    model = small_vit_model()
    blocks = model.encoders["image"].blocks
    blocks[0].mlp.expand.weight = blocks[2].mlp.expand.weight
    settings = OptimizerSettings(lr=1.0, layer_decay={"encoders.image": 0.5})
    assert by_name(model, settings)["encoders.image.blocks.0.mlp.expand.weight"][0] == 0.5


def test_layer_decay_needs_a_module_that_tells_its_layers():
    settings = OptimizerSettings(layer_decay={"head": 0.9})
    with pytest.raises(ValueError, match=r"'head' is not a module .* there are: encoders.image"):
        parameter_groups(small_vit_model(), settings)
