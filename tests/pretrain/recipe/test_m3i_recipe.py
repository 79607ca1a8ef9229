"""M3I in recipes: what is refused, and what the shipped ones say."""

from types import SimpleNamespace

import pytest
import torch

from pretrain.build import build_model
from pretrain.optim.groups import parameter_groups
from pretrain.recipe.load import load_recipe
from pretrain.recipe.overlay import RecipeError

INTERNIMAGE = "{type: internimage, channels: 16, depths: [1, 1, 1, 1], groups: [1, 2, 4, 8]}"


def fault(*changes: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe("m3i_digits", list(changes))
    return str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (["tasks.m3i.micro_batch=1"], "objective m3i mixes neighbours: micro_batch must be even"),
        (
            ["tasks.m3i.objective.cell=12"],
            "tasks.m3i.objective.cell=12 is not a multiple of 8, as model.encoders.image needs: "
            "use 8",
        ),
        (
            ["tasks.m3i.objective.cell=24"],
            "tasks.m3i.data.image.size=40 is not a multiple of 24, as "
            "tasks.m3i.objective.cell=24 needs",
        ),
        (
            ["tasks.m3i.objective.cell=40"],
            "tasks.m3i.objective.cell=40 is all of an image, but two share the cells: lower cell",
        ),
        (
            ["tasks.m3i.objective.encoder=text"],
            "tasks.m3i.objective.encoder='text' must read images, but "
            "model.encoders.text.type=text",
        ),
        (
            [
                "tasks.m3i.data.label_source=null",
                "tasks.m3i.data.classes=null",
                "tasks.m3i.objective.weights.category=3",
            ],
            "tasks.m3i.objective.weights.category=3.0 has no effect with "
            "tasks.m3i.data.classes=null",
        ),
        (
            [
                "tasks.m3i.data.label_source=null",
                "tasks.m3i.data.classes=null",
                "tasks.m3i.objective.label_smoothing=0.1",
            ],
            "label_smoothing=0.1 has no effect with tasks.m3i.data.classes=null: remove it, or set",
        ),
        (
            [
                "tasks.m3i.objective.text_encoder=null",
                "model.encoders.text=null",
                "tasks.m3i.objective.weights.text=0.5",
                "tasks.m3i.objective.temperature=0.1",
            ],
            "objective.temperature=0.1 has no effect with tasks.m3i.objective.text_encoder=null",
        ),
        (["tasks.m3i.data.second_view=null"], "second_view is missing"),
        (["tasks.m3i.data.captions_per_image=2"], "must be 1 for a m3i objective"),
        (["tasks.m3i.data.text_length=40"], "exceeds model.encoders.text.max_positions=32"),
        (
            ["tasks.m3i.objective.text_encoder=null"],
            "model.encoders.text: no task uses this encoder",
        ),
        (["tasks.m3i.evaluation.micro_batch=7"], "evaluation.micro_batch=7 must be even"),
        (
            ["tasks.m3i.evaluation.image={size: 32}"],
            "must give squares of tasks.m3i.data.image.size=40",
        ),
        (
            [f"model.encoders.image={INTERNIMAGE}"],
            "with `head: {type: projector}` alone: give it that",
        ),
        (
            [f"model.encoders.image={INTERNIMAGE[:-1]}, head: {{type: projector}}}}"],
            "tasks.m3i.objective.cell=8 is not a multiple of 32",
        ),
        (
            [
                f"model.encoders.image={INTERNIMAGE[:-1]}, head: {{type: projector}}}}",
                "tasks.m3i.objective.cell=32",
                "tasks.m3i.objective.group_attention=true",
            ],
            "tasks.m3i.objective.group_attention is for a vit, not for an internimage",
        ),
        (
            [
                f"model.encoders.image={INTERNIMAGE[:-1]}, head: {{type: projector}}}}",
                "tasks.m3i.objective.cell=32",
            ],
            "tasks.m3i.objective.pooled_width is for a vit, not for an internimage: remove it",
        ),
    ],
)
def test_impossible_combinations(changes, message):
    assert message in fault(*changes)


def test_texts_and_classes_are_optional():
    recipe = load_recipe(
        "m3i_digits",
        [
            "tasks.m3i.objective.text_encoder=null",
            "model.encoders.text=null",
            "tasks.m3i.data.label_source=null",
            "tasks.m3i.data.classes=null",
        ],
    )
    model = build_model(recipe, SimpleNamespace(vocab_size=300, eos_id=2))
    assert model.objectives["m3i"].head is None and list(model.encoders) == ["image"]


@pytest.mark.parametrize("name", ["m3i_digits", "m3i_vit_b", "internimage_h_joint"])
def test_shipped_recipes_build(name):
    """Every pattern of the optimizer matches, the target is neither trained nor dropped."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = build_model(recipe, SimpleNamespace(vocab_size=30522, eos_id=2))
    objective, encoder = model.objectives["m3i"], model.encoders["image"]
    groups = parameter_groups(model, recipe.optimizer)
    trained = {id(p) for group in groups for p in group["params"]}
    assert not trained & {id(p) for p in objective.target.parameters()}
    shapes = [
        {n: p.shape for n, p in module.named_parameters()}
        for module in (encoder, objective.target.encoder)
    ]
    assert shapes[0] == shapes[1]
    assert not any(getattr(objective.target.encoder, "drop_rates", []))
    assert objective.pooled_width == {"m3i_digits": 96}.get(name, 768)
    assert (
        objective.flops(
            {
                "images": torch.zeros(2, 3, 224, 224, device="meta"),
                "valid": torch.ones(2).bool(),
                "tokens": torch.zeros(2, 1, 16, device="meta"),
            }
        )
        > 1e9
    )


def test_the_joint_stage_is_that_of_the_paper():
    """427 M images, 30 epochs, 224 pixels, H; sources in the proportion of their sizes."""
    recipe = load_recipe("internimage_h_joint")
    task, encoder = recipe.tasks["m3i"], recipe.model.encoders["image"]
    assert (encoder.size, task.data.image.size, task.objective.cell) == ("H", 224, 32)
    assert recipe.steps == pytest.approx(30 * 427e6 / task.global_batch, abs=1)
    weights = {name: source.weight for name, source in task.data.sources.items()}
    assert weights == {"laion400m": 400, "yfcc15m": 15, "cc12m": 12}
    text = recipe.model.encoders["text"]
    assert (text.layers, text.width, text.heads, text.pool) == (12, 768, 12, "mean")
    assert task.objective.decoder.width == encoder.head.width == 1024
    rates = {**recipe.optimizer.lr_multipliers}
    assert set(rates.values()) == {0.1}


def test_epochs_of_the_small_one_are_of_imagenet():
    """400 of them, 40 to warm up; each source fills half of a batch."""
    recipe = load_recipe("m3i_vit_b")
    task = recipe.tasks["m3i"]
    weights = {name: source.weight for name, source in task.data.sources.items()}
    of_batch = task.global_batch * weights["in1k"] / sum(weights.values())
    for steps, epochs in ((recipe.steps, 400), (recipe.schedule.warmup_steps, 40)):
        assert steps * of_batch / 1_281_167 == pytest.approx(epochs, abs=1e-2)


def test_views_are_those_of_siamese_image_modelling():
    data = load_recipe("m3i_vit_b").tasks["m3i"].data
    for view, blur, solarize in ((data.image, 1.0, 0.0), (data.second_view, 0.1, 0.2)):
        jitter = (view.brightness, view.contrast, view.saturation, view.hue)
        assert jitter == (0.4, 0.4, 0.2, 0.1) and view.jitter_probability == 0.8
        assert (view.scale, view.flip_probability) == ((0.08, 1.0), 0.5)
        assert (view.grayscale_probability, view.blur_sigma) == (0.2, (0.1, 2.0))
        assert (view.blur_probability, view.solarize_probability) == (blur, solarize)
        assert view.mean == (0.485, 0.456, 0.406)
