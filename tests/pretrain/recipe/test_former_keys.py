"""Former keys of recipes: runs that hold them are read as before, and who asks for more is told."""

import pytest
import yaml

from data_pipeline.images.transforms import HeldOutImageSettings, ImageSettings
from pretrain.recipe.former_keys import FORMER_KEYS
from pretrain.recipe.load import load_recipe, load_resolved
from pretrain.recipe.overlay import RecipeError

OLD = ImageSettings(size=48, mode="random_resized_crop", flip_probability=0.5, max_pixels=10**6)
MIXING = "tasks.classify.data.mixing={}"


def test_the_recipe_of_an_older_run_is_read_as_it_was_meant(tmp_path):
    path = tmp_path / "recipe.yaml"
    load_recipe("internimage_small", [MIXING]).dump(path)
    data = yaml.safe_load(path.read_text("utf-8"))
    task = data["tasks"]["classify"]
    task["data"]["image"] |= {"flip_probability": 0.5, "max_pixels": 10**6, "mean": [0.5, 0.5, 0.5]}
    task["evaluation"]["image"] = OLD.model_dump(mode="json") | {"mean": [0.5, 0.5, 0.5]}
    task["data"]["mixing"]["cutmix_probability"] = 0.5
    data["logging"]["plain_progress_seconds"] = 15.0
    path.write_text(yaml.safe_dump(data), "utf-8")
    for read in (load_recipe(path), load_resolved(path)):
        task = read.tasks["classify"]
        assert task.evaluation.image == HeldOutImageSettings(size=48, mode="center_crop")
        image = task.data.held_out_image(task.evaluation.image)
        assert (image.size, image.mode, image.max_pixels) == (48, "center_crop", 10**6)
        assert image.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("former", FORMER_KEYS, ids=lambda former: former.path)
def test_what_is_no_setting_any_more_says_what_to_do(former):
    key = former.path.replace("*", "classify")
    load_recipe("internimage_small", [MIXING, f"{key}={former.value}"])
    with pytest.raises(RecipeError) as caught:
        load_recipe("internimage_small", [MIXING, f"{key}=0.25"])
    line = f"override {key}=0.25: {key}: is no setting any more: {former.advice}"
    assert str(caught.value).replace("'", "") == line


def test_draws_for_held_out_images_are_refused_and_sizes_must_go_together():
    for change, text in (
        ("{flip_probability: 0.25}", "data.image.flip_probability holds, .* remove it"),
        ("{mean: [0, 0, 0]}", "data.image.mean holds"),
        ("{max_size: 64}", "max_size is for mode keep_aspect; mode is center_crop"),
        ("{mode: cut}", "'cut' is not one of center_crop, keep_aspect, large_scale_jitter"),
    ):
        with pytest.raises(RecipeError, match=text):
            load_recipe("internimage_small", [f"tasks.classify.evaluation.image={change}"])
    image = (
        load_recipe("internimage_small")
        .tasks["classify"]
        .data.held_out_image(HeldOutImageSettings(size=50))
    )
    assert (image.size, image.mode) == (50, "center_crop")
