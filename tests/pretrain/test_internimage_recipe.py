"""InternImage in recipes: what its settings allow beside the tasks that use it."""

import pytest
import yaml

from pretrain.recipe import RecipeError, load_recipe, load_resolved

SMALL = "channels: 16, depths: [1, 1, 2, 1], groups: [1, 2, 4, 8]"


def overrides(encoder: str, *others: str) -> list[str]:
    return [f"model.encoders.image={{type: internimage, {encoder}}}", *others]


def fault(*changes: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits_multitask", list(changes))
    return "\n".join(line.partition("': ")[2] or line for line in str(caught.value).splitlines())


def test_a_run_directory_reads_back(tmp_path):
    recipe = load_recipe("digits_multitask", overrides(
        "size: S, drop_path: 0.4, mixer: {offset_scale: 2.0}",
        "tasks.classify.objective.pool=head", "tasks.contrast.objective.pool=head",
    ))
    encoder = recipe.model.encoders["image"]
    assert (encoder.channels, encoder.drop_path, encoder.mixer.offset_scale) == (80, 0.4, 2.0)
    recipe.dump(tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["model"]["encoders"]["image"][
        "depths"] == [4, 4, 21, 4]
    assert load_resolved(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("changes, message", [
    (overrides(SMALL, "tasks.classify.objective.pool=class_token"),
     "tasks.classify.objective.encoder='image' cannot give pool=class_token: this internimage has "
     "mean"),
    (["tasks.classify.objective.pool=head"],
     "tasks.classify.objective.encoder='image' cannot give pool=head: this vit has mean and "
     "class_token"),
    (overrides(SMALL, "tasks.classify.objective.pool=head"),
     "tasks.classify.objective.encoder='image' cannot give pool=head: this internimage has mean, "
     "and with a `head` also that"),
    (overrides("size: T"),
     "model.encoders.image.head: no task has `pool: head`, so it would only decay: remove it "
     "(head=null), or let an objective use it"),
    (overrides("size: H", "tasks.classify.objective.pool=head", "tasks.caption.data.image.size=48"),
     "tasks.caption.data.image.size=48 is not a multiple of 32, as model.encoders.image "
     "(internimage) needs: use 32 or 64"),
    (overrides("size: H", "tasks.classify.objective.pool=head",
               "tasks.classify.data.image.mode=keep_aspect", "tasks.classify.micro_batch=1"),
     "tasks.classify.data.image.mode=keep_aspect gives sides that are not multiples of 32, as "
     "model.encoders.image (internimage) needs: use another mode"),
    (overrides(f"{SMALL}, mixer: {{type: halo, dw_kernel_size: 5}}"),
     "model.encoders.image.mixer.dw_kernel_size: unknown key"),
    (overrides(f"{SMALL}, post_norm_layers: [2]"),
     "model.encoders.image: post_norm_layers: the third stage has layers 0..1, not [2]"),
])  # fmt: skip
def test_impossible_combinations(changes, message):
    assert message in fault(*changes)


def test_any_side_is_fine_without_projector():
    load_recipe("digits_multitask", overrides(SMALL, "tasks.classify.data.image.size=75"))
