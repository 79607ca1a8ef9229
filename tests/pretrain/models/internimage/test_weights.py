"""Foreign names of InternImage weights: what training has put around them comes off."""

import re

import pytest
import torch

from pretrain.models.internimage.internimage import InternImageSettings
from pretrain.models.internimage.weights import (
    cut_centers,
    export_internimage,
    import_internimage,
    official_shapes,
    recognise_size,
    restore_dots,
    unwrap,
)
from tests.pretrain.models.internimage.internimage_models import (
    PUBLISHED,
    SMALL_PROJECTOR,
    small_settings,
)

FORMS = {
    "t": {"head": {"type": "conv"}},
    "s": {"head": {"type": "conv"}, "post_norm": True, "layer_scale": 1e-5, "stage_norm": False},
    "h": {
        "head": SMALL_PROJECTOR,
        "res_post_norm": True,
        "post_norm_layers": (1,),
        "mixer": {"center_feature_scale": True, "dw_kernel_size": 5},
    },
}


def official(form: str, classes: int = 5) -> tuple[InternImageSettings, dict[str, torch.Tensor]]:
    settings = small_settings(**FORMS[form])
    generator = torch.Generator().manual_seed(0)
    return settings, {
        name: torch.randn(shape, generator=generator)
        for name, shape in official_shapes(settings, classes).items()
    }


def same(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(found[n] is wanted[n] for n in wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "backbone."])
def test_prefixes(form, prefix):
    _, state = official(form)
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    if prefix == "backbone.":
        wrapped |= {"bbox_head.weight": torch.zeros(2), "neck.bias": torch.zeros(1)}
    found = unwrap(wrapped)
    assert same(found.tensors, state)
    if prefix == "backbone.":
        assert found.notes == ["the weights under `backbone.`; 2 others left out"]
    if prefix == "":
        assert not found.notes


def test_student_beside_its_teacher():
    _, state = official("t")
    wrapped = {f"student.{n}": t for n, t in state.items()}
    wrapped |= {f"teacher.{n}": t + 1 for n, t in state.items()}
    wrapped["student_proj.weight"] = torch.zeros(2, 2)
    found = unwrap(wrapped)
    assert same(found.tensors, state) and "others left out" in found.notes[0]


def test_m3i_run_keeps_its_norm():
    """The official loader writes fc_norm.weight, which no model has, and so loses the norm."""
    _, state = official("h")
    wrapped = {"mask_token": torch.zeros(1), "decoder.weight": torch.zeros(3)}
    for name, tensor in state.items():
        if name.startswith(("fc_norm.0.", "head.")):
            place = "clip.classifier_ln." if name.startswith("fc_norm") else "clip.classifier."
            wrapped[place + name.rpartition(".")[2]] = tensor
        else:
            bare = name.startswith("clip_projector")
            wrapped[name if bare else f"dcnv3.{name}"] = tensor
            wrapped[f"mm_dcnv3.{name}"] = tensor + 1
    found = unwrap(wrapped)
    assert same(found.tensors, state)
    assert re.match(r"the online branch of an M3I run .*; \d+ others left out", found.notes[0])
    bare = {n.replace("fc_norm.0.", "fc_norm."): t for n, t in state.items()}
    assert same(unwrap(bare).tensors, state)


def test_two_backbones_are_refused():
    with pytest.raises(ValueError, match="two composed backbones"):
        unwrap({"backbone.cb_modules.0.patch_embed.conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_are_recognised_with_and_without_dots(size):
    shapes = official_shapes(InternImageSettings(size=size), 10)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert recognise_size(tensors) == size
    dotless = {name.replace(".", ""): tensor for name, tensor in tensors.items()}
    assert len(dotless) == len(tensors) and recognise_size(dotless) == size
    assert same(restore_dots(dotless, list(shapes)), tensors)
    del tensors["levels.2.blocks.3.norm1.0.weight"], tensors["patch_embed.conv2.bias"]
    assert recognise_size(tensors) == size  # what is missing is for the import to say
    assert recognise_size({"weight": torch.zeros(1)}) is None
    others = {n: t for n, t in tensors.items() if not n.startswith("levels.1.blocks.1.")}
    last = max(int(n.split(".")[3]) for n in others if n.startswith("levels.1.blocks."))
    fewer = {n: t for n, t in others.items() if not n.startswith(f"levels.1.blocks.{last}.")}
    assert recognise_size(fewer) is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", ["official", "transformers"])
def test_round_trip(form, target):
    settings, state = official(form)
    ours = import_internimage(state, settings, "eye", "sort")
    assert {name for name in ours if not name.startswith("encoders.eye.")} == {
        "objectives.sort.head.weight",
        "objectives.sort.head.bias",
    }
    theirs = export_internimage(
        ours | {"encoders.other.weight": torch.zeros(1)}, target, "eye", "sort"
    )
    if target == "official":
        assert same(theirs, state)
    else:
        assert all(name.startswith("model.") and "gamma" not in name for name in theirs)
        assert any("layer_scale1" in name for name in theirs) == (form == "s")
    assert same(unwrap(theirs).tensors, state)


def test_detectors_get_the_backbone_alone():
    settings, state = official("h")
    theirs = export_internimage(import_internimage(state, settings), "detection")
    kept = {n: t for n, t in state.items() if n.startswith(("patch_embed.", "levels."))}
    assert same(theirs, {f"backbone.{name}": tensor for name, tensor in kept.items()})


def test_nothing_is_missing_unknown_or_resized_unless_it_is_named():
    settings, state = official("t")
    state = {n: t for n, t in state.items() if n != "levels.0.norm.0.bias"}
    state |= {"decoder.weight": torch.zeros(1), "levels.1.norm.0.bias": torch.zeros(7)}
    with pytest.raises(ValueError) as caught:
        import_internimage(state, settings)
    text = str(caught.value)
    assert "1 are missing (levels.0.norm.0.bias)" in text
    assert "1 are unknown (decoder.weight)" in text
    assert "1 have another shape (levels.1.norm.0.bias (7,) in place of (32,))" in text
    named = ("decoder.*", "levels.*.norm.0.bias", "head.*")
    ours = import_internimage(state, settings, leave_out=named)
    assert len(ours) == len(state) - 1 - 3 - 2
    assert not any(name.startswith("objectives.") for name in ours)
    with pytest.raises(ValueError, match="'neck' matches no tensor"):
        import_internimage(state, settings, leave_out=("neck",))


def test_numbers_that_are_none_are_refused():
    settings = small_settings()
    tensors = {name: torch.zeros(shape) for name, shape in official_shapes(settings, None).items()}
    name = "levels.2.blocks.0.mlp.fc1.weight"
    tensors[name][0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"1 tensors hold NaN .*{name}"):
        import_internimage(tensors, settings)
    assert name not in "".join(import_internimage(tensors, settings, leave_out=[name]))


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_the_middle_point_is_cut_out(kernel_size):
    """A model whose middle points have no weight is the model without them, once these are cut."""
    mixer = {"kernel_size": kernel_size}
    whole = small_settings(mixer=mixer)
    encoder = whole.build()
    generator = torch.Generator().manual_seed(0)
    points = kernel_size**2
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
        for level in encoder.levels:
            for block in level.blocks:
                bias = block.dcn.mask.bias.view(-1, points)
                weight = block.dcn.mask.weight.view(len(bias), points, -1)
                bias[:, points // 2], weight[:, points // 2] = -1e4, 0.0
    settings = small_settings(mixer={**mixer, "remove_center": True})
    state, note = cut_centers(encoder.state_dict(), settings)
    assert note.startswith("20 tensors for offsets and masks without the rows of the middle point")
    smaller = settings.build()
    smaller.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), encoder(images), atol=1e-5, rtol=1e-5)
    assert cut_centers(state, settings) == (state, None)  # nothing is left to cut
    assert cut_centers(encoder.state_dict(), whole)[1] is None
    with pytest.raises(ValueError, match=r"trained without the middle point.*remove_center: true"):
        cut_centers(state, whole)
    window = small_settings(mixer={"type": "shifted_window"})
    assert cut_centers(state, window) == (state, None)  # its own names are for the import to check


def test_the_middle_rows_are_those_of_the_official_loader():
    """Of 9 points rows 4 mod 9 of masks and 8, 9 mod 18 of offsets."""
    state = {}
    for stage, groups in enumerate((1, 2, 4, 8)):
        for part, rows in (("mask", 9 * groups), ("offset", 18 * groups)):
            state[f"levels.{stage}.blocks.0.dcn.{part}.bias"] = torch.arange(rows)
    found, _ = cut_centers(state, small_settings(mixer={"remove_center": True}))
    for name, rows in state.items():
        gone = {4} if "mask" in name else {8, 9}
        wanted = [row for row in rows.tolist() if row % (9 * len(gone)) not in gone]
        assert found[name].tolist() == wanted


def test_half_precision_becomes_float32_and_counters_stay():
    settings, state = official("t")
    state["conv_head.1.0.num_batches_tracked"] = torch.tensor(7)
    state = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    ours = import_internimage(state, settings)
    kinds = {tensor.dtype for tensor in ours.values()}
    assert kinds == {torch.float32, torch.int64}


def test_what_is_not_there_cannot_be_exported():
    settings, state = official("t")
    ours = import_internimage(state, settings)
    with pytest.raises(ValueError, match="the model has encoders"):
        export_internimage(ours, "official", "eye")
    with pytest.raises(ValueError, match="task 'sort' has no linear layer"):
        export_internimage(ours, "official", "image", "sort")
