"""Swin and ResNet of transformers as encoders: counts, values, folders, first values."""

import pytest
import torch

from pretrain.models.backbones import resnet, swin
from pretrain.models.backbones.settings import ResNetSettings, SwinSettings
from pretrain.models.init import initialise

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SMALL = {
    "swin": {"channels": 8, "depths": (1, 2, 1, 1), "heads": (1, 2, 2, 4), "window": 4},
    "resnet": {"depths": (1, 2, 1, 1), "channels": (16, 32, 48, 64), "stem": 8},
}
KINDS = {"swin": (SwinSettings, swin), "resnet": (ResNetSettings, resnet)}


def theirs(kind: str):
    """A model with a classifier, as files of others are."""
    import transformers as t

    torch.manual_seed(0)
    shape = SMALL[kind]
    if kind == "swin":
        return t.SwinForImageClassification(
            t.SwinConfig(
                embed_dim=8,
                depths=list(shape["depths"]),
                num_heads=list(shape["heads"]),
                window_size=4,
                drop_path_rate=0.1,
            )
        ).eval()
    model = t.ResNetForImageClassification(
        t.ResNetConfig(
            embedding_size=8, hidden_sizes=list(shape["channels"]), depths=list(shape["depths"])
        )
    ).train()
    for _ in range(3):  # statistics that are not those of nothing
        model(2 * torch.randn(4, 3, 64, 64) + 1)
    return model.eval()


@pytest.mark.parametrize(
    ("changes", "count"),
    [({}, 86_882_424), ({"channels": 192, "heads": (6, 12, 24, 48)}, 195_204_276)],
)
def test_swin_has_its_parameters(changes, count):
    with torch.device("meta"):
        encoder = SwinSettings(**changes).build()
    assert sum(p.numel() for p in encoder.parameters()) == count


def test_resnet_50_has_its_parameters():
    with torch.device("meta"):
        encoder = ResNetSettings().build()
    norms = sum(b.numel() for n, b in encoder.named_buffers() if n.endswith(("weight", "bias")))
    assert sum(p.numel() for p in encoder.parameters()) + norms == 23_508_032


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_a_folder_of_a_classifier_gives_its_maps(kind, tmp_path):
    import transformers

    theirs(kind).save_pretrained(tmp_path)
    settings, weights = KINDS[kind][1].load_folder(tmp_path)
    assert settings == KINDS[kind][0](**SMALL[kind])
    encoder = settings.build()
    encoder.load_state_dict(weights)
    images = torch.randn(2, 3, 50, 70)
    oracle = getattr(transformers, {"swin": "SwinBackbone", "resnet": "ResNetBackbone"}[kind])
    expected = oracle.from_pretrained(tmp_path, out_features=STAGES).eval()(images)
    encoded = encoder.encode(images, ["maps", "tokens"])
    for one, other in zip(encoded.maps, expected.feature_maps, strict=True):
        torch.testing.assert_close(one, other.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
    for one, grid in zip(encoded.maps, encoder.map_grids(), strict=True):
        assert one.shape[1:] == (*grid.sides(50, 70), grid.width)
    assert torch.equal(encoded.tokens, encoded.maps[-1].flatten(1, 2))
    assert torch.equal(encoder(images), encoded.tokens)
    # A sample's maps depend neither on the others nor on training mode.
    alone = encoder.train()(images[:1])
    torch.testing.assert_close(alone, encoded.tokens[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_first_values_gradients_and_layers(kind):
    encoder = KINDS[kind][0](**SMALL[kind]).build()
    initialise(encoder, 0)
    tables = [p for n, p in encoder.named_parameters() if "bias_table" in n]
    assert all(0.01 < p.std() < 0.03 for p in tables)
    assert bool(tables) == (kind == "swin")
    sum(m.square().sum() for m in encoder.maps(torch.randn(1, 3, 64, 64))).backward()
    layers = [name for names in encoder.layer_names() for name in names]
    for name, parameter in encoder.named_parameters():
        assert sum(name == p or name.startswith(f"{p}.") for p in layers) == 1, name
        # Theirs normalises the last stage once more than its maps need.
        assert parameter.grad is not None or name.startswith("backbone.swin.layernorm.")


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_flops_count_matrix_products(kind):
    from torch.utils.flop_counter import FlopCounterMode

    encoder = KINDS[kind][0](**SMALL[kind]).build().eval()
    with FlopCounterMode(display=False) as counter:
        encoder(torch.randn(1, 3, 128, 128))
    assert encoder.flops(128, 128) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_recomputation_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        encoder = SwinSettings(**SMALL["swin"], gradient_checkpointing=recompute).build().train()
        initialise(encoder, 0)
        torch.manual_seed(0)
        encoder(torch.randn(1, 3, 64, 64)).square().sum().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_folders_of_others_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        swin.load_folder(tmp_path)
    theirs("resnet").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is a resnet, and not a swin"):
        swin.load_folder(tmp_path)
    with pytest.raises(ValueError, match=r"heads\[1\] \(3\) must divide the 256 channels"):
        SwinSettings(heads=(4, 3, 16, 32))
