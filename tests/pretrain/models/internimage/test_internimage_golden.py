"""Against reference values of the official code, and against its published sizes."""

import pytest
import torch

from pretrain.models.internimage.dcnv3 import DCNv3
from pretrain.models.internimage.internimage import InternImageSettings
from pretrain.models.internimage.sizes import SIZES
from tests.pretrain.models.internimage.internimage_models import (
    PUBLISHED,
    Golden,
    OfficialModel,
    read_golden,
)

MODULES = ("base", "bn_relu", "dw5_cfs", "k5_dil2", "rc", "scale2_g2")
MODELS = ("t", "t_nonsquare", "postnorm_ls", "rc", "h_smallhead", "g_smallhead", "h")


@pytest.mark.parametrize("name", MODULES)
def test_module(name):
    tensors, info = read_golden(f"dcnv3_module_{name}")
    own = info["dw_kernel_size"]
    module = DCNv3(
        int(info["channels"]),
        int(info["group"]),
        kernel_size=int(info["kernel_size"]),
        dw_kernel_size=None if own == "None" else int(own),
        dilation=int(info["dilation"]),
        offset_scale=float(info["offset_scale"]),
        center_feature_scale=info["center_feature_scale"] == "True",
        remove_center=info["remove_center"] == "True",
        norm={"LN": "layer", "BN": "batch"}[info["norm_layer"]],
        activation=info["act_layer"].lower(),
    ).eval()
    module.load_state_dict({k[3:]: t for k, t in tensors.items() if k.startswith("sd.")})
    x = tensors["input"].requires_grad_()
    output = module(x)
    torch.testing.assert_close(output, tensors["output"], atol=1e-5, rtol=1e-5)
    output.backward(tensors["grad_output"])
    torch.testing.assert_close(x.grad, tensors["grad_input"], atol=5e-5, rtol=1e-4)
    gradients = {n: p.grad for n, p in module.named_parameters()}
    assert gradients.keys() == {k[5:] for k in tensors if k.startswith("grad.")}
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, tensors[f"grad.{parameter}"], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_logits_maps_and_gradients(name):
    golden = Golden.load(f"internimage_tiny_{name}")
    tensors, model = golden.tensors, golden.model
    images = tensors["input"].requires_grad_()
    logits = model(images)
    torch.testing.assert_close(logits, tensors["logits"], atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        for index, found in enumerate(model.encoder.encode(images, ("maps",)).maps):
            torch.testing.assert_close(found, tensors[f"stage{index}"], atol=2e-5, rtol=1e-4)
    (logits * tensors["loss_weight"]).sum().backward()
    torch.testing.assert_close(images.grad, tensors["grad_input"], atol=5e-5, rtol=1e-3)
    parameters = {n.removeprefix("encoder."): p for n, p in model.named_parameters()}
    assert parameters.keys() == golden.norms.keys()
    for parameter, norm in golden.norms.items():
        found = float(parameters[parameter].grad.norm())
        # A constant added to all keys changes nothing: what stands there is rounding.
        wanted = {"abs": 1e-5} if parameter.endswith("k_bias") else {"rel": 1e-4, "abs": 1e-6}
        assert found == pytest.approx(norm, **wanted), parameter


@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith(("h", "g"))])
def test_batch_statistics_in_training(name):
    golden = Golden.load(f"internimage_tiny_{name}")
    before = golden.model.encoder.conv_head[1][0].running_mean.clone()
    logits = golden.model.train()(golden.tensors["input"])
    torch.testing.assert_close(logits, golden.tensors["logits_train_mode"], atol=2e-5, rtol=1e-4)
    assert not torch.equal(before, golden.model.encoder.conv_head[1][0].running_mean)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_to_the_last_parameter(size):
    with torch.device("meta"):
        encoder = InternImageSettings(size=size).build()
        model = OfficialModel(encoder, 1000)
    parameters, tensors = PUBLISHED[size]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.official()) == tensors
    backbone = [
        p for n, p in encoder.named_parameters() if n.startswith(("patch_embed.", "levels."))
    ]
    assert (
        sum(p.numel() for p in backbone)
        == {
            "T": 28_754_672,
            "S": 48_502_560,
            "B": 94_909_920,
            "L": 218_952_370,
            "XL": 328_971_228,
            "H": 1_073_122_480,
            "G": 3_052_781_184,
        }[size]
    )


@pytest.mark.parametrize("size", PUBLISHED)
def test_official_names_and_shapes(size):
    """Every tensor of the state dict, from the list of names in the official code."""
    with torch.device("meta"):
        model = OfficialModel(InternImageSettings(size=size).build(), 21841)
    found = {name: tuple(t.shape) for name, t in model.official().items()}
    assert found == official_shapes(size, 21841)


def pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """Weight and bias, the bias as long as the weight's first side."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def official_shapes(size: str, classes: int) -> dict[str, tuple[int, ...]]:
    known = SIZES[size]
    c, depths, groups = known["channels"], known["depths"], known["groups"]
    large, scaled = size in ("H", "G"), size in ("S", "B", "L", "XL")
    dw = 5 if large else 3
    shapes = {
        **pair("patch_embed.conv1", c // 2, 3, 3, 3),
        **pair("patch_embed.norm1.1", c // 2),
        **pair("patch_embed.conv2", c, c // 2, 3, 3),
        **pair("patch_embed.norm2.1", c),
    }
    for i, (depth, g) in enumerate(zip(depths, groups, strict=True)):
        w = c * 2**i
        for j in range(depth):
            block = f"levels.{i}.blocks.{j}"
            shapes |= {
                **pair(f"{block}.norm1.0", w),
                **pair(f"{block}.norm2.0", w),
                **pair(f"{block}.dcn.dw_conv.0", w, 1, dw, dw),
                **pair(f"{block}.dcn.dw_conv.1.1", w),
                **pair(f"{block}.dcn.offset", g * 18, w),
                **pair(f"{block}.dcn.mask", g * 9, w),
                **pair(f"{block}.dcn.input_proj", w, w),
                **pair(f"{block}.dcn.output_proj", w, w),
                **pair(f"{block}.mlp.fc1", 4 * w, w),
                **pair(f"{block}.mlp.fc2", w, 4 * w),
            }
            if scaled:
                shapes |= {f"{block}.gamma1": (w,), f"{block}.gamma2": (w,)}
            if size == "H":
                shapes |= pair(f"{block}.res_post_norm1.0", w)
                shapes |= pair(f"{block}.res_post_norm2.0", w)
            if large:
                shapes[f"{block}.dcn.center_feature_scale_proj_weight"] = (g, w)
                shapes[f"{block}.dcn.center_feature_scale_proj_bias"] = (g,)
        if not scaled:
            shapes |= pair(f"levels.{i}.norm.0", w)
        if i < 3:
            shapes[f"levels.{i}.downsample.conv.weight"] = (2 * w, w, 3, 3)
            shapes |= pair(f"levels.{i}.downsample.norm.1", 2 * w)
    for p in range({"H": 5, "G": 8}.get(size, 0)):
        shapes |= pair(f"levels.2.post_norms.{p}.0", 4 * c)
    return (
        shapes
        | (projector_shapes(c) if large else conv_head_shapes(c))
        | pair("head", classes, 768 if large else 12 * c)
    )


def conv_head_shapes(c: int) -> dict[str, tuple[int, ...]]:
    return {
        "conv_head.0.weight": (12 * c, 8 * c, 1, 1),
        **pair("conv_head.1.0", 12 * c),
        "conv_head.1.0.running_mean": (12 * c,),
        "conv_head.1.0.running_var": (12 * c,),
        "conv_head.1.0.num_batches_tracked": (),
    }


def projector_shapes(c: int) -> dict[str, tuple[int, ...]]:
    cross = "clip_projector.cross_dcn"
    return {
        **pair("dcnv3_head_x4.0", 4096, 8 * c, 1, 1),
        **pair("dcnv3_head_x3", 1024, 4 * c, 1, 1),
        **{k: v for part in "qkv" for k, v in pair(f"clip_projector.norm1_{part}.0", 1024).items()},
        **{f"{cross}.{part}_bias": (1024,) for part in "qkv"},
        **{f"{cross}.{part}.weight": (1024, 1024) for part in "qkv"},
        **pair(f"{cross}.proj", 768, 1024),
        **pair("fc_norm.0", 768),
    }
