"""InternImage as an encoder of a run: sizes, drop path, recomputation, accounting, settings."""

import json
from pathlib import Path
from sysconfig import get_path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.rng import keyed_u64, mix64
from pretrain.models.init import initialise
from pretrain.models.internimage.channels_last import BatchNorm
from pretrain.models.internimage.dcnv3 import DCNv3
from pretrain.models.internimage.internimage import InternImage, InternImageSettings
from pretrain.models.operators.cpu_library import missing
from pretrain.models.sample_draws import SampleDraws
from pretrain.optim.groups import OptimizerSettings, parameter_groups
from tests.pretrain.models.git.git_models import GOLDENS
from tests.pretrain.models.internimage.internimage_models import (
    PUBLISHED,
    SMALL_PROJECTOR,
    OfficialModel,
    Pooled,
    small_encoder,
    small_settings,
)

MIXERS = ("dcnv3", "halo", "shifted_window", "reduced_attention", "depthwise_conv")


def images(count: int = 2, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def draws(*positions: int, seed: int = 1, task: str = "classify") -> SampleDraws:
    return SampleDraws(seed, task, torch.tensor(positions))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("size", [(64, 64), (70, 97), (33, 32), (9, 5)])
def test_any_size(mixer, size):
    encoder = small_encoder(mixer={"type": mixer}, head={"type": "conv"}).eval()
    with torch.no_grad():
        maps = encoder.encode(images(1, *size), ("maps",)).maps
        tokens = encoder(images(1, *size))
        sides = [tuple(m.shape) for m in maps]
        assert sides == [
            (1, -(-size[0] // (4 * 2**i)), -(-size[1] // (4 * 2**i)), 16 * 2**i) for i in range(4)
        ]
        assert tokens.shape == (1, encoder.tokens(*size), encoder.width)
        assert torch.equal(tokens, maps[-1].flatten(1, 2))
        pooled = encoder.encode(images(1, *size), ("pooled",)).pooled
        assert pooled.shape == (1, encoder.pooled_width)
        places = [(1, *grid.sides(*size), grid.width) for grid in encoder.map_grids()]
        assert sides == places
        assert encoder(images(0, *size)).shape == (0, encoder.tokens(*size), encoder.width)


def test_the_projector_refuses_what_its_maps_do_not_fit():
    encoder = small_encoder(head=SMALL_PROJECTOR)
    assert encoder.encode(images(1, 64, 96), ("pooled",)).pooled.shape == (1, 48)
    with pytest.raises(ValueError, match=r"48 x 80 pixels do not fit.*multiples of 32"):
        encoder.encode(images(1, 48, 80), ("pooled",))
    with pytest.raises(ValueError, match="no head"):
        small_encoder().encode(images(), ("pooled",))


@pytest.mark.parametrize("mixer", MIXERS)
def test_flops_are_those_that_torch_counts(mixer):
    for head in (None, {"type": "conv"}, SMALL_PROJECTOR):
        encoder = small_encoder(mixer={"type": mixer}, head=head).eval()
        # The fused attention of CPUs is not counted: matrix products are.
        counter = FlopCounterMode(display=False)
        want = "tokens" if head is None else "pooled"
        with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
            encoder.encode(images(1, 64, 96), (want,))
        wanted = encoder.flops(64, 96, want=want)
        sampled = sum(
            module.sampling_flops(16 // 2**stage, 24 // 2**stage)
            for stage, level in enumerate(encoder.levels)
            for module in level.modules()
            if isinstance(module, DCNv3)
        )
        assert (sampled > 0) == (mixer == "dcnv3")
        assert counter.get_total_flops() == wanted - sampled


@pytest.mark.parametrize(
    "size, side, giga",
    [
        ("T", 224, 4.89),
        ("S", 224, 8.31),
        ("B", 224, 16.18),
        ("L", 384, 107.8),
        ("XL", 384, 162.9),
        ("H", 224, 182.9),
        ("H", 384, 537),
        ("H", 640, 1493),
        ("G", 384, 1525),
        ("G", 512, 2711),
    ],
)
def test_flops_of_the_published_sizes(size, side, giga):
    """In the official count: multiply-adds, and 5 operations for a sampled point and channel."""
    with torch.device("meta"):
        encoder = InternImageSettings(size=size).build()
    sampled = sum(
        block.token_mixer.sampling_flops(side // (4 * 2**stage), side // (4 * 2**stage))
        for stage, level in enumerate(encoder.levels)
        for block in level.blocks
    )
    official = (encoder.flops(side, side, want="pooled") - sampled) / 2 + sampled / 8 * 5
    assert official / 1e9 == pytest.approx(giga, rel=2e-3)


# ---- randomness --------------------------------------------------------------------------------


def test_draws_are_the_hash_of_the_data_pipeline():
    found = draws(0, 7, 2**40, -1).uniform("drop_path", 3)
    key = np.uint64(keyed_u64(1, "classify", "drop_path"))
    positions = np.array([0, 7, 2**40, -1], dtype=np.int64).astype(np.uint64)
    samples = mix64(mix64(positions + key) ^ key)
    steps = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = mix64(samples + steps[:, None]) >> np.uint64(40)
    assert torch.equal(found, torch.from_numpy(bits.astype(np.float32) / 2**24))


def test_draws_are_uniform_and_independent():
    found = SampleDraws(3, "a", torch.arange(4000)).uniform("drop_path", 8)
    assert found.min() >= 0 and found.max() < 1
    assert torch.allclose(found.mean(dim=1), torch.tensor(0.5), atol=0.02)
    assert torch.corrcoef(found).fill_diagonal_(0).abs().max() < 0.06
    others = [
        SampleDraws(4, "a", torch.arange(4000)).uniform("drop_path", 8),
        SampleDraws(3, "b", torch.arange(4000)).uniform("drop_path", 8),
        SampleDraws(3, "a", torch.arange(4000)).uniform("mixup", 8),
    ]
    assert all((found != other).float().mean() > 0.99 for other in others)


def test_drop_path_belongs_to_the_samples():
    """The same rows in any order and any micro-batch, under any state of torch's generator."""
    encoder = small_encoder(drop_path=0.6).train()
    batch = images(6)
    whole = encoder(batch, draws(*range(6)))
    assert torch.equal(whole, encoder(batch, draws(*range(6))))
    for rows in ([0, 1, 2], [5, 3], [4]):
        part = encoder(batch[rows], draws(*rows))
        torch.testing.assert_close(part, whole[rows], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, encoder(batch, draws(*range(6, 12))), atol=1e-3)
    kept = [small_encoder(drop_path=0.6).eval()(batch, d) for d in (None, draws(*range(6)))]
    assert torch.equal(*kept)


def test_drop_path_rates_rise_and_keep_the_mean():
    encoder = small_encoder(drop_path=0.5, depths=(1, 1, 2, 1)).train()
    assert encoder.drop_rates == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5])
    kept = encoder._kept(torch.zeros(4000, 1), SampleDraws(0, "a", torch.arange(4000)))
    assert kept.shape == (5, 2, 4000)
    for layer, rate in enumerate(encoder.drop_rates):
        assert (kept[layer] == 0).float().mean() == pytest.approx(rate, abs=0.02)
        assert kept[layer].mean() == pytest.approx(1.0, abs=0.04)
        assert kept[layer].unique().numel() == (2 if rate else 1)


def test_recomputation_changes_nothing():
    def gradients(recompute: bool) -> list[torch.Tensor]:
        encoder = small_encoder(
            drop_path=0.4,
            gradient_checkpointing=recompute,
            head=SMALL_PROJECTOR,
            mixer={"center_feature_scale": True},
            post_norm_layers=(1,),
            res_post_norm=True,
        )
        encoder.train().encode(images(), ("pooled",), draws(3, 4)).pooled.square().sum().backward()
        return [p.grad for p in encoder.parameters()]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_without_a_graph_break(backend):
    if backend == "inductor" and (missing() or not Path(get_path("include"), "Python.h").exists()):
        pytest.skip("inductor needs a C++ compiler and Python's headers")
    encoder = Pooled(small_encoder(head={"type": "conv"})).eval()
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    found = []
    for model in (encoder, compiled):
        output = model(images())
        inputs = list(encoder.parameters())
        found.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for plain, other in zip(*found, strict=True):
        # Inductor adds up in another order: errors are of the size of the largest number.
        atol = 0 if backend == "aot_eager" else 3e-5 * plain.abs().max().item()
        torch.testing.assert_close(other, plain, atol=atol, rtol=1e-5)


def test_torch_exports_it_for_any_batch():
    encoder = small_encoder(head={"type": "conv"}).eval()
    exported = torch.export.export(
        Pooled(encoder),
        (images(2),),
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=64)}},
    )
    with torch.no_grad():
        found = exported.module()(images(5))
        torch.testing.assert_close(found, encoder.encode(images(5), ("pooled",)).pooled)


# ---- values ------------------------------------------------------------------------------------


def test_initial_values_are_the_official_distributions():
    encoder = small_settings(
        channels=64, layer_scale=1e-5, mixer={"center_feature_scale": True}, head={"type": "conv"}
    ).build()
    initialise(encoder, 0)
    block = encoder.levels[3].blocks[0]
    assert not block.dcn.offset.weight.any() and not block.dcn.mask.weight.any()
    assert not block.dcn.center_feature_scale_proj_weight.any()
    assert (block.gamma1 == 1e-5).all() and (block.norm1[0].weight == 1).all()
    for weight, bound in (
        (block.dcn.output_proj.weight, (6 / 1024) ** 0.5),
        (block.dcn.dw_conv[0].weight, 1 / 3),
        (encoder.levels[2].downsample.conv.weight, (256 * 9) ** -0.5),
    ):
        weight = weight.detach()
        assert weight.abs().max() <= bound and weight.abs().max() > 0.98 * bound
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert block.mlp.fc1.weight.detach().std() == pytest.approx(0.02, rel=0.02)
    assert (encoder.conv_head[1][0].weight == 1).all()
    # A regular grid of equal weights, so every image starts as a mean of its neighbourhood.
    x = torch.randn(1, 5, 5, 64)
    mixer = encoder.levels[0].blocks[0].dcn
    value = nn.functional.avg_pool2d(mixer.input_proj(x).permute(0, 3, 1, 2), 3, 1, 1)
    mixed = 0.5 * (value.permute(0, 2, 3, 1) + mixer.input_proj(x))
    torch.testing.assert_close(mixer(x), mixer.output_proj(mixed), atol=1e-5, rtol=1e-4)


def test_bfloat16_is_near_float32():
    encoder = small_encoder(head={"type": "conv"}, layer_scale=0.5, post_norm=True).eval()
    exact = encoder.encode(images(), ("pooled",)).pooled
    rounded = encoder.to(torch.bfloat16).encode(images().bfloat16(), ("pooled",)).pooled
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.1 * exact.norm()
    assert encoder.conv_head[1][0].running_var.dtype == torch.float32


def test_batch_norm_equals_torch_and_leaves_padding_out():
    own, torchs = BatchNorm(6).train(), nn.BatchNorm2d(6).train()
    x = torch.randn(5, 3, 4, 6) * 3 + 2
    for part in (x[:3], x):
        y = own(part)
        torch.testing.assert_close(y, torchs(part.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    for name, value in torchs.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], value)
    valid = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(
        own(x, valid)[valid], torchs(x[valid].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    )
    torch.testing.assert_close(own.running_var, torchs.running_var)
    torch.testing.assert_close(
        own.eval()(x), torchs.eval()(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    )


# ---- learning rates ----------------------------------------------------------------------------


GROUPED = {
    "t": {"head": {"type": "conv"}},
    "postnorm_ls": {
        "head": {"type": "conv"},
        "post_norm": True,
        "layer_scale": 1e-5,
        "stage_norm": False,
    },
    "h": {
        "head": SMALL_PROJECTOR,
        "res_post_norm": True,
        "post_norm_layers": [0],
        "mixer": {"center_feature_scale": True, "dw_kernel_size": 5},
    },
}


def grouped(case: str, **settings) -> dict[str, tuple[float, float]]:
    """Official name -> learning rate and weight decay, at a peak of 1."""
    encoder = small_encoder(**GROUPED[case])
    model = nn.ModuleDict(
        {"encoders": nn.ModuleDict({"image": encoder}), "head": nn.Linear(encoder.pooled_width, 10)}
    )
    multipliers = {"*.dcn.offset.*": 0.1}
    if case == "h":
        multipliers["*.dcn.center_feature_scale_proj_*"] = 0.1
    settings = OptimizerSettings(lr=1.0, lr_multipliers=multipliers, **settings)
    names = {id(p): n.removeprefix("encoders.image.") for n, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, settings)
        for p in group["params"]
    }


@pytest.mark.parametrize("case", sorted(GROUPED))
@pytest.mark.parametrize(
    ("kind", "layer_decay"),
    [
        ("layer_decay_0.9", {"encoders.image": 0.9}),
        ("no_layer_decay", {}),
    ],
)
def test_the_official_grouping(case, kind, layer_decay):
    golden = json.loads((GOLDENS / "optim_groups.json").read_text())["groups"]
    wanted = golden[f"{case}/{kind}_dcn_mul_0.1"]
    found = grouped(case, layer_decay=layer_decay, multipliers_need_layer_decay=True)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values), name
    if layer_decay:  # then there is nothing to correct
        assert grouped(case, layer_decay=layer_decay) == found


@pytest.mark.parametrize("case", sorted(GROUPED))
def test_without_layer_decay_offsets_learn_slower_all_the_same(case):
    official = grouped(case, multipliers_need_layer_decay=True)
    for name, (rate, decay) in grouped(case).items():
        slow = ".dcn.offset." in name or ".dcn.center_feature_scale_proj_" in name
        assert rate == (0.1 if slow else 1.0), name
        assert decay == official[name][1]
        assert (decay == 0.0) == (
            name.endswith("bias")
            or "norm" in name
            or "gamma" in name
            or ".dw_conv.1." in name
            or "conv_head.1" in name
        ), name


@pytest.mark.parametrize("size", ["B", "H", "G"])
def test_every_parameter_has_one_layer(size):
    with torch.device("meta"):
        encoder = InternImageSettings(size=size).build()
    layers = encoder.layer_names()
    assert len(layers) == sum(encoder.depths)
    prefixes = [name for layer in layers for name in layer]
    for name, _ in encoder.named_parameters():
        assert sum(name.startswith(f"{prefix}.") for prefix in prefixes) == 1, name


# ---- settings ----------------------------------------------------------------------------------


def test_a_size_gives_way_to_what_is_said_beside_it():
    small = InternImageSettings(size="S", depths=(1, 1, 1, 1), layer_scale=None, head=None)
    assert (small.channels, small.depths, small.layer_scale) == (80, [1, 1, 1, 1], None)
    assert small.post_norm and small.pools == ("mean",) and small.any_sides
    huge = InternImageSettings(size="H", mixer={"offset_scale": 1.5}, post_norm_layers=(3,))
    assert huge.mixer.dw_kernel_size == 5 and huge.mixer.center_feature_scale
    assert huge.mixer.offset_scale == 1.5 and huge.post_norm_layers == [3]
    assert huge.size_multiple == 32 and not huge.any_sides
    other = InternImageSettings(size="H", mixer={"type": "halo", "window": 8})
    assert other.mixer.window == 8 and other.channels == 320
    for size in PUBLISHED:  # what a run directory holds reads back as what it was
        settings = InternImageSettings(size=size)
        assert (
            InternImageSettings.model_validate_json(settings.model_dump_json(), strict=True)
            == settings
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"groups": (3, 4, 8, 16)}, r"groups\[0\] \(3\) must divide the 64"),
        ({"size": "H", "layer_scale": 1e-5}, "res_post_norm goes with neither"),
        ({"post_norm_layers": (18,)}, r"layers 0\.\.17, not \[18\]"),
        ({"mixer": {"type": "halo", "offset_scale": 2.0}}, "offset_scale"),
        ({"head": {"type": "projector", "width": 100}}, r"heads \(16\) must divide width"),
        ({"size": "M"}, "size"),
        ({"channels": 63, "groups": (1, 1, 1, 1)}, r"channels \(63\) must be even"),
        ({"mixer": {"kernel_size": 4}}, "must be odd"),
        ({"mixer": {"type": "depthwise_conv", "kernel_size": 2}}, "must be odd"),
        ({"depths": (1, 0, 1, 1)}, "greater than 0"),
        ({"post_norm_layers": (5, 5)}, r"post_norm_layers: \[5, 5\] must rise"),
        ({"mixer": {"kernel_size": 1, "remove_center": True}}, "the only point of kernel_size 1"),
        ({"mixer": {"offset_scale": float("inf")}}, "finite number"),
        ({"post_norm": True, "layer_scale": float("nan")}, "finite number"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        InternImageSettings(**changes)


def test_modules_check_their_own_arguments():
    with pytest.raises(ValueError, match=r"groups \(5\) must divide channels \(64\)"):
        DCNv3(64, 5)
    with pytest.raises(ValueError, match=r"groups \(0\) must divide channels \(64\)"):
        DCNv3(64, 0)
    with pytest.raises(ValueError, match="must be odd"):
        DCNv3(64, 4, kernel_size=4)
    with pytest.raises(ValueError, match="the only point of kernel_size 1"):
        DCNv3(64, 4, kernel_size=1, remove_center=True)
    with pytest.raises(ValueError, match=r"offset_scale \(inf\)"):
        DCNv3(64, 4, offset_scale=float("inf"))
    with pytest.raises(ValueError, match="each of the 4 stages"):
        InternImage(16, (1, 1, 1), (1, 2, 4))
    with pytest.raises(TypeError, match="head 'conv' must be ConvHeadSettings"):
        InternImage(16, (1, 1, 1, 1), (1, 2, 4, 8), head="conv")
    with pytest.raises(ValueError, match=r"InternImage gives tokens, cells, .* but no words"):
        small_encoder().encode(images(1), ("words",))
    model = OfficialModel(
        InternImage(
            16, (1, 1, 1, 1), (1, 2, 4, 8), head=small_settings(head={"type": "conv"}).head
        ),
        3,
    )
    assert model(images(1)).shape == (1, 3)
