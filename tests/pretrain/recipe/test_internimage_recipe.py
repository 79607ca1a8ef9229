"""InternImage in recipes: what its settings allow beside the tasks that use it."""

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from pretrain.check import _check_initial_weights
from pretrain.models.build_context import BuildContext
from pretrain.models.init import classes_hint, load_weights
from pretrain.models.multitask import MultiTaskModel
from pretrain.objectives.classification import ClassificationSettings
from pretrain.optim.groups import parameter_groups
from pretrain.recipe.load import load_recipe, load_resolved
from pretrain.recipe.overlay import RecipeError
from tests.pretrain.models.internimage.internimage_models import PUBLISHED, small_encoder

SMALL = "channels: 16, depths: [1, 1, 2, 1], groups: [1, 2, 4, 8]"


def overrides(encoder: str, *others: str) -> list[str]:
    return [f"model.encoders.image={{type: internimage, {encoder}}}", *others]


def fault(*changes: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits_multitask", list(changes))
    return "\n".join(line.partition("': ")[2] or line for line in str(caught.value).splitlines())


def test_a_run_directory_reads_back(tmp_path):
    recipe = load_recipe(
        "digits_multitask",
        overrides(
            "size: S, drop_path: 0.4, mixer: {offset_scale: 2.0}",
            "tasks.classify.objective.pool=head",
            "tasks.contrast.objective.pool=head",
        ),
    )
    encoder = recipe.model.encoders["image"]
    assert (encoder.channels, encoder.drop_path, encoder.mixer.offset_scale) == (80, 0.4, 2.0)
    recipe.dump(tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["model"]["encoders"]["image"][
        "depths"
    ] == [4, 4, 21, 4]
    assert load_resolved(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            overrides(SMALL, "tasks.classify.objective.pool=class_token"),
            "tasks.classify.objective.encoder='image' cannot give pool=class_token: this "
            "internimage has "
            "mean",
        ),
        (
            ["tasks.classify.objective.pool=head"],
            "tasks.classify.objective.encoder='image' cannot give pool=head: this vit has mean and "
            "class_token",
        ),
        (
            overrides(SMALL, "tasks.classify.objective.pool=head"),
            "tasks.classify.objective.encoder='image' cannot give pool=head: this internimage "
            "has mean, "
            "and with a `head` also that",
        ),
        (
            overrides("size: T"),
            "model.encoders.image.head: no task has `pool: head`, so it would only decay: remove "
            "it "
            "(head=null), or let an objective use it",
        ),
        (
            overrides(
                "size: H", "tasks.classify.objective.pool=head", "tasks.caption.data.image.size=48"
            ),
            "tasks.caption.data.image.size=48 is not a multiple of 32, as model.encoders.image "
            "(internimage) needs: use 32 or 64",
        ),
        (
            overrides(
                "size: H",
                "tasks.classify.objective.pool=head",
                "tasks.classify.data.image.mode=keep_aspect",
                "tasks.classify.micro_batch=1",
            ),
            "tasks.classify.data.image.mode=keep_aspect gives sides that are not multiples of "
            "32, as "
            "model.encoders.image (internimage) needs: use another mode",
        ),
        (
            overrides(f"{SMALL}, mixer: {{type: halo, dw_kernel_size: 5}}"),
            "model.encoders.image.mixer.dw_kernel_size: unknown key",
        ),
        (
            overrides(f"{SMALL}, post_norm_layers: [2]"),
            "model.encoders.image: post_norm_layers: the third stage has layers 0..1, not [2]",
        ),
    ],
)
def test_impossible_combinations(changes, message):
    assert message in fault(*changes)


def test_any_side_is_fine_without_projector():
    load_recipe("digits_multitask", overrides(SMALL, "tasks.classify.data.image.size=75"))


def test_initial_weights_may_hold_statistics(tmp_path):
    """The file is checked beforehand against parameters and buffers, as it is read later."""
    encoder = small_encoder(head={"type": "conv"})
    model = MultiTaskModel({"image": encoder}, {})
    weights = {f"encoders.image.{name}": t.clone() for name, t in encoder.state_dict().items()}
    weights["encoders.image.conv_head.1.0.running_mean"] += 3
    save_file(weights, tmp_path / "a.safetensors")
    (text,) = _check_initial_weights(model, str(tmp_path / "a.safetensors"), [])
    assert text.startswith(f"initial_weights: {len(weights)} of {len(weights)} tensors")
    assert load_weights(model, tmp_path / "a.safetensors") == []
    assert (encoder.conv_head[1][0].running_mean == 3).all()


def test_a_linear_layer_for_other_classes_is_no_silent_matter(tmp_path):
    """The file of 10 classes for a model of 7: refused when checked and when read, with a way."""
    encoder = small_encoder(head={"type": "conv"})
    settings = ClassificationSettings(pool="head")
    models = {
        classes: MultiTaskModel(
            {"image": encoder},
            {
                "classify": settings.build(
                    BuildContext({"image": encoder}, None, (0,) * 3, (1,) * 3, classes)
                )
            },
        )
        for classes in (7, 10)
    }
    save_file(models[10].state_dict(), tmp_path / "a.safetensors")
    for read in (lambda *where: list(_check_initial_weights(*where, [])), load_weights):
        with pytest.raises(ValueError, match=r"classify\.head\..*--head-rows FILE .*--leave-out"):
            read(models[7], str(tmp_path / "a.safetensors"))
    assert classes_hint("encoders.image.head.weight") == ""


IN1K, IN22K = 1_281_167, 14_197_122


@pytest.mark.parametrize(
    "name, size, pixels, drop_path, epochs, micro_batch",
    [
        ("internimage_t_in1k", "T", 224, 0.1, 300, 128),
        ("internimage_s_in1k", "S", 224, 0.4, 300, 128),
        ("internimage_b_in1k", "B", 224, 0.5, 300, 128),
        ("internimage_l_in1k_384", "L", 384, 0.1, 20, 16),
        ("internimage_xl_in1k_384", "XL", 384, 0.2, 20, 16),
        ("internimage_h_in1k_640", "H", 640, 0.2, 20, 16),
        ("internimage_g_in1k_512", "G", 512, 0.4, 20, 8),
    ],
)
def test_published_settings(name, size, pixels, drop_path, epochs, micro_batch):
    """Section by section what the released configurations say, rates scaled to the batch."""
    recipe = load_recipe(name)
    encoder, task = recipe.model.encoders["image"], recipe.tasks["classify"]
    from_scratch = epochs == 300
    batch = 4096 if from_scratch else 512
    assert (encoder.size, encoder.drop_path, task.data.image.size) == (size, drop_path, pixels)
    assert (task.global_batch, task.micro_batch, task.data.classes) == (batch, micro_batch, 1000)
    assert recipe.steps == round(epochs * IN1K / batch)
    warmup = 20 if from_scratch else 2
    assert recipe.schedule.warmup_steps == pytest.approx(warmup * IN1K / batch, abs=1)
    base = 5e-4 if from_scratch else 2e-5
    assert recipe.optimizer.lr == pytest.approx(base * batch / 512)
    lowest = recipe.schedule.final_ratio * recipe.optimizer.lr
    assert lowest == pytest.approx(5e-6 * batch / 512 if from_scratch else 0.0)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.clip_norm) == (0.05, 5.0)
    assert (recipe.optimizer.betas, recipe.optimizer.eps) == ((0.9, 0.999), 1e-8)
    assert (recipe.ema.decay, recipe.schedule.kind) == (0.9999, "cosine")
    assert task.objective.label_smoothing == (0.1 if from_scratch else 0.3)
    assert (task.data.mixing is not None, task.data.image.erase is not None) == (from_scratch,) * 2
    if from_scratch:
        assert (task.data.mixing.mixup_alpha, task.data.mixing.cutmix_alpha) == (0.8, 1.0)
        assert task.data.image.erase.probability == 0.25
    image = task.data.image
    assert (image.mode, image.scale) == ("random_resized_crop", (0.08, 1.0))
    assert (image.flip_probability, image.mean) == (0.5, (0.485, 0.456, 0.406))
    assert image.std == (0.229, 0.224, 0.225)
    augment = image.rand_augment
    assert (augment.operations, augment.magnitude, augment.magnitude_std) == (2, 9.0, 0.5)
    decay = {} if from_scratch else {"encoders.image": 0.9}
    assert recipe.optimizer.layer_decay == decay
    assert encoder.gradient_checkpointing != from_scratch


def test_the_configuration_of_the_papers_numbers():
    """What the header of the recipe says: without layer-wise decay nothing is slowed."""
    recipe = load_recipe(
        "internimage_l_in1k_384",
        [
            "optimizer.layer_decay={encoders.image: null}",
            "optimizer.multipliers_need_layer_decay=true",
        ],
    )
    assert recipe.optimizer.lr_multipliers == {"*.dcn.offset.*": 0.1}
    model = nn.ModuleDict({"encoders": nn.ModuleDict({"image": small_encoder()})})
    assert {g["lr_multiplier"] for g in parameter_groups(model, recipe.optimizer)} == {1.0}


@pytest.mark.parametrize(
    "name, size, pixels, epochs",
    [
        ("internimage_l_in22k_192", "L", 192, 90),
        ("internimage_xl_in22k_192", "XL", 192, 90),
        ("internimage_l_in22k_384", "L", 384, 10),
        ("internimage_xl_in22k_384", "XL", 384, 10),
        ("internimage_h_in22k_384", "H", 384, 30),
        ("internimage_g_in22k_384", "G", 384, 30),
    ],
)
def test_stages_on_imagenet_22k(name, size, pixels, epochs):
    recipe = load_recipe(name)
    task = recipe.tasks["classify"]
    assert (recipe.model.encoders["image"].size, task.data.image.size) == (size, pixels)
    assert task.data.classes == 21841
    assert recipe.steps == pytest.approx(epochs * IN22K / task.global_batch, abs=1)


@pytest.mark.parametrize(
    "name",
    [
        "internimage_t_in1k",
        "internimage_s_in1k",
        "internimage_b_in1k",
        "internimage_l_in1k_384",
        "internimage_xl_in1k_384",
        "internimage_h_in1k_640",
        "internimage_g_in1k_512",
    ],
)
def test_optimizer_groups_of_the_recipes(name):
    """Every pattern matches, and the DCN multiplier and the decay by depth multiply."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        encoder = recipe.model.encoders["image"].build()
        context = BuildContext({"image": encoder}, None, (0,), (1,), 1000)
        task = recipe.tasks["classify"].objective.build(context)
        model = MultiTaskModel({"image": encoder}, {"classify": task})
    groups = parameter_groups(model, recipe.optimizer)
    count = sum(p.numel() for group in groups for p in group["params"])
    assert count == PUBLISHED[recipe.model.encoders["image"].size][0]
    rates = {group["lr_multiplier"] for group in groups}
    if not recipe.optimizer.layer_decay:
        assert rates == {1.0}
    else:
        assert min(rates) == pytest.approx(0.1 * 0.9 ** (sum(encoder.depths) - 1))
        assert max(rates) == 1.0
        # Of the last layer, which does not decay: offsets and the gate, and nothing else.
        rate_of = {id(p): group["lr_multiplier"] for group in groups for p in group["params"]}
        last = encoder.levels[3].blocks[-1].named_parameters()
        slow = {name for name, p in last if rate_of[id(p)] == pytest.approx(0.1)}
        gate = [n for n, _ in encoder.named_parameters() if "center_feature_scale" in n]
        assert len(slow) == (4 if gate else 2)
        assert all("offset" in name or "center_feature_scale" in name for name in slow)
